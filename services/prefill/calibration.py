"""How fast a prefill engine is, measured before anybody waits for it: the router needs to know what computing costs before it routes to it."""

import time

from common.generation import FinishReason, Sampling
from services.prefill.engine import NewRun, PrefillEngine
from services.prefill.quota import QUOTA_S
from services.worker.engine.allocator import blocks_for
from services.worker.ledger import Ledger
from services.worker.stage import Stage

GROWTH = 4  # from one prompt's length to the next


def calibrate(engine: PrefillEngine, stage: Stage) -> None:
    """Computes made-up prompts of one block and up, as long as a step takes less than the quota: each twice, because at first kernels are
    chosen and memory is touched, then all once more, which counts. The engine must be idle, its thread not yet running."""
    longest = min(engine.step_tokens_max, engine.context_tokens - 1, stage.slots_free * engine.block_tokens)
    sizes = []
    size, took_s = min(engine.block_tokens, longest), 0.0
    while size <= longest and took_s * GROWTH < QUOTA_S:
        _computed_s(engine, stage, size)
        took_s = _computed_s(engine, stage, size)
        sizes.append(size)
        size *= GROWTH
    engine.forget_speed()
    for size in sizes:
        _computed_s(engine, stage, size)


def _computed_s(engine: PrefillEngine, stage: Stage, tokens: int) -> float:
    slots = stage.reserve(blocks_for(tokens, engine.block_tokens))
    prompt = [position % engine.model.vocab_size for position in range(tokens)]
    began = time.perf_counter()
    try:
        ledger = Ledger(len(slots), engine.model.layout.layers, ())
        engine.add(NewRun("calibration", prompt, Sampling(max_tokens=1, temperature=0.0), slots=slots, ledger=ledger))
        while not engine.idle:
            for step in engine.step().sequences:
                if step.finish is FinishReason.ERROR and step.error is not None:
                    raise step.error
    finally:
        stage.free(slots)
    return time.perf_counter() - began
