"""Everything that can move or make KV for one decode worker, and the prefill worker that computes for it or none. Pure."""

from collections.abc import Iterable

import msgspec

from common.routes import Source
from services.router.policy.rates import Pipe, Rates
from services.router.policy.view import ClusterView, DecodeView, PrefillView


class Moved(msgspec.Struct, frozen=True):
    """So much per path: blocks or bytes."""

    storage_to_decode: int = 0
    storage_to_prefill: int = 0
    decode_to_prefill: int = 0
    prefill_to_decode: int = 0

    def in_bytes(self, stored: int, raw: int) -> "Moved":
        """Of blocks: storage moves them as they are stored, workers move them as they compute with them."""
        return Moved(
            self.storage_to_decode * stored, self.storage_to_prefill * stored,
            self.decode_to_prefill * raw, self.prefill_to_decode * raw,
        )  # fmt: skip


class Paths(msgspec.Struct, frozen=True):
    """Links in blocks a second, compute in tokens a second. Without prefill, what it would take part in is None."""

    compute: Pipe
    decode_storage: Pipe
    prefill_storage: Pipe | None = None
    peer_read: Pipe | None = None
    peer_write: Pipe | None = None

    @classmethod
    def of(
        cls, rates: Rates, view: ClusterView, decode: DecodeView, prefill: PrefillView | None, tokens: int, bold: bool
    ) -> "Paths":
        """`tokens`: of the run that is to be computed."""
        stored, raw = max(1, view.stored_bytes_per_block), max(1, view.bytes_per_block)
        if prefill is None:
            return cls(rates.compute(decode, tokens), rates.storage(decode, bold).in_units_of(stored))
        return cls(
            rates.compute(prefill, tokens),
            rates.storage(decode, bold).in_units_of(stored),
            rates.storage(prefill, bold).in_units_of(stored),
            rates.peer_read(decode, prefill, bold).in_units_of(raw),
            rates.peer_write(decode, prefill, bold).in_units_of(raw),
        )

    def storage(self, source: Source) -> Pipe:
        """The storage link that stored blocks come over."""
        if source is Source.STORAGE_TO_DECODE:
            return self.decode_storage
        assert self.prefill_storage is not None, "only prefill pulls over prefill's link"
        return self.prefill_storage

    def load(self, source: Source) -> Pipe:
        """The way of stored blocks to both workers: over a storage link, and on to the other."""
        onward = self.peer_read if source is Source.STORAGE_TO_DECODE else self.peer_write
        return self.storage(source).then(onward) if onward is not None else self.storage(source)

    def used(self, loads: Iterable[Source], held: bool) -> list[Pipe]:
        """All that a plan with these loads depends on. `held`: prefill reads what decode holds."""
        between = (self.peer_write, self.peer_read if held else None)
        return [*map(self.load, loads), self.compute, *(pipe for pipe in between if pipe is not None)]

    def queued(self, blocks: Moved, kept: int) -> Moved:
        """Of these blocks, what will wait at each link: all at a storage link; between workers, what one holds already (`kept`: of
        prefill's, for decode), and what storage brings faster than it goes on."""
        held = max(0, blocks.decode_to_prefill - blocks.storage_to_decode)
        return Moved(
            blocks.storage_to_decode,
            blocks.storage_to_prefill,
            held + round(blocks.storage_to_decode * _excess(self.decode_storage, self.peer_read)),
            kept + round((blocks.prefill_to_decode - kept) * _excess(self.prefill_storage, self.peer_write)),
        )

    def moving_s(self, blocks: Moved) -> float:
        """Seconds that moving these blocks keeps links busy, all added up."""
        pairs = (
            (self.decode_storage, blocks.storage_to_decode),
            (self.prefill_storage, blocks.storage_to_prefill),
            (self.peer_read, blocks.decode_to_prefill),
            (self.peer_write, blocks.prefill_to_decode),
        )
        return sum(pipe.over_s(amount) for pipe, amount in pairs if pipe is not None)


def _excess(before: Pipe | None, after: Pipe | None) -> float:
    """Of two pipes in a row, the share of what goes through that heaps up between them."""
    return max(0.0, 1.0 - after.per_s / before.per_s) if before is not None and after is not None else 0.0
