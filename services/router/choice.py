"""One sequence of a request as the router follows it: tokens in, text out, and where it runs.

The text is cut at stop strings; a stop or eos token is counted but not shown. The state survives
a move to another decode worker: `output` holds every token so far, and is sent along.
"""

from collections.abc import Sequence

import msgspec

from common.clients.decode import DecodeConnection, Flow, Report, Step
from common.errors import PenstockError
from common.generation import FinishReason, Sampling, Token
from services.router.account import Stay
from services.router.decisions import Decision
from services.router.detokenize import Detokenizer
from services.router.model import Model
from services.router.peers import Peer
from services.router.placement import Route
from services.router.stop_strings import StopStrings
from services.router.stores import Found
from services.router.work import Work


class Delta(msgspec.Struct, frozen=True):
    """What became known of one choice. `stop_reason`: the stop string or stop token id that ended it; None for eos."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    stop_reason: str | int | None = None


class Placement(msgspec.Struct):
    """Where a choice runs now, and what must be given back when it ends or moves."""

    route: Route
    peer: Peer
    connection: DecodeConnection
    stream_id: str
    stay: Stay  # at the decode worker
    prefill: Peer | None
    prefill_stay: Stay | None  # until the first token
    found: Found | None = None


def measured(report: Report, placement: Placement) -> None:
    """What a request's bytes took tells of links that their workers have not reported on yet."""

    def seen(**flows: Flow) -> dict[str, tuple[int, float]]:
        return {link: (flow.bytes, flow.seconds) for link, flow in flows.items()}

    placement.peer.account.measured(seen(storage=report.storage_to_decode))
    alone = not report.prefill_retries  # the worker that is named moved all of it
    if placement.prefill is not None and placement.prefill.id == report.prefill and alone:
        moved = {"peer_read": report.decode_to_prefill, "peer_write": report.prefill_to_decode}
        placement.prefill.account.measured(seen(storage=report.storage_to_prefill, **moved))


def choices_of(work: Work, model: Model) -> list["Choice"]:
    """All that a request asks for, in order."""
    skipped = model.special_ids if work.skip_special else frozenset()

    def decode(ids: Sequence[int]) -> str:
        return model.decode(ids, skip_special=False)

    asked = [(prompt, sampling) for prompt, samplings in zip(work.prompts, work.samplings, strict=True) for sampling in samplings]
    return [
        Choice(index, prompt, sampling, Detokenizer(decode, skipped), StopStrings(work.stop), work.include_stop)
        for index, (prompt, sampling) in enumerate(asked)
    ]


class Choice:
    """State of one sequence. `placement` is None before it is placed and after it ended."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        detokenizer: Detokenizer,
        stops: StopStrings,
        include_stop: bool,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.sampling = sampling
        self.output: list[int] = []
        self.finish: FinishReason | None = None
        self.placement: Placement | None = None
        self.route: Route | None = None
        self.decision: Decision | None = None  # the last one
        self.namespace = ""  # of the worker that began it
        self.report: Report | None = None  # the first worker's, for cached tokens
        self.last_report: Report | None = None
        self.avoid: frozenset[str] = frozenset()
        self.moves = 0
        self.failure: PenstockError | None = None  # why it moves
        self._detokenizer = detokenizer
        self._stops = stops
        self._include_stop = include_stop

    def __repr__(self) -> str:
        return f"<Choice {self.index} output={len(self.output)} finish={self.finish} moves={self.moves}>"

    @property
    def cached_tokens(self) -> int:
        return self.report.cached_tokens if self.report else 0

    def advance(self, step: Step) -> Delta:
        """Takes in a step that is not an error."""
        if step.report is not None:
            self.report = self.report or step.report
            self.last_report = step.report
        text, tokens = "", step.tokens
        stop_reason: str | int | None = None
        for position, token in enumerate(step.tokens):
            self.output.append(token.id)
            ends = step.stop_token is not None and position == len(step.tokens) - 1
            if ends and not self._include_stop:
                break
            text += self._show(self._detokenizer.push(token.id))
            if self._stops.matched is not None:
                tokens = step.tokens[: position + 1]
                break
        finish = step.finish
        if finish is not None and self._stops.matched is None:
            text += self._show(self._detokenizer.flush())
            if self._stops.matched is None:
                text += self._stops.flush()
        if self._stops.matched is not None:
            finish, stop_reason = FinishReason.STOP, self._stops.matched
            text += self._stops.matched if self._include_stop else ""
        elif step.stop_token is not None and step.stop_token not in self.sampling.eos_token_ids:
            stop_reason = step.stop_token
        self.finish = finish
        return Delta(self.index, text, tokens, finish, stop_reason)

    def _show(self, text: str) -> str:
        return self._stops.feed(text, armed=len(self.output) > self.sampling.min_tokens)
