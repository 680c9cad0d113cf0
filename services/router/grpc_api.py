"""The public gRPC service (proto/router.proto): the same generation as the HTTP API."""

import hashlib
import hmac
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio

from common import rpc
from common.errors import Unauthenticated
from common.pb import router_pb2 as pb
from common.pb import router_pb2_grpc
from services.router.choice import Delta
from services.router.generation import Generation
from services.router.generator import Generator
from services.router.prepare import Envelope, check_model, encode_chat, prompt_ids, work_of
from services.router.sampling import Asked, refused
from services.router.status import Facts
from services.router.work import Work

SERVICE_NAMES = ("penstock.v1.Penstock",)
_OPTIONAL = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
)


class PenstockService(router_pb2_grpc.PenstockServicer):
    def __init__(self, generator: Generator, facts: Facts, keys: Sequence[str]) -> None:
        self._g = generator
        self._facts = facts
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateEvent]:
        async with rpc.aborting(context, "Generate"):
            self._authenticate(context)
            work = await self._work(request, context)
            async with Generation(self._g, work) as generation:
                unfinished = work.sequences
                async for deltas in generation:
                    for delta in deltas:
                        unfinished -= delta.finish is not None
                        yield self._event(work, delta, generation, last=unfinished == 0 and delta.finish is not None)

    async def ListModels(self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.ListModelsReply:
        async with rpc.aborting(context, "ListModels"):
            self._authenticate(context)
        context_tokens = self._g.cluster.context_tokens(self._g.model.context_tokens)
        return pb.ListModelsReply(models=[pb.Model(id=self._facts.model_name, context_tokens=context_tokens)])

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.StatusReply:
        async with rpc.aborting(context, "Status"):
            self._authenticate(context)
        reason = self._facts.not_ready()
        members = [
            pb.Member(role=peer.role, id=peer.id, address=peer.address, connected=peer.connected, detail=peer.detail())
            for peer in self._g.cluster.peers.values()
        ]
        return pb.StatusReply(ready=not reason, reason=reason, members=members)

    async def _work(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]) -> Work:
        check_model(self._g, self._facts.model_name, request.model)
        kind = request.WhichOneof("prompt")
        if kind == "text":
            ids = await prompt_ids(self._g, "text", request.text)
        elif kind == "tokens":
            ids = await prompt_ids(self._g, "tokens", list(request.tokens.ids))
        elif kind == "chat":
            messages = [{"role": message.role, "content": message.content} for message in request.chat.messages]
            if not messages:
                raise refused("chat", "no messages", "at least one message")
            ids = await encode_chat(self._g, messages, {"add_generation_prompt": True})
        else:
            raise refused("prompt", None, "one of text, tokens and chat")
        metadata = dict(context.invocation_metadata() or ())
        timeout_s = min(self._g.settings.request_timeout_s, context.time_remaining() or float("inf"))
        envelope = Envelope(
            str(metadata.get("x-request-id", ""))[:128] or uuid.uuid4().hex, timeout_s, str(metadata.get("traceparent", ""))
        )
        return work_of(self._g, [ids], asked_of(request.sampling), None, envelope, request.cache_salt or None)

    def _event(self, work: Work, delta: Delta, generation: Generation, last: bool) -> pb.GenerateEvent:
        out = pb.GenerateEvent(index=delta.index, text=delta.text, finish_reason=delta.finish or "", request_id=work.id)
        for token in delta.tokens:
            top = [pb.TopLogprob(id=id_, logprob=logprob) for id_, logprob in token.top]
            out.tokens.append(pb.Token(id=token.id, text=self._g.model.token_text(token.id), logprob=token.logprob, top=top))
        if last:
            out.usage.CopyFrom(
                pb.Usage(
                    prompt_tokens=generation.prompt_tokens,
                    completion_tokens=generation.completion_tokens,
                    cached_tokens=generation.cached_tokens,
                    route=generation.route,
                )
            )
        return out

    def _authenticate(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if not self._keys:
            return
        given = str(dict(context.invocation_metadata() or ()).get("authorization", ""))
        scheme, _, key = given.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthenticated("missing or wrong API key: expected the metadata 'authorization: Bearer <key>'")


def asked_of(sampling: pb.Sampling) -> Asked:
    given = {name: getattr(sampling, name) for name in _OPTIONAL if sampling.HasField(name)}
    return Asked(
        **given,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
        n=sampling.n if sampling.HasField("n") else 1,
    )
