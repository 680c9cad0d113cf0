"""Sampling agrees with `transformers`' logits processors, and a token depends on seed and position alone."""

import math
import random

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.generation import Sampling
from services.worker.engine.sampling import sample
from services.worker.engine.sequence import Sequence
from services.worker.engine.types import NewSequence
from services.worker.engine.uniform import splitmix64, uniform
from tests.worker.conftest import make_prompt
from tests.worker.engine.drive import greedy, make_engine, new, run, run_one

VOCAB = 50


def sequence(sampling: Sampling, prompt: list[int] | None = None, output: list[int] | None = None) -> Sequence:
    return Sequence(NewSequence("s", prompt or [1, 2, 3], sampling, output or []), 0)


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def pick(logits: torch.Tensor, sampling: Sampling, **tokens: list[int]) -> int:
    [sampled] = sample(logits, [sequence(sampling, **tokens)])
    assert sampled.token is not None
    return sampled.token.id


def test_splitmix64_gives_its_published_outputs() -> None:
    # Reference implementation by Sebastiano Vigna, as published with seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [splitmix64(1234567, n) for n in range(5)] == published
    assert splitmix64(0, 0) == 0xE220A8397B1DCDAF


def test_uniform_is_fixed_for_ever_and_spreads_evenly() -> None:
    assert uniform(0, 0) == 0.6524484863740322
    values = [uniform(seed, position) for seed in range(40) for position in range(100)]
    assert len(set(values)) == len(values) and all(0 <= value < 1 for value in values)
    for tenth in range(10):
        assert sum(tenth <= value * 10 < tenth + 1 for value in values) == pytest.approx(400, abs=80)
    assert uniform((1 << 64) + 5, 3) == uniform(5, 3)


