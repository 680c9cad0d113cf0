"""What a prefill worker knows of its speed before the first request."""

import pytest

from services.prefill.worker import PrefillKind
from services.worker.settings import WorkerSettings
from services.worker.stage import Stage
from tests.worker.conftest import Tiny


@pytest.mark.parametrize("slots", [1, 8])
def test_a_fresh_worker_knows_its_speed_and_holds_nothing(slots: int, llama: Tiny) -> None:
    stage = Stage(slots, llama.loaded.layout.bytes_per_block)
    engine = PrefillKind().engine(WorkerSettings(model="-"), llama.loaded, stage, 1024)
    load = engine.load
    assert load.prefill_tokens_per_s > 0 and load.waiting == load.running == load.queued_tokens == 0
    assert engine.idle and stage.slots_free == slots
    engine.check_integrity()
    stage.check_integrity()
