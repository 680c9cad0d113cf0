"""What a decode worker knows of its speed before the first request."""

from services.decode.worker import calibrated
from tests.worker.conftest import Tiny
from tests.worker.engine.drive import make_engine


def test_a_fresh_engine_knows_its_speed_and_keeps_nothing(llama: Tiny) -> None:
    engine = make_engine(llama.loaded, pool_blocks=8)
    free = engine.load.pool_blocks_free
    assert engine.load.prefill_tokens_per_s == 0
    calibrated(engine, 100)
    load = engine.load
    assert load.prefill_tokens_per_s > 0 and (load.running, load.waiting, load.tokens) == (0, 0, 0)
    assert load.pool_blocks_free == free and load.pool_blocks_named == 0 and engine.idle
    engine.check_integrity()
