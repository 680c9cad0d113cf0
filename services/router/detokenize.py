"""Token ids to text, a token at a time, exact on characters that span tokens.

A window of ids `[start, len)` is decoded each time: ids before `known` are context only (some
tokenizers decode a token differently at the beginning of a text), and `shown` characters of the
window's text are out already. Trailing replacement characters are held back, because the next
token may complete them; a character has at most four bytes, so at most three are provisional.

Invariant: the concatenation of what `push` and `flush` return equals the decoding of all ids that
are not skipped.
"""

from collections.abc import Callable, Sequence

_PROVISIONAL_MAX = 3  # bytes of an unfinished UTF-8 character
_WINDOW_MAX = 48  # ids; only text that keeps ending in invalid bytes gets near it
_REPLACEMENT = "�"


class Detokenizer:
    """The text of one sequence: `decode` turns ids into text, `skipped` are ids that have none (special tokens)."""

    def __init__(self, decode: Callable[[Sequence[int]], str], skipped: frozenset[int] = frozenset()) -> None:
        self._decode = decode
        self._skipped = skipped
        self._ids: list[int] = []
        self._known = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty in the middle of a character."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        stable = _stable_length(text)
        out = text[self._shown : stable]
        self._shown = max(self._shown, stable)
        if stable == len(text) and out:
            self._advance()
        elif len(self._ids) > _WINDOW_MAX:
            self._slide(text)
        return out

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text = self._decode(self._ids)
        out = text[self._shown :]
        self._shown = len(text)
        return out

    def _advance(self) -> None:
        """Everything is out: the ids up to here become the next window's context."""
        del self._ids[: self._known]
        self._known = len(self._ids)
        self._shown = len(self._decode(self._ids))

    def _slide(self, text: str) -> None:
        """Shortens a window that never closes, where a cut changes nothing."""
        for cut in range(len(self._ids) - 8, len(self._ids) - 16, -1):
            head, tail = self._decode(self._ids[:cut]), self._decode(self._ids[cut:])
            if head + tail == text and len(head) <= self._shown:
                del self._ids[:cut]
                self._known = 0
                self._shown -= len(head)
                return


def _stable_length(text: str) -> int:
    """Characters of `text` that no further token can change."""
    end = len(text)
    while end > 0 and len(text) - end < _PROVISIONAL_MAX and text[end - 1] == _REPLACEMENT:
        end -= 1
    return end
