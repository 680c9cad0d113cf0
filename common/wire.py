"""worker.proto and kvstore.proto messages from and to the domain's types.

Decoding checks bounds: a message from another process is outside input.
"""

from collections.abc import Iterable
from typing import cast

from common.errors import InvalidRequest
from common.generation import LOGPROBS_MAX, Sampling, Token
from common.pb import worker_pb2 as pb
from common.routes import Leg, Order
from common.transport.interface import TOKEN_BYTES, Endpoint, LeaseToken


def sampling_to_pb(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(**{field: getattr(sampling, field) for field in sampling.__struct_fields__})


def sampling_from_pb(message: pb.Sampling) -> Sampling:
    if message.max_tokens < 1:
        raise InvalidRequest(f"sampling.max_tokens = {message.max_tokens}: must be at least 1", param="max_tokens")
    logprobs = message.logprobs if message.HasField("logprobs") else None
    if logprobs is not None and logprobs > LOGPROBS_MAX:
        raise InvalidRequest(f"sampling.logprobs = {logprobs}: at most {LOGPROBS_MAX}", param="logprobs")
    return Sampling(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        eos_token_ids=tuple(message.eos_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        logprobs=logprobs,
    )


def token_to_pb(token: Token) -> pb.Token:
    top = [pb.TopLogprob(id=id_, logprob=logprob) for id_, logprob in token.top]
    return pb.Token(id=token.id, logprob=token.logprob, top=top)


def token_from_pb(message: pb.Token) -> Token:
    logprob = message.logprob if message.HasField("logprob") else None
    return Token(message.id, logprob, tuple((top.id, top.logprob) for top in message.top))


def tokens_from_pb(messages: Iterable[pb.Token]) -> tuple[Token, ...]:
    return tuple(token_from_pb(message) for message in messages)


def endpoint_to_pb(endpoint: Endpoint) -> pb.Endpoint:
    return pb.Endpoint(shm=endpoint.shm, tcp=endpoint.tcp, grpc=endpoint.grpc)


def endpoint_from_pb(message: pb.Endpoint) -> Endpoint:
    return Endpoint(shm=message.shm, tcp=message.tcp, grpc=message.grpc)


def lease_token(raw: bytes) -> LeaseToken:
    if len(raw) != TOKEN_BYTES:
        raise InvalidRequest(f"lease token of {len(raw)} bytes: must be {TOKEN_BYTES}")
    return LeaseToken(raw)


def legs_to_pb(legs: Iterable[Leg]) -> list[pb.Leg]:
    return [
        pb.Leg(first_block=leg.first_block, last_block=leg.last_block, source=pb.Source.Value(leg.source.upper())) for leg in legs
    ]


def order_to_pb(order: Order) -> pb.Order:
    return cast(pb.Order, pb.Order.Value(order.upper()))
