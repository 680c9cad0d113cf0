"""How large a stage is when nobody says: pure arithmetic on the machine and the model."""

from common.errors import SettingsError
from common.kv_layout import KvLayout

STAGE_SHARE, STAGE_BYTES_MAX = 40, 8 << 30  # of the machine's memory: it is touched at start
CONTEXTS_STAGED = 4
STAGE_SLOTS_MIN = 64


def stage_slots(layout: KvLayout, context_tokens: int, machine_bytes: int, asked_bytes: int, send_slots: int) -> int:
    """Slots of the stage, `send_slots` of which are set aside for what leaves."""
    context_blocks = _blocks(layout, context_tokens)
    if asked_bytes:
        slots = asked_bytes // layout.bytes_per_block
        if slots <= send_slots:
            least = (send_slots + 1) * layout.bytes_per_block
            raise SettingsError(f"stage_bytes = {asked_bytes}: holds {slots} slots; at least {least} bytes are needed")
        return slots
    fitting = min(machine_bytes // STAGE_SHARE, STAGE_BYTES_MAX) // layout.bytes_per_block
    wanted = min(fitting, CONTEXTS_STAGED * context_blocks)
    return send_slots + max(context_blocks, STAGE_SLOTS_MIN, wanted)


def _blocks(layout: KvLayout, tokens: int) -> int:
    return -(-tokens // layout.block_tokens)
