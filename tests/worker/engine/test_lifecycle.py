"""How sequences start, stop, are cancelled, refused and fail, and that nothing is left of them."""

import pytest
import torch

from common.errors import ContextExceeded, Internal, InvalidRequest, NotFound, Overloaded
from common.generation import Sampling
from services.worker.engine.types import LoadedKv, Phase
from tests.families import EOS
from tests.worker.conftest import make_prompt
from tests.worker.engine.drive import exported_kv, greedy, make_engine, new, run, run_one


def first_repeat_free(ids: list[int]) -> int:
    """An index past 2 of a token that did not occur before."""
    return next(index for index in range(2, len(ids)) if ids[index] not in ids[:index])


def test_a_stop_token_ends_the_sequence_and_is_its_last_token(llama) -> None:
    expected = llama.generate(make_prompt(20), 20)[0]
    at = first_repeat_free(expected)
    outcome = run_one(make_engine(llama.loaded), make_prompt(20), greedy(20, stop_token_ids=(expected[at],)))
    assert (outcome.ids, outcome.finish, outcome.stop_token) == (expected[: at + 1], "stop", expected[at])


def test_eos_ends_the_sequence_unless_it_is_ignored(llama) -> None:
    expected = llama.generate(make_prompt(20), 20)[0]
    at = first_repeat_free(expected)
    eos = (expected[at],)
    engine = make_engine(llama.loaded)
    ended = run_one(engine, make_prompt(20), greedy(20, eos_token_ids=eos))
    assert (ended.ids, ended.finish) == (expected[: at + 1], "stop")
    ignored = run_one(engine, make_prompt(20), greedy(20, eos_token_ids=eos, ignore_eos=True))
    assert (ignored.ids, ignored.finish, ignored.stop_token) == (expected, "length", None)


def test_min_tokens_puts_the_end_off(llama) -> None:
    expected = llama.generate(make_prompt(20), 20)[0]
    at = first_repeat_free(expected)
    outcome = run_one(make_engine(llama.loaded), make_prompt(20), greedy(20, eos_token_ids=(expected[at],), min_tokens=15))
    assert outcome.ids[:at] == expected[:at]
    assert expected[at] not in outcome.ids[:15] and len(outcome.ids) >= 15


def test_max_tokens_counts_tokens_generated_elsewhere(llama) -> None:
    outcome = run_one(make_engine(llama.loaded), make_prompt(20), greedy(6, ignore_eos=True), output=[9, 9, 9, 9])
    assert (len(outcome.ids), outcome.finish) == (2, "length")


def test_each_step_says_how_many_tokens_are_computed_and_when_the_sequence_started(llama) -> None:
    outcome = run_one(make_engine(llama.loaded, step_tokens_max=16), make_prompt(40), greedy(3, ignore_eos=True))
    assert [step.computed for step in outcome.steps] == [16, 32, 40, 41, 42]
    assert [step.started_at is not None for step in outcome.steps] == [True, False, False, False, False]
    assert [len(step.tokens) for step in outcome.steps] == [0, 0, 1, 1, 1]


def test_decoding_goes_on_while_a_long_prompt_is_computed_in_chunks(llama) -> None:
    engine = make_engine(llama.loaded, step_tokens_max=16)
    engine.add(new("short", make_prompt(5), greedy(20, ignore_eos=True)))
    engine.step()
    engine.add(new("long", make_prompt(90), greedy(2)))
    result = engine.step()
    assert {step.id: (len(step.tokens), step.computed) for step in result.sequences} == {"short": (1, 6), "long": (0, 15)}
    run(engine)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_cancel_in_any_phase_frees_everything_and_disturbs_nobody(steps: int, llama) -> None:
    phases = {0: Phase.WAITING, 1: Phase.PREFILLING, 2: Phase.PREFILLING, 4: Phase.DECODING}
    engine = make_engine(llama.loaded, step_tokens_max=24)
    engine.add(new("gone", make_prompt(50), greedy(30, ignore_eos=True), hold=True))
    engine.add(new("other", make_prompt(21), greedy(15)))
    for _ in range(steps):
        engine.step()
    assert engine._live["gone"].phase is phases[steps]
    engine.cancel("gone")
    engine.check_integrity()
    outcomes = run(engine)
    assert outcomes["gone"].finish == "cancelled" and not outcomes["gone"].tokens
    assert engine.pool.allocator.free == engine.pool.allocator.total
    whole = outcomes["other"].ids
    assert whole == llama.generate(make_prompt(21), 15)[0][-len(whole) :]


