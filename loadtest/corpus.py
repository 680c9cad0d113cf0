"""Text for load: the source of the Python standard library, which is on every machine that runs this."""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FILES_MAX = 200


class Corpus:
    """Excerpts of ASCII text, so that no tokenizer with a byte fallback makes more tokens of it than characters."""

    def __init__(self, folder: Path | None = None) -> None:
        self._files = sorted((folder or Path(sysconfig.get_paths()["stdlib"])).glob("*.py"))[:FILES_MAX]
        self._texts: dict[Path, str] = {}
        if not self._files:
            raise FileNotFoundError(f"{folder}: no Python source there to make prompts of")

    def excerpt(self, rng: random.Random, characters: int) -> tuple[str, str]:
        """A file's name and text from it, from the start of a line on; the files after it go on where it ends."""
        first = rng.randrange(len(self._files))
        text = self._text(self._files[first])
        begin = text.rfind("\n", 0, rng.randrange(len(text) + 1)) + 1
        parts = [text[begin : begin + characters]]
        rest = self._following(first)
        while (missing := characters - sum(map(len, parts))) > 0:
            parts.append(next(rest)[:missing])
        return self._files[first].name, "".join(parts)

    def _following(self, first: int) -> Iterator[str]:
        while True:
            first = (first + 1) % len(self._files)
            yield self._text(self._files[first])

    def _text(self, file: Path) -> str:
        if file not in self._texts:
            self._texts[file] = file.read_bytes().decode("ascii", "ignore") or "# empty\n"
        return self._texts[file]
