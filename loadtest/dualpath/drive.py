"""The agents, alive: a process in the control namespace that reads a `Job` from stdin and writes a `Done` to stdout.

One thread per agent: it waits for its start, then sends turn after turn, each with everything that was said before. A refused request (429) is
sent again after the time the router asked for; its TTFT counts from the first attempt.
"""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec

from loadtest.dualpath.jobs import Done, Job
from loadtest.dualpath.trajectories import Agent
from loadtest.samples import Sample
from loadtest.streaming import Answer, connect

READY_DEADLINE_S = 60.0
SETTLE_DEADLINE_S = 60.0
POLL_S = 0.2
ATTEMPTS_MAX = 50
BYTES_METRIC = "penstock:kv_bytes_total{"


class Drive:
    """One job under way."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._http = connect(job.url, "")
        self._began = 0.0
        self._samples: list[Sample] = []
        self._lock = threading.Lock()

    def run(self) -> Done:
        self._until_ready()
        before = self._path_bytes()
        self._began = time.perf_counter()
        with ThreadPoolExecutor(self._job.at_once) as threads:
            for agent in [threads.submit(self._live, *pair) for pair in zip(self._job.agents, self._job.starts_s, strict=True)]:
                agent.result()
        wall_s = max((sample.sent_s + sample.total_s for sample in self._samples), default=0.0)
        after = self._path_bytes()
        self._until_stored()
        moved = {path: count - before.get(path, 0.0) for path, count in after.items()}
        return Done(wall_s, sorted(self._samples, key=lambda sample: sample.sent_s), moved, self._explained())

    def _explained(self) -> dict[str, Any]:
        """What the router knew, reckoned and chose for each request; it keeps the last few hundred."""
        replies = ((sample.request_id, self._http.get(f"/v1/penstock/explain/{sample.request_id}")) for sample in self._samples)
        return {name: reply.json()["decisions"][-1] for name, reply in replies if reply.status_code == 200}

    def _live(self, agent: Agent, start_s: float) -> None:
        time.sleep(max(0.0, start_s - self._now()))
        said = list(agent.context)
        for number, turn in enumerate(agent.turns, start=1):
            if self._job.turns_until_s is not None and self._now() >= self._job.turns_until_s:
                return
            said += turn.appended
            answer = self._ask(agent.id, number, said, turn.generated)
            if answer.outcome != "ok":
                return
            said += answer.token_ids

    def _ask(self, agent: int, turn: int, prompt: list[int], tokens: int) -> Answer:
        body = {
            "model": self._job.model, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True,
        }  # fmt: skip
        sent_s = self._now()
        name = f"agent-{agent}-{turn}"
        for _ in range(ATTEMPTS_MAX):
            answer = Answer()
            answer.stream(self._http, "/v1/completions", body, name)
            if answer.outcome != "refused":
                break
            time.sleep(answer.retry_after_s)
        self._note(answer, agent, turn, sent_s, len(prompt))
        return answer

    def _note(self, answer: Answer, agent: int, turn: int, sent_s: float, prompt_tokens: int) -> None:
        waited_s = answer.began - self._began - sent_s  # for earlier attempts
        details = answer.usage.get("prompt_tokens_details") or {}
        sample = Sample(
            kind="agent", user=agent, session=0, turn=turn, sent_s=sent_s, total_s=waited_s + answer.total_s, outcome=answer.outcome,
            chunk_s=tuple(waited_s + at for at in answer.chunk_s), prompt_tokens=prompt_tokens,
            cached_tokens=details.get("cached_tokens") or 0, output_tokens=answer.usage.get("completion_tokens", 0),
            route=(answer.usage.get("penstock") or {}).get("route", ""), finish_reason=answer.finish_reason,
            request_id=f"agent-{agent}-{turn}", status=answer.status, code=answer.code, message=answer.message,
        )  # fmt: skip
        with self._lock:
            self._samples.append(sample)

    def _now(self) -> float:
        return time.perf_counter() - self._began

    def _until_ready(self) -> None:
        until = time.monotonic() + READY_DEADLINE_S
        said = "no answer"
        while time.monotonic() < until:
            try:
                reply = self._http.get("/ready")
            except httpx.TransportError as error:
                said = str(error)
            else:
                if reply.status_code == 200:
                    return
                said = reply.text
            time.sleep(POLL_S)
        raise SystemExit(f"the router was not ready within {READY_DEADLINE_S:g} s: {said}")

    def _until_stored(self) -> None:
        until = time.monotonic() + SETTLE_DEADLINE_S
        blocks = 0
        while (blocks := max(blocks, self._blocks())) < self._job.stored_blocks:
            if time.monotonic() > until:
                raise SystemExit(f"the kvstore holds {blocks} of {self._job.stored_blocks} blocks after {SETTLE_DEADLINE_S:g} s")
            time.sleep(POLL_S)

    def _blocks(self) -> int:
        members = self._http.get("/v1/penstock/status").json()["members"]
        return sum((member.get("store") or {}).get("blocks", 0) for member in members)

    def _path_bytes(self) -> dict[str, float]:
        lines = [line for line in self._http.get("/metrics").text.splitlines() if line.startswith(BYTES_METRIC)]
        return {line.partition('path="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


def main() -> int:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(Drive(job).run()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
