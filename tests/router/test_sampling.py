"""Sampling parameters: a table of what is refused and how, and where defaults come from."""

import math
from typing import Any

import pytest

from common.errors import ContextExceeded, InvalidRequest
from services.router.model import GenerationDefaults
from services.router.sampling import Asked, Limits, check_token_ids, choices, resolve

LIMITS = Limits(context_tokens=100, vocab_size=400, max_tokens_default=16)
SILENT = GenerationDefaults(eos_token_ids=(0,))

REFUSED = [
    ("temperature", -0.1, "temperature = -0.1: expected a number from 0 to 100"),
    ("temperature", math.nan, "temperature = nan: expected a number from 0 to 100"),
    ("temperature", math.inf, "temperature = inf: expected a number from 0 to 100"),
    ("top_p", 0.0, "top_p = 0.0: expected a number above 0 up to 1"),
    ("top_p", 1.5, "top_p = 1.5: expected a number above 0 up to 1"),
    ("top_k", -2, "top_k = -2: expected a number from -1 to 2147483648"),
    ("min_p", -1.0, "min_p = -1.0: expected a number from 0 to 1"),
    ("min_p", math.nan, "min_p = nan: expected a number from 0 to 1"),
    ("repetition_penalty", 0.0, "repetition_penalty = 0.0: expected a number above 0 up to 100"),
    ("presence_penalty", 2.5, "presence_penalty = 2.5: expected a number from -2 to 2"),
    ("frequency_penalty", -math.inf, "frequency_penalty = -inf: expected a number from -2 to 2"),
    ("n", 0, "n = 0: expected a number from 1 to 16"),
    ("n", 17, "n = 17: expected a number from 1 to 16"),
    ("logprobs", 21, "logprobs = 21: expected a number from 0 to 20"),
    ("logprobs", -1, "logprobs = -1: expected a number from 0 to 20"),
    ("seed", 1 << 64, "seed = 18446744073709551616: expected a number from -9223372036854775808 to 18446744073709551615"),
    ("max_tokens", 0, "max_tokens = 0: expected at least 1"),
    ("max_tokens", -5, "max_tokens = -5: expected at least 1"),
    ("min_tokens", -1, "min_tokens = -1: expected a number from 0 to 2147483648"),
    ("min_tokens", 17, "min_tokens = 17: expected at most max_tokens, which is 16"),
    ("stop", ("a",) * 17, "stop = '17 strings': expected at most 16"),
    ("stop", ("",), "stop = '': expected strings of 1 to 1024 characters"),
    ("stop_token_ids", (400,), "stop_token_ids = 400: expected token ids from 0 to 399"),
    ("stop_token_ids", (-1,), "stop_token_ids = -1: expected token ids from 0 to 399"),
]


@pytest.mark.parametrize(("param", "value", "message"), REFUSED)
def test_a_refusal_names_parameter_value_and_what_is_accepted(param: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(Asked(**{param: value}), SILENT, 10, LIMITS, seed=1)
    assert caught.value.message == message
    assert caught.value.param == param


@pytest.mark.parametrize("huge", [91, 10**6, 10**30])
def test_max_tokens_beyond_the_context_says_all_lengths(huge: int) -> None:
    with pytest.raises(ContextExceeded) as caught:
        resolve(Asked(max_tokens=huge), SILENT, 10, LIMITS, seed=1)
    assert caught.value.message == (
        f"max_tokens = {huge}: the model's context is 100 tokens and the prompt has 10, so at most 90 can be generated"
    )


def test_a_prompt_that_fills_the_context_is_refused_with_both_lengths() -> None:
    with pytest.raises(ContextExceeded, match="the prompt has 100 tokens and the model's context is 100"):
        resolve(Asked(), SILENT, 100, LIMITS, seed=1)


def test_max_tokens_absent_takes_the_default_or_what_is_left_of_the_context() -> None:
    assert resolve(Asked(), SILENT, 10, LIMITS, 1).max_tokens == 16
    assert resolve(Asked(), SILENT, 95, LIMITS, 1).max_tokens == 5
    assert resolve(Asked(), SILENT, 10, Limits(100, 400, None), 1).max_tokens == 90


def test_generation_config_speaks_where_the_client_is_silent() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=40, repetition_penalty=1.1, eos_token_ids=(0, 7))
    silent = resolve(Asked(), defaults, 10, LIMITS, 1)
    assert (silent.temperature, silent.top_p, silent.top_k, silent.repetition_penalty) == (0.6, 0.9, 40, 1.1)
    assert silent.eos_token_ids == (0, 7)
    spoken = resolve(Asked(temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0), defaults, 10, LIMITS, 1)
    assert (spoken.temperature, spoken.top_p, spoken.top_k, spoken.repetition_penalty) == (0.0, 1.0, 0, 1.0)


def test_choices_have_seeds_of_their_own_that_follow_from_the_first() -> None:
    first = resolve(Asked(seed=7), SILENT, 10, LIMITS, 1)
    made = choices(first, 4)
    assert made[0].seed == 7
    assert len({sampling.seed for sampling in made}) == 4
    assert made == choices(first, 4)


def test_a_negative_seed_is_taken_as_its_64_bits() -> None:
    assert resolve(Asked(seed=-1), SILENT, 10, LIMITS, 1).seed == (1 << 64) - 1


def test_token_ids_are_checked_against_the_vocabulary() -> None:
    check_token_ids("prompt", [0, 399], 400)
    with pytest.raises(InvalidRequest, match="prompt = 400: expected token ids from 0 to 399"):
        check_token_ids("prompt", [0, 400], 400)
