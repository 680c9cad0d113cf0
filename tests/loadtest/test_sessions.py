"""What users say: sessions grow by appending, and never over the context, whatever the tokenizer."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.corpus import Corpus
from loadtest.sessions import FRAME_TOKENS, AgentRun, Budget, Conversation, Session

CORPUS = Corpus()
Make = Callable[[random.Random, Budget], Session]
TURNS_MAX = 8


def conversation(rng: random.Random, budget: Budget) -> Session:
    return Conversation(rng, CORPUS, budget)


def agent(rng: random.Random, budget: Budget) -> Session:
    return AgentRun(rng, CORPUS, budget, AgentRun.prefix(random.Random(1), CORPUS, budget))


def said(session: Session) -> str:
    fields = session.fields()
    return "".join(message["content"] for message in fields["messages"]) if "messages" in fields else fields["prompt"]


def frames(session: Session) -> int:
    return FRAME_TOKENS * len(session.fields().get("messages", "x"))


@pytest.mark.parametrize("make", [conversation, agent])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), context=st.sampled_from([1024, 4096, 8192]), per_character=st.floats(0.2, 1.0))
def test_a_session_ends_before_its_context_is_full(make: Make, seed: int, context: int, per_character: float) -> None:
    budget = Budget(context, 48, TURNS_MAX, per_character)
    session = make(random.Random(seed), budget)
    turns = 0
    while not session.over():
        session.grow()
        turns += 1
        prompt_tokens = int(len(said(session)) * per_character) + frames(session)
        assert prompt_tokens + budget.output_tokens <= context
        session.hear("\ufffd" * budget.output_tokens, prompt_tokens)
    assert turns == session.turn and turns >= 1


@pytest.mark.parametrize("make", [conversation, agent])
def test_every_prompt_begins_with_the_one_before_and_its_answer(make: Make) -> None:
    session = make(random.Random(0), Budget(8192, 48, TURNS_MAX, 0.3))
    before = ""
    while not session.over():
        session.grow()
        now = said(session)
        assert now.startswith(before) and len(now) > len(before)
        session.hear(f"answer {session.turn}", 100 * session.turn)
        before = now + f"answer {session.turn}"
    assert session.turn >= 4


def test_a_conversation_has_so_many_turns_and_keeps_a_question_that_was_refused() -> None:
    session = Conversation(random.Random(0), CORPUS, Budget(8192, 48, 2, 0.3))
    session.grow()
    first = session.fields()
    assert session.fields() == first  # asked again as it was
    session.hear("yes", 50)
    assert not session.over()
    session.grow()
    assert session.over() and [message["role"] for message in session.fields()["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


def test_agents_share_a_prefix_and_go_different_ways() -> None:
    budget = Budget(8192, 48, TURNS_MAX, 0.3)
    prefix = AgentRun.prefix(random.Random(1), CORPUS, budget)
    runs = [AgentRun(random.Random(seed), CORPUS, budget, prefix) for seed in (1, 2)]
    for run in runs:
        run.grow()
    one, other = (run.fields()["prompt"] for run in runs)
    assert one.startswith(prefix) and other.startswith(prefix) and one != other
    assert len(prefix) >= 0.9 * budget.characters(2048)


def test_the_same_seed_says_the_same() -> None:
    budget = Budget(4096, 48, TURNS_MAX, 0.3)
    for make in (conversation, agent):
        first, again = make(random.Random(5), budget), make(random.Random(5), budget)
        first.grow()
        again.grow()
        assert said(first) == said(again)


def test_an_excerpt_has_the_length_asked_for_also_past_the_end_of_a_file() -> None:
    for seed in range(20):
        name, text = CORPUS.excerpt(random.Random(seed), 150_000)
        assert name.endswith(".py") and len(text) == 150_000 and text.isascii()
