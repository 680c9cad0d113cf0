"""What the users of a load test say: a conversation of several turns, and an agent whose context grows. Pure.

Life of a session: `grow` adds what comes next, `fields` is the request as it stands, `hear` takes the
answer; then `grow` again, until `over`: its turns are used up, or the next one might not fit the context.
"""

import math
import random
from typing import Any, Protocol

import msgspec

from loadtest.corpus import Corpus

# Per turn, the mean of DualPath's 48K agent trace: +474 tokens; its generations (172) are `output_tokens`.
APPENDED_TOKENS_MAX = 474
PREFIX_TOKENS_MAX = 2048
QUESTION_TOKENS_MAX = 160
MARGIN = 1.25  # how much denser in tokens a text may be than the one that was measured
FRAME_TOKENS = 16  # what a chat template or a heading puts around a text
FULL = 0.9  # of the context: there a session ends

SYSTEM = "You are a careful assistant who answers questions about Python code in few words."
TASKS = (
    "find out why the test fails",
    "write a docstring",
    "make this faster",
    "add a type to every argument",
    "review this change",
)
QUESTIONS = ("What does this do?", "Is there a mistake in this?", "Write a test for this.", "How would you shorten this?")
AGENT = """You are an agent that works on a Python code base. In every step you call one tool: read_file, search or run_tests.
You see the tool's output and go on until the task is done. These files you always know:

"""


class Budget(msgspec.Struct, frozen=True):
    """How long things may get, in tokens of the served model.

    Attributes:
        tokens_per_character: of the corpus, measured.
    """

    context_tokens: int
    output_tokens: int
    turns_max: int
    tokens_per_character: float

    def tokens(self, text: str) -> int:
        """At most about so many tokens has a text of the corpus."""
        return min(len(text), math.ceil(len(text) * self.tokens_per_character * MARGIN)) + FRAME_TOKENS

    def characters(self, tokens: int) -> int:
        """A text of the corpus that has about so many tokens is so long."""
        return max(1, int(tokens / self.tokens_per_character))

    def fits(self, prompt_tokens: int) -> bool:
        return prompt_tokens + self.output_tokens <= FULL * self.context_tokens

    @property
    def prefix_tokens(self) -> int:
        """Of what all agents share."""
        return min(PREFIX_TOKENS_MAX, self.context_tokens // 4)

    @property
    def appended_tokens(self) -> int:
        """Of one tool's output."""
        return min(APPENDED_TOKENS_MAX, self.context_tokens // 16)

    @property
    def question_tokens(self) -> int:
        return min(QUESTION_TOKENS_MAX, self.context_tokens // 16)


class Session(Protocol):
    path: str
    turn: int

    def grow(self) -> None: ...

    def fields(self) -> dict[str, Any]: ...

    def hear(self, text: str, prompt_tokens: int) -> None: ...

    def over(self) -> bool: ...


class Conversation:
    """A person who asks about pieces of code; all of it is sent again with every turn."""

    path = "/v1/chat/completions"

    def __init__(self, rng: random.Random, corpus: Corpus, budget: Budget) -> None:
        self._rng, self._corpus, self._budget = rng, corpus, budget
        self._messages = [{"role": "system", "content": SYSTEM}]
        self._tokens = budget.tokens(SYSTEM)
        self.turn = 0

    def grow(self) -> None:
        tokens = self._rng.randint(self._budget.question_tokens // 3, self._budget.question_tokens)
        name, code = self._corpus.excerpt(self._rng, self._budget.characters(tokens))
        question = f"{self._rng.choice(QUESTIONS)} It is from {name}.\n\n{code}"
        self._messages.append({"role": "user", "content": question})
        self.turn += 1

    def fields(self) -> dict[str, Any]:
        return {"messages": self._messages}

    def hear(self, text: str, prompt_tokens: int) -> None:
        self._messages.append({"role": "assistant", "content": text})
        self._tokens = prompt_tokens + len(text.encode()) + FRAME_TOKENS  # random models say things of one token per byte

    def over(self) -> bool:
        longest = "x" * self._budget.characters(self._budget.question_tokens)
        question_tokens = self._budget.tokens(longest) + FRAME_TOKENS + len(max(QUESTIONS, key=len))
        return self.turn >= self._budget.turns_max or not self._budget.fits(self._tokens + question_tokens)


class AgentRun:
    """An agent at work: a prefix that all agents share, its task, then tool outputs and its own short steps."""

    path = "/v1/completions"

    def __init__(self, rng: random.Random, corpus: Corpus, budget: Budget, prefix: str) -> None:
        self._rng, self._corpus, self._budget = rng, corpus, budget
        self._context = f"{prefix}\n\nTask {rng.getrandbits(32):08x}: {rng.choice(TASKS)}\n"
        self._tokens = budget.tokens(self._context)
        self.turn = 0

    @staticmethod
    def prefix(rng: random.Random, corpus: Corpus, budget: Budget) -> str:
        return AGENT + corpus.excerpt(rng, budget.characters(budget.prefix_tokens))[1]

    def grow(self) -> None:
        tokens = self._rng.randint(self._budget.appended_tokens // 2, self._budget.appended_tokens)
        name, output = self._corpus.excerpt(self._rng, self._budget.characters(tokens))
        self._context += f"\n>>> read_file {name}\n{output}\n>>> "
        self.turn += 1

    def fields(self) -> dict[str, Any]:
        return {"prompt": self._context}

    def hear(self, text: str, prompt_tokens: int) -> None:
        self._context += text
        self._tokens = prompt_tokens + len(text.encode())

    def over(self) -> bool:
        longest = "x" * self._budget.characters(self._budget.appended_tokens)
        return not self._budget.fits(self._tokens + self._budget.tokens(longest) + 2 * FRAME_TOKENS)