def test_cancel_of_an_unknown_or_held_sequence_is_harmless(llama) -> None:
    engine = make_engine(llama.loaded)
    engine.cancel("nobody")
    run(engine, [new("held", make_prompt(20), greedy(2), hold=True)])
    assert engine.idle and engine.pool.allocator.free < engine.pool.allocator.total
    engine.cancel("held")
    engine.release("held")
    engine.check_integrity()
    assert engine.idle and engine.pool.allocator.free == engine.pool.allocator.total


def test_a_held_sequence_keeps_its_blocks_until_it_is_released(llama) -> None:
    engine = make_engine(llama.loaded)
    run(engine, [new("held", make_prompt(33), greedy(1), hold=True)])
    record = [memoryview(bytearray(engine.layout.bytes_per_block))]
    engine.export("held", 2, 3, record)
    with pytest.raises(NotFound, match="3 computed blocks"):
        engine.export("held", 0, 4, record * 4)
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add(new("held", [1], greedy(1)))
    engine.release("held")
    engine.check_integrity()
    with pytest.raises(NotFound, match="not held"):
        engine.export("held", 0, 1, record)


def test_an_exported_partial_block_ends_in_zeros_not_in_somebody_elses_kv(llama) -> None:
    engine = make_engine(llama.loaded, pool_blocks=2)
    run_one(engine, make_prompt(31, seed=1), greedy(1))
    run(engine, [new("held", make_prompt(18), greedy(1), hold=True)])
    records = [memoryview(bytearray(b"\xff" * engine.layout.bytes_per_block)) for _ in range(2)]
    engine.export("held", 0, 2, records)
    layout = engine.layout
    shape = (layout.layers, 2, layout.block_tokens, layout.kv_heads * layout.head_dim)
    last = torch.frombuffer(bytearray(records[1]), dtype=torch.float32).view(shape)
    assert last[:, :, :2].abs().amin(dim=(0, 1, 3)).gt(0).all() and not last[:, :, 2:].any()


def test_a_pool_full_of_held_blocks_makes_others_wait_not_fail(llama) -> None:
    engine = make_engine(llama.loaded, pool_blocks=4)
    run(engine, [new("held", make_prompt(40), greedy(1), hold=True)])
    engine.add(new("waits", make_prompt(30), greedy(5)))
    assert engine.step().sequences == () and engine.blocked and not engine.idle
    engine.release("held")
    assert run(engine)["waits"].ids == llama.generate(make_prompt(30), 5)[0]


def test_a_decode_without_room_waits_for_held_blocks(llama) -> None:
    engine = make_engine(llama.loaded, pool_blocks=4)
    engine.add(new("held", make_prompt(30), greedy(1), hold=True))
    engine.add(new("grows", make_prompt(15), greedy(20)))
    while not engine.blocked:
        engine.step()
        engine.check_integrity()
        if "more" not in engine._held and "more" not in engine._live:
            engine.add(new("more", make_prompt(15), greedy(1), hold=True))
    engine.release("held")
    outcome = run(engine)["grows"]
    assert outcome.ids == llama.generate(make_prompt(15), 20)[0][-len(outcome.ids) :]
    engine.release("more")
    assert engine.pool.allocator.free == 4


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt": []}, InvalidRequest, "empty"),
        ({"prompt": [5] * 64}, ContextExceeded, "64 tokens"),
        ({"prompt": [5] * 60, "output": [5] * 4}, ContextExceeded, "at most 63"),
        ({"prompt": [5, 304]}, InvalidRequest, "token id 304"),
        ({"prompt": [5, -1]}, InvalidRequest, "token id -1"),
        ({"output": [999]}, InvalidRequest, "token id 999"),
        ({"output": [5] * 8}, InvalidRequest, "max_tokens = 8"),
    ],
)
def test_what_can_never_run_is_refused_by_name(changes, error, words, llama) -> None:
    engine = make_engine(llama.loaded, pool_blocks=4)
    assert engine.context_tokens == 64
    copied: list[int] = []
    kv = LoadedKv(0, [], lambda: copied.append(1))
    with pytest.raises(error, match=words):
        engine.add(new("bad", **({"prompt": [5, 6], "sampling": greedy(8), "kv": kv} | changes)))
    assert engine.idle and copied == [1]


