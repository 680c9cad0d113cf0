"""Every family gives the tokens and log-probabilities of `transformers.generate`, whatever the engine does inside."""

import pytest

from tests.families import FAMILIES, VOCAB_SIZE
from tests.worker.conftest import make_prompt
from tests.worker.engine.drive import exported_kv, greedy, make_engine, new, run, run_one

LOGPROB_TOLERANCE = 1e-4
# One family for every combination of window, soft cap and sinks that attention knows.
DISTINCT_ATTENTION = ("llama", "qwen2_window", "gemma2", "gemma3", "gpt_oss")


def assert_same(outcome, expected) -> None:
    tokens, logprobs = expected
    assert outcome.ids == tokens
    for position, token in enumerate(outcome.tokens):
        row = logprobs[position]
        assert token.logprob == pytest.approx(row[token.id].item(), abs=LOGPROB_TOLERANCE)
        for alternative, value in token.top:
            assert value == pytest.approx(row[alternative].item(), abs=LOGPROB_TOLERANCE)
        assert sorted(row.topk(len(token.top)).values.tolist()) == pytest.approx(
            sorted(value for _, value in token.top), abs=LOGPROB_TOLERANCE
        )


@pytest.mark.parametrize(
    ("family", "kernels"), [*((family, "kernels") for family in FAMILIES), *((family, "torch") for family in DISTINCT_ATTENTION)]
)
def test_family_gives_the_oracles_tokens_and_logprobs_alone_in_chunks_and_in_a_batch(family, kernels, tiny) -> None:
    model = tiny(family)
    loaded = model.loaded if kernels == "kernels" else model.torch_only
    prompts = {str(length): make_prompt(length, seed=3) for length in (1, 15, 16, 17, 40, 70)}
    engine = make_engine(loaded, step_tokens_max=23)
    sampling = greedy(20, logprobs=3)
    outcomes = run(engine, [new(name, prompt, sampling) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        assert_same(outcomes[name], model.generate(prompt, 20))
    alone = run_one(make_engine(loaded), prompts["70"], sampling)
    assert_same(alone, model.generate(prompts["70"], 20))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("step_tokens_max", [16, 17, 31, 48])
def test_chunk_size_changes_nothing(family, step_tokens_max, tiny) -> None:
    model, prompt = tiny(family), make_prompt(101)
    outcome = run_one(make_engine(model.loaded, step_tokens_max=step_tokens_max), prompt, greedy(12, logprobs=1))
    assert_same(outcome, model.generate(prompt, 12))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_sixteen_sequences_in_a_pool_for_five_are_preempted_and_still_right(family, tiny) -> None:
    model = tiny(family)
    prompts = {f"s{index}": make_prompt(20 + 3 * index, seed=index) for index in range(16)}
    engine = make_engine(model.loaded, pool_blocks=24, step_tokens_max=64)
    outcomes = run(engine, [new(name, prompt, greedy(40, logprobs=0)) for name, prompt in prompts.items()])
    assert sum(outcome.preemptions for outcome in outcomes.values()) > 0
    assert engine.load.preemptions == sum(outcome.preemptions for outcome in outcomes.values())
    for name, prompt in prompts.items():
        assert_same(outcomes[name], model.generate(prompt, 40))
    assert engine.pool.allocator.free == 24


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loaded_prefix_of_any_length_around_a_block_border_changes_nothing(family, tiny) -> None:
    model, prompt = tiny(family), make_prompt(53)
    source = make_engine(model.loaded)
    run(source, [new("kept", prompt, greedy(1), hold=True)])
    engine = make_engine(model.loaded)
    for tokens in [*range(14, 19), *range(30, 35), 47, 48, 49, 52]:
        copied: list[int] = []
        kv = exported_kv(source, "kept", tokens, copied)
        outcome = run_one(engine, prompt, greedy(10, logprobs=2), kv=kv)
        assert_same(outcome, model.generate(prompt, 10))
        assert copied == [1]
        assert outcome.steps[0].computed == 53


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "gpt_oss", "phi3"])
@pytest.mark.parametrize("length", [31, 32, 33, 40])
def test_prefill_hands_its_kv_and_first_token_to_another_engine(family, length, tiny) -> None:
    model, prompt = tiny(family), make_prompt(length)
    prefill, decode = make_engine(model.loaded), make_engine(model.loaded)
    first = run(prefill, [new("p", prompt, greedy(1, logprobs=1), hold=True)])["p"]
    assert len(first.tokens) == 1
    kv = exported_kv(prefill, "p", length)
    prefill.release("p")
    prefill.check_integrity()
    rest = run_one(decode, prompt, greedy(30, logprobs=1), kv=kv, output=first.ids)
    rest.tokens = first.tokens + rest.tokens
    assert_same(rest, model.generate(prompt, 30))
    assert rest.steps[0].computed == length + 1


def test_a_moved_sequence_continues_from_prompt_and_output_without_any_kv(llama) -> None:
    prompt = make_prompt(37)
    expected = llama.generate(prompt, 24)
    rest = run_one(make_engine(llama.loaded), prompt, greedy(24), output=expected[0][:9])
    assert expected[0][:9] + rest.ids == expected[0]


def test_generation_ends_at_the_contexts_end(tiny) -> None:
    model, prompt = tiny("llama"), make_prompt(40)
    engine = make_engine(model.loaded, pool_blocks=3)
    assert engine.context_tokens == 48
    outcome = run_one(engine, prompt, greedy(500, ignore_eos=True))
    assert (len(outcome.tokens), outcome.finish) == (8, "length")


def test_kernels_and_torch_make_kv_that_the_other_can_use(tiny) -> None:
    model, prompt = tiny("gemma2"), make_prompt(45)
    expected = model.generate(prompt, 20)
    for maker, user in ((model.loaded, model.torch_only), (model.torch_only, model.loaded)):
        prefill, decode = make_engine(maker), make_engine(user)
        run(prefill, [new("p", prompt, greedy(1), hold=True)])
        assert_same(run_one(decode, prompt, greedy(20, logprobs=1), kv=exported_kv(prefill, "p", 44)), expected)


def test_vocabulary_covers_every_generated_token(llama) -> None:
    assert max(llama.generate(make_prompt(40), 20)[0]) < VOCAB_SIZE
