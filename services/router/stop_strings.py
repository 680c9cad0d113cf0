"""Stop strings in streamed text: cut exactly, never shown in part.

The match is the one that ends first in the text, and of those that end there the longest, so the
result depends on the text alone and not on how it was cut into pieces. Whatever could still
become a stop string is held back until it can't.
"""

from collections.abc import Sequence


class StopStrings:
    """Feed text, get what may be shown. After a match nothing more may be fed."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, armed: bool = True) -> str:
        """What may be shown now. `armed=False` looks for nothing and forgets partial matches (min_tokens)."""
        assert self.matched is None, "text after a stop string"
        text = self._held + text
        self._held = ""
        if not self._stops or not armed:
            return text
        found = self._first(text)
        if found is not None:
            start, self.matched = found
            return text[:start]
        keep = self._open_suffix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the text ends without a match."""
        text, self._held = self._held, ""
        return text

    def _first(self, text: str) -> tuple[int, str] | None:
        starts = [(text.find(stop), stop) for stop in self._stops]
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _open_suffix(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
