"""What a prefill worker knows of its speed before the first request."""

from services.prefill.engine import PrefillEngine
from services.prefill.layerwise import InPlace
from services.prefill.worker import calibrated
from services.worker.stage import Stage
from tests.worker.conftest import Tiny


def test_a_fresh_engine_knows_its_speed_and_holds_nothing(llama: Tiny) -> None:
    stage = Stage(8, llama.loaded.layout.bytes_per_block)
    engine = PrefillEngine(llama.loaded, InPlace(stage, llama.loaded), context_tokens=1024, step_tokens_max=256)
    assert engine.load.prefill_tokens_per_s == 0
    calibrated(engine, stage)
    assert engine.load.prefill_tokens_per_s > 0 and engine.load.waiting == engine.load.running == 0
    assert engine.idle and stage.slots_free == 8
    engine.check_integrity()
    stage.check_integrity()


def test_a_stage_of_one_slot_is_enough(llama: Tiny) -> None:
    stage = Stage(1, llama.loaded.layout.bytes_per_block)
    engine = PrefillEngine(llama.loaded, InPlace(stage, llama.loaded), context_tokens=16)
    calibrated(engine, stage)
    assert engine.load.prefill_tokens_per_s > 0
