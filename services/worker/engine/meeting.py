"""KV that loads from a prompt's end while the engine computes from its front, until they meet (order MEET).

Life: a loader claims blocks from the end of what is stored, in the ledger both share; the engine claims from the front, a step's
worth at a time. Where the engine finds blocks that were loaded, they are copied into the pool; where it finds one that is still
coming, the sequence waits; one that failed it computes. It is over when the prompt's last token was computed, or when the
sequence loses its pool blocks: what it had is computed again then.

Invariant while it lasts: the sequence's `computed` is at a block border, or inside `[that border, claimed)`.
"""

from collections.abc import Callable, Sequence

from services.worker.ledger import Ledger


class Meeting:
    """Of one sequence; owned by the engine's thread, except for the ledger.

    Attributes:
        buffers: by block, where it is loaded to; blocks past them are computed.
    """

    def __init__(self, ledger: Ledger, buffers: Sequence[memoryview], block_tokens: int, on_over: Callable[[], None]) -> None:
        self.buffers = buffers
        self._ledger = ledger
        self._block_tokens = block_tokens
        self._on_over = on_over
        self._claimed = range(0)  # blocks that are being computed

    def claim(self, computed: int, tokens: int) -> int:
        """How many tokens from `computed` on may be computed now, at most `tokens`; claims further blocks when needed."""
        if computed >= self._claimed.stop * self._block_tokens:
            self._skip(computed // self._block_tokens)
            run = self._ledger.next_run()
            if run.start * self._block_tokens != computed:
                return 0
            count = self._ledger.take(run[: max(1, tokens // self._block_tokens)])
            self._claimed = run[:count]
        return min(tokens, self._claimed.stop * self._block_tokens - computed)

    def computed(self, tokens: int) -> None:
        """So many leading tokens are computed."""
        if self._claimed and tokens >= self._claimed.stop * self._block_tokens:
            self._ledger.computed(self._claimed)
            self._claimed = self._claimed[len(self._claimed) :]

    def loaded(self, computed: int) -> range:
        """Blocks from `computed` on that were loaded and are to be copied."""
        first, off_border = divmod(computed, self._block_tokens)
        return range(first, first if off_border else max(first, min(self._ledger.frontier, len(self.buffers))))

    def _skip(self, blocks: int) -> None:
        """Takes open blocks before `blocks` out of the ledger: they were resident."""
        while (run := self._ledger.next_run()) and run.start < blocks:
            run = run[: blocks - run.start]
            self._ledger.computed(run[: self._ledger.take(run)])

    def over(self) -> None:
        """The buffers are not needed any more."""
        self._ledger.close()
        self._on_over()