def test_greedy_takes_the_first_of_equals_and_ignores_the_seed() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 9, 30]] = 1.0
    assert {pick(logits, Sampling(4, temperature=0, seed=seed)) for seed in range(5)} == {7}


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("frequency", [-0.5, 0.0, 0.8])
@pytest.mark.parametrize("presence", [0.0, 1.1])
def test_penalties_are_those_of_transformers_and_openai(penalty: float, frequency: float, presence: float) -> None:
    logits, prompt, output = random_logits(1, seed=4), [3, 3, 8, 40], [5, 8, 5, 5, 11]
    expected = logits.clone()
    if penalty != 1.0:
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), expected)
    for token in set(output):
        expected[0, token] -= frequency * output.count(token) + presence
    settings = Sampling(
        99, temperature=0, repetition_penalty=penalty, frequency_penalty=frequency, presence_penalty=presence, logprobs=0
    )
    moving = sequence(settings, prompt)
    for upto in range(len(output) + 1):  # token by token, as the engine does it
        moving.tokens = prompt + output[:upto]
        [sampled] = sample(logits, [moving])
    assert sampled.token is not None
    assert sampled.token.id == expected.argmax().item() == pick(logits, settings, prompt=prompt, output=output)
    assert sampled.token.logprob == pytest.approx(logits.log_softmax(-1)[0, sampled.token.id].item(), abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_filters_keep_the_distribution_of_transformers_warpers(seed: int) -> None:
    chance = random.Random(seed)
    logits = random_logits(1, seed)
    temperature, top_k, top_p, min_p = (
        chance.uniform(0.4, 2),
        chance.choice([0, 1, 5, 20]),
        chance.choice([1.0, 0.3, 0.8, 0.95]),
        chance.choice([0.0, 0.02, 0.2]),
    )
    warped = TemperatureLogitsWarper(temperature)(torch.tensor([[0]]), logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(torch.tensor([[0]]), warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(torch.tensor([[0]]), warped)
    if min_p:
        warped = MinPLogitsWarper(min_p)(torch.tensor([[0]]), warped)
    expected = warped.softmax(-1)[0]
    draws = 4000
    rows = [sequence(Sampling(9, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=n)) for n in range(draws)]
    counts = torch.zeros(VOCAB)
    for sampled in sample(logits.expand(draws, -1), rows):
        assert sampled.token is not None
        counts[sampled.token.id] += 1
    assert not counts[expected == 0].any()
    deviation = 5 * (expected * (1 - expected) / draws).sqrt() + 1e-3
    assert ((counts / draws - expected).abs() < deviation).all()


def test_top_p_looks_beyond_the_sorted_head_where_it_must() -> None:
    logits = torch.zeros(1, 5000)  # flat: 90 % of the mass is 4500 tokens
    logits[0, 4000:] = 0.5
    chosen = {pick(logits, Sampling(9, top_p=0.9, seed=seed)) for seed in range(400)}
    assert min(chosen) < 1000 and max(chosen) > 4500


def test_a_draw_is_the_inverse_of_the_cumulative_distribution_in_vocabulary_order() -> None:
    probabilities = torch.tensor([[0.1, 0.0, 0.4, 0.3, 0.2]])
    for seed in range(50):
        u = uniform(seed, 3)
        expected = next(i for i, total in enumerate([0.1, 0.1, 0.5, 0.8, 1.0]) if u < total)
        assert pick(probabilities.log().clamp(min=-1e30), Sampling(9, seed=seed)) == expected


@pytest.mark.parametrize("temperature", [1e-6, 1e-2, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = random_logits(1) * 1000
    chosen = pick(logits, Sampling(9, temperature=temperature))
    assert 0 <= chosen < VOCAB
    if temperature < 1:
        assert chosen == logits.argmax()


def test_top_k_and_logprobs_may_exceed_the_vocabulary() -> None:
    [sampled] = sample(random_logits(1, vocab=8), [sequence(Sampling(9, top_k=5000, logprobs=20))])
    assert sampled.token is not None and len(sampled.token.top) == 8
    assert sum(math.exp(value) for _, value in sampled.token.top) == pytest.approx(1.0, abs=1e-5)


def test_rows_that_are_not_finite_give_no_token_and_leave_the_others_alone() -> None:
    logits = random_logits(4)
    logits[1, 3] = float("nan")
    logits[2, 5] = float("inf")
    for temperature in (0.0, 1.0):
        for penalty in (1.0, 1.5):
            settings = Sampling(9, temperature=temperature, top_p=0.9, repetition_penalty=penalty, logprobs=2)
            sampled = sample(logits, [sequence(settings) for _ in range(4)])
            assert [row.token is None for row in sampled] == [False, True, True, False]
            assert sampled[0].token == sample(logits[:1], [sequence(settings)])[0].token


def test_min_tokens_masks_every_token_that_would_end_the_sequence() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8], logits[0, 9] = 5, 4, 3
    settings = {"temperature": 0.0, "stop_token_ids": (7,), "eos_token_ids": (8,), "min_tokens": 2}
    assert pick(logits, Sampling(9, **settings), output=[30]) == 9
    assert pick(logits, Sampling(9, **settings), output=[30, 30]) == 7
    assert pick(logits, Sampling(9, **settings, ignore_eos=True), output=[30]) == 8


def test_mixed_rows_are_each_sampled_as_if_alone() -> None:
    settings = [
        Sampling(9, temperature=0),
        Sampling(9, seed=1),
        Sampling(9, seed=2, top_k=3, logprobs=2),
        Sampling(9, temperature=0, repetition_penalty=2.0, logprobs=0),
        Sampling(9, seed=3, top_p=0.5, min_p=0.1, presence_penalty=0.5, min_tokens=5, eos_token_ids=(4,)),
    ]
    logits = random_logits(5, seed=9)
    together = sample(logits, [sequence(each, output=[4, 4]) for each in settings])
    for row, each in enumerate(settings):
        [alone] = sample(logits[row : row + 1], [sequence(each, output=[4, 4])])
        assert (alone.token is not None) and together[row].token is not None
        assert alone.token.id == together[row].token.id
        assert alone.token.logprob == pytest.approx(together[row].token.logprob)
        assert [token for token, _ in alone.token.top] == [token for token, _ in together[row].token.top]


SEEDED = Sampling(30, temperature=1.0, top_p=0.95, seed=77, eos_token_ids=(2,))


def test_seeded_output_is_the_same_in_any_company_with_and_without_preemption(llama) -> None:
    prompt = make_prompt(33)
    alone = run_one(make_engine(llama.loaded), prompt, SEEDED)
    others = [new(f"other{n}", make_prompt(20 + n, seed=n), Sampling(50, seed=n)) for n in range(9)]
    crowd = run(make_engine(llama.loaded, step_tokens_max=19), [*others, new("it", prompt, SEEDED)])
    cramped = run(make_engine(llama.loaded, pool_blocks=14), [*others, new("it", prompt, SEEDED)])
    assert cramped["it"].preemptions > 0
    assert alone.ids == crowd["it"].ids == cramped["it"].ids
    assert alone.ids != run_one(make_engine(llama.loaded), prompt, Sampling(30, seed=78, top_p=0.95)).ids


@pytest.mark.parametrize("moved_after", [1, 7, 20])
def test_seeded_output_continues_unchanged_on_another_engine(moved_after: int, llama) -> None:
    prompt = make_prompt(33)
    penalised = Sampling(30, seed=5, repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=12, eos_token_ids=(2,))
    whole = run_one(make_engine(llama.loaded), prompt, penalised)
    rest = run_one(make_engine(llama.loaded), prompt, penalised, output=whole.ids[:moved_after])
    assert whole.ids == whole.ids[:moved_after] + rest.ids


def test_repetition_penalty_through_the_engine_is_that_of_generate(llama) -> None:
    prompt = make_prompt(25)
    ids = torch.tensor([prompt])
    out = llama.oracle.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, repetition_penalty=1.4
    )
    assert run_one(make_engine(llama.loaded), prompt, greedy(20, repetition_penalty=1.4)).ids == out[0, 25:].tolist()
