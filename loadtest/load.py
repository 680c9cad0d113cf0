"""Puts a bounded load of chat and agent users on a running cluster and writes a report.

People chat over /v1/chat/completions, agents grow one context over /v1/completions; all answers are
streamed. Ends after --seconds; requests that run then get a few seconds to finish and are cut after that.
Ctrl-C ends it early, with a report of what there is; a second one stops at once, without.

The last line on stdout is one line of JSON. Exit status: 0 all went well (429 answers are no error: they
are waited out as Retry-After asks, and counted), 1 a request failed or none finished, 2 asked for wrongly.

How it runs: options -> the cluster says what it serves -> one short request measures the tokenizer ->
locust users in this process (its greenlets; locust patches the process when it is imported) -> figures -> report.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment

from common.errors import PenstockError, SettingsError
from loadtest import report, target
from loadtest.corpus import Corpus
from loadtest.figures import spread, summarize
from loadtest.samples import Sample
from loadtest.sessions import AgentRun, Budget, Conversation
from loadtest.users import Plan, user_classes

SECONDS_MAX = 600
USERS_MAX = 64
REQUESTS_MAX = 50_000  # then the test ends: samples are kept in memory
GRACE_S = 5.0
PROGRESS_S = 5.0
CONTEXT_TOKENS = 8192


class LoadTest:
    """One run of locust: starts users, gathers samples, ends at its time, at a signal or at `REQUESTS_MAX`."""

    def __init__(self, plan: Plan, seconds: float, chats: int, agents: int) -> None:
        self.samples: list[Sample] = []
        self.bugs = 0
        self.interrupted = False
        self._plan, self._seconds, self._users = plan, seconds, chats + agents
        self._ending = False
        self._environment = Environment(user_classes=list(user_classes(plan, chats, agents)), stop_timeout=GRACE_S)
        self._environment.events.request.add_listener(self._finished)
        self._environment.events.user_error.add_listener(self._bug)
        self._runner = self._environment.create_local_runner()

    def run(self) -> None:
        """Returns when every user has stopped."""
        for number in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(number, self._interrupt)
        self._plan.began = time.perf_counter()
        self._runner.start(self._users, spawn_rate=self._users)
        helpers = [gevent.spawn_later(self._seconds, self._end), gevent.spawn(self._tell)]
        self._runner.greenlet.join()
        gevent.killall(helpers)

    def _end(self) -> None:
        if not self._ending:
            self._ending = True
            self._runner.quit()

    def _interrupt(self) -> None:
        if self.interrupted:
            os._exit(130)
        self.interrupted = True
        say("ending early; once more stops at once")
        self._end()

    def _finished(self, context: dict[str, Any], **_: Any) -> None:
        self.samples.append(context["sample"])
        if len(self.samples) >= REQUESTS_MAX:
            gevent.spawn(self._end)

    def _bug(self, exception: Exception, tb: Any, **_: Any) -> None:
        """An exception in a user is ours, not the cluster's."""
        self.bugs += 1
        traceback.print_exception(exception)

    def _tell(self) -> None:
        while True:
            gevent.sleep(PROGRESS_S)
            done = [sample for sample in self.samples if sample.outcome == "ok"]
            errors = sum(sample.outcome == "error" for sample in self.samples)
            ttft = spread([sample.ttft_s for sample in done])
            shown = f", TTFT p50 {ttft.p50:,.0f} ms" if ttft else ""
            say(f"{time.perf_counter() - self._plan.began:3.0f} s: {len(done)} requests, {errors} errors{shown}")


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    try:
        return _run(options)
    except PenstockError as error:
        print(f"load: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


def _run(options: argparse.Namespace) -> int:
    url = target.choose(options.url, options.data, options.allow_remote)
    cluster = target.inspect(url, options.api_key, options.model)
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    plan = _plan(options, cluster, seed)
    agents = options.users // 2 if options.agents is None else options.agents
    chats = options.users - agents
    say(f"{cluster.model} at {url}: {chats} chat and {agents} agent users for {options.seconds:g} s, seed {seed}")
    test = LoadTest(plan, options.seconds, chats, agents)
    began_at = time.time()
    test.run()
    budget = plan.budget
    settings = {
        "seconds": options.seconds, "chat users": chats, "agent users": agents, "seed": seed, "think_s": options.think_s,
        "context_tokens used": budget.context_tokens, "max_tokens": budget.output_tokens, "chat turns": budget.turns_max,
    }  # fmt: skip
    run = report.Run(cluster, settings, began_at, test.interrupted)
    summary = summarize(test.samples)
    folder = report.write(options.out, run, summary, test.samples)
    print(f"{report.in_words(summary)}\n\nreport: {folder / 'report.html'}")
    print(json.dumps(report.main_figures(run, summary, folder)), flush=True)
    return 1 if summary.errors or test.bugs or not summary.finished else 0


def _plan(options: argparse.Namespace, cluster: target.Target, seed: int) -> Plan:
    corpus, rng = Corpus(), random.Random(seed)
    context = min(cluster.context_tokens, options.context_tokens)
    measured = target.tokens_per_character(cluster, options.api_key, corpus, rng)
    budget = Budget(context, options.max_tokens, options.turns, measured)
    plan = Plan(cluster.url, options.api_key, cluster.model, budget, corpus, options.think_s, seed)
    if AgentRun(rng, corpus, budget, plan.prefix).over() or Conversation(rng, corpus, budget).over():
        raise SettingsError(f"a context of {context} tokens is too short for one turn with answers of {options.max_tokens}")
    return plan


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    about, _, end = (__doc__ or "").partition("\n\nHow it runs")[0].partition("\n\n")
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="make load", description=about, epilog=end, formatter_class=shape, allow_abbrev=False)
    parser.add_argument("--url", default="", help=f"the cluster (default: the one of --data, else {target.DEFAULT_URL})")
    parser.add_argument(
        "--data", type=Path, help=f"data folder of a cluster on this machine (default: {target.DATA}, if one runs there)"
    )
    parser.add_argument("--allow-remote", action="store_true", help="let --url name another machine")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="API key (default: OPENAI_API_KEY)")
    parser.add_argument("--model", default="", help="model name (default: the one that is served)")
    parser.add_argument(
        "--seconds", type=_within(float, 1, SECONDS_MAX), default=60.0, help=f"how long, 1 to {SECONDS_MAX} (default: 60)"
    )
    parser.add_argument(
        "--users", type=_within(int, 1, USERS_MAX), default=4, help=f"users in all, 1 to {USERS_MAX} (default: 4)"
    )
    parser.add_argument("--agents", type=_within(int, 0, USERS_MAX), help="how many of the users are agents (default: half)")
    parser.add_argument(
        "--think-s",
        type=_within(float, 0, 60),
        default=1.0,
        help="mean time a person thinks between turns; agents wait a tenth of it (default: 1)",
    )
    parser.add_argument("--turns", type=_within(int, 1, 1000), default=8, help="turns of a conversation, at most (default: 8)")
    parser.add_argument("--max-tokens", type=_within(int, 1, 512), default=48, help="longest answer in tokens (default: 48)")
    parser.add_argument(
        "--context-tokens",
        type=_within(int, 256, 1 << 20),
        default=CONTEXT_TOKENS,
        help=f"how much of the context sessions may fill (default: {CONTEXT_TOKENS}, or the model's)",
    )
    parser.add_argument(
        "--seed",
        type=_within(int, 0, 2**32 - 1),
        help="of all texts (default: a new one each time); the same again finds what the last run stored",
    )
    parser.add_argument("--out", type=Path, default=Path("reports"), help="where the report's folder goes (default: reports)")
    options = parser.parse_args(argv)
    if (options.agents or 0) > options.users:
        parser.error(f"--agents {options.agents}: expected at most --users {options.users}")
    return options


def _within(kind: type, low: float, high: float) -> Any:
    """A number of `kind` from `low` to `high`, for argparse."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected {'a whole number' if kind is int else 'a number'} from {low} to {high}"
            )
        return value

    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