@pytest.mark.parametrize(("tokens", "buffers", "size"), [(20, 2, 0), (16, 2, 1), (17, 1, 1), (16, 1, 2)])
def test_kv_that_does_not_fit_the_prompt_or_the_layout_is_refused(tokens: int, buffers: int, size: int, llama) -> None:
    engine = make_engine(llama.loaded)
    copied: list[int] = []
    views = [memoryview(bytearray(size * engine.layout.bytes_per_block)) for _ in range(buffers)]
    with pytest.raises(InvalidRequest, match="KV of"):
        engine.add(new("bad", make_prompt(20), greedy(8), kv=LoadedKv(tokens, views, lambda: copied.append(1))))
    assert copied == [1]


def test_a_full_queue_refuses_at_once(llama) -> None:
    engine = make_engine(llama.loaded, sequences_max=2, waiting_max=1)
    for index in range(3):
        engine.add(new(f"s{index}", make_prompt(5), greedy(2)))
    with pytest.raises(Overloaded, match="at most 2 and 1 may") as caught:
        engine.add(new("s3", make_prompt(5), greedy(2)))
    assert caught.value.retry_after_s
    assert {outcome.finish for outcome in run(engine).values()} == {"length"}


def test_loaded_kv_is_given_back_once_when_its_sequence_is_cancelled_before_admission(llama) -> None:
    source = make_engine(llama.loaded)
    run(source, [new("kept", make_prompt(20), greedy(1), hold=True)])
    engine = make_engine(llama.loaded)
    copied: list[int] = []
    engine.add(new("gone", make_prompt(20), greedy(5), kv=exported_kv(source, "kept", 16, copied)))
    engine.cancel("gone")
    run(engine)
    assert copied == [1]
    engine.add(new("stays", make_prompt(20), greedy(5), kv=exported_kv(source, "kept", 16, copied)))
    assert [step.finish for step in engine.close(Internal("over"))] == ["error"]
    assert copied == [1, 1]


class Poison(torch.nn.Module):
    """Adds NaN to the embedding of one token."""

    def __init__(self, inner: torch.nn.Module, token: int) -> None:
        super().__init__()
        self.inner, self.token = inner, token

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.where((ids == self.token)[..., None], float("nan"), self.inner(ids))


@pytest.fixture
def embeddings(llama):
    """Replaces the model's embedding for one test."""
    base = llama.loaded.model.model
    inner = base.embed_tokens
    yield lambda wrap: setattr(base, "embed_tokens", wrap(inner))
    base.embed_tokens = inner


def test_logits_that_are_not_finite_end_one_sequence_and_no_other_now_or_later(llama, embeddings) -> None:
    clean = [token for token in make_prompt(40) if token != 300]
    expected = llama.generate(clean, 12)[0]
    embeddings(lambda inner: Poison(inner, 300))
    engine = make_engine(llama.loaded, pool_blocks=8)
    outcomes = run(engine, [new("bad", [*make_prompt(30), 300, 9], greedy(12)), new("good", clean, greedy(12))])
    assert outcomes["bad"].finish == "error" and isinstance(outcomes["bad"].error, Internal)
    assert "not finite" in str(outcomes["bad"].error)
    assert outcomes["good"].ids == expected
    # Recycled blocks carry no NaN into their next sequence.
    assert run_one(engine, clean, greedy(12)).ids == expected
    assert engine.pool.tensor.isfinite().all()


class Explodes(torch.nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of luck")


def test_an_exception_in_the_model_ends_the_batch_and_spares_the_queue_and_the_pool(llama, embeddings) -> None:
    engine = make_engine(llama.loaded, sequences_max=2)
    for index in range(3):
        engine.add(new(f"s{index}", make_prompt(20), greedy(4)))
    embeddings(lambda inner: Explodes())
    failed = {step.id: step for step in engine.step().sequences}
    assert set(failed) == {"s0", "s1"}
    assert all(step.finish == "error" and "out of luck" in str(step.error) for step in failed.values())
    engine.check_integrity()
    embeddings(lambda inner: inner)
    assert run(engine)["s2"].ids == llama.generate(make_prompt(20), 4)[0]
    assert engine.pool.allocator.free == engine.pool.allocator.total


def test_load_counts_what_runs_waits_and_is_free(llama) -> None:
    engine = make_engine(llama.loaded, pool_blocks=10, sequences_max=2)
    for index in range(3):
        engine.add(new(f"s{index}", make_prompt(20), Sampling(5, eos_token_ids=(EOS,), ignore_eos=True)))
    load = engine.step().load
    assert (load.running, load.waiting, load.pool_blocks_free, load.pool_blocks_total, load.tokens) == (2, 1, 6, 10, 62)
    assert load.prefill_tokens_per_s > 0
    run(engine)
    assert engine.load.pool_blocks_free == 10
