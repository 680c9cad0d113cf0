"""The users of a load test, for locust: people who chat, and agents.

Importing this module patches the process for gevent (locust does so when it is imported).
A finished request is fired as locust's `request` event with its `Sample` in the context.
"""

import itertools
import random
import time
from collections.abc import Sequence
from typing import ClassVar

from locust import User, task

from loadtest.corpus import Corpus
from loadtest.samples import Kind, Sample
from loadtest.sessions import AgentRun, Budget, Conversation, Session
from loadtest.streaming import Answer, connect

ERROR_PAUSE_S = 1.0  # a cluster in trouble is not hammered


class Plan:
    """What all users of one test share."""

    def __init__(self, url: str, api_key: str, model: str, budget: Budget, corpus: Corpus, think_s: float, seed: int) -> None:
        self.url, self.api_key, self.model = url, api_key, model
        self.budget, self.corpus, self.think_s, self.seed = budget, corpus, think_s, seed
        self.prefix = AgentRun.prefix(random.Random(seed), corpus, budget)
        self.began = time.perf_counter()
        self.requests = itertools.count(1)


def user_classes(plan: Plan, chats: int, agents: int) -> Sequence[type[User]]:
    """Locust's user classes for so many users of each kind."""
    counts: tuple[tuple[type[_Streaming], int], ...] = ((ChatUser, chats), (AgentUser, agents))
    return [
        type(kind.__name__, (kind,), {"plan": plan, "fixed_count": count, "numbers": itertools.count(1)})
        for kind, count in counts
        if count
    ]


class _Streaming(User):
    """Sends the next turn of its session, streams the answer, thinks, goes on; a full session makes place for a new one."""

    abstract = True
    kind: ClassVar[Kind]
    plan: ClassVar[Plan]
    numbers: ClassVar["itertools.count[int]"]

    def on_start(self) -> None:
        self.number = next(self.numbers)
        self.rng = random.Random(f"{self.plan.seed} {self.kind} {self.number}")
        self.http = connect(self.plan.url, self.plan.api_key)
        self.sessions = 0
        self.pause_s = 0.0
        self._begin()

    def on_stop(self) -> None:
        self.http.close()

    def wait_time(self) -> float:
        return max(self.pause_s, self._think_s())

    @task
    def turn(self) -> None:
        if not self.again:
            if self.session.over():
                self._begin()
            self.session.grow()
        self._settle(self._ask())

    def _ask(self) -> Answer:
        """One request; also one that the end of the test cuts short is reported."""
        plan, answer = self.plan, Answer()
        request_id = f"load-{plan.seed}-{next(plan.requests)}"
        body = self.session.fields() | {
            "model": plan.model, "max_tokens": plan.budget.output_tokens, "seed": self.rng.getrandbits(31), "stream": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True,  # an event per step, also without text
        }  # fmt: skip
        try:
            answer.stream(self.http, self.session.path, body, request_id)
        finally:
            self._report(answer, request_id)
        return answer

    def _settle(self, answer: Answer) -> None:
        """The session goes on after an answer, waits after a 429, ends with an error."""
        self.again = answer.outcome == "refused"
        self.pause_s = answer.retry_after_s if self.again else 0.0
        if answer.outcome == "ok":
            self.session.hear(answer.text, int(answer.usage.get("prompt_tokens", 0)))
        elif not self.again:
            self.pause_s = ERROR_PAUSE_S
            self._begin()

    def _begin(self) -> None:
        self.sessions += 1
        self.again = False
        self.session = self._session()

    def _report(self, answer: Answer, request_id: str) -> None:
        usage = answer.usage
        sample = Sample(
            kind=self.kind,
            user=self.number,
            session=self.sessions,
            turn=self.session.turn,
            sent_s=answer.began - self.plan.began,
            total_s=answer.total_s,
            outcome=answer.outcome,
            chunk_s=tuple(answer.chunk_s),
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
            output_tokens=int(usage.get("completion_tokens", 0)),
            route=str((usage.get("penstock") or {}).get("route", "")),
            finish_reason=answer.finish_reason,
            request_id=request_id,
            status=answer.status,
            code=answer.code,
            message=answer.message,
        )
        self.environment.events.request.fire(
            request_type="POST",
            name=self.kind,
            response_time=answer.total_s * 1e3,
            response_length=len(answer.text),
            exception=RuntimeError(answer.message) if answer.code else None,
            context={"sample": sample},
        )

    def _session(self) -> Session:
        raise NotImplementedError

    def _think_s(self) -> float:
        raise NotImplementedError


class ChatUser(_Streaming):
    """A person: several turns of a conversation, with time to read and think between them."""

    abstract = True
    kind = "chat"

    def _session(self) -> Session:
        return Conversation(self.rng, self.plan.corpus, self.plan.budget)

    def _think_s(self) -> float:
        return self.rng.uniform(0.5, 1.5) * self.plan.think_s


class AgentUser(_Streaming):
    """An agent: its context grows by tool outputs until it is full; tools answer quickly."""

    abstract = True
    kind = "agent"

    def _session(self) -> Session:
        return AgentRun(self.rng, self.plan.corpus, self.plan.budget, self.plan.prefix)

    def _think_s(self) -> float:
        return self.rng.uniform(0.0, 0.2) * self.plan.think_s
