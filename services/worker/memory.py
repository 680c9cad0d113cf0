"""How large a stage is when nobody says: pure arithmetic on the machine and the model."""

from typing import NamedTuple

from common.errors import SettingsError
from common.kv_layout import KvLayout

STAGE_SLOTS_MIN = 64


class StageSize(NamedTuple):
    """What a stage is for, at most: so many contexts, one part in `share` of the machine's memory (it is touched at start)."""

    contexts: int
    share: int
    bytes_max: int


BESIDE_A_POOL = StageSize(contexts=4, share=40, bytes_max=8 << 30)
INSTEAD_OF_A_POOL = StageSize(contexts=16, share=16, bytes_max=32 << 30)


def stage_slots(
    layout: KvLayout, context_tokens: int, machine_bytes: int, asked_bytes: int, send_slots: int, size: StageSize
) -> int:
    """Slots of the stage, `send_slots` of which are set aside for what leaves."""
    context_blocks = _blocks(layout, context_tokens)
    if asked_bytes:
        slots = asked_bytes // layout.bytes_per_block
        if slots <= send_slots:
            least = (send_slots + 1) * layout.bytes_per_block
            raise SettingsError(f"stage_bytes = {asked_bytes}: holds {slots} slots; at least {least} bytes are needed")
        return slots
    fitting = min(machine_bytes // size.share, size.bytes_max) // layout.bytes_per_block
    wanted = min(fitting, size.contexts * context_blocks)
    return send_slots + max(context_blocks, STAGE_SLOTS_MIN, wanted)


def _blocks(layout: KvLayout, tokens: int) -> int:
    return -(-tokens // layout.block_tokens)
