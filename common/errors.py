"""The error tree, and the one table that says what each error means on every protocol.

PenstockError
├── InvalidRequest        the request can't be served as written (names the parameter)
│   └── ContextExceeded   prompt and output don't fit the model's context
├── Unauthenticated       missing or wrong API key
├── NotFound              unknown model, request or route
├── PayloadTooLarge       body over the limit
├── Overloaded            a bound is reached: refused now, retry later
├── DeadlineExceeded      the request's time ran out
├── Unavailable           no worker, or a peer can't be reached
├── LeaseRejected         token unknown, expired, from another epoch, or without the right
├── CorruptBlock          checksum, header or namespace mismatch: a miss, never served
├── TransferFailed        a byte-plane operation ended short
├── Cancelled             the caller went away
├── SettingsError         a flag, file or variable that can't be used; names it
├── UnsupportedModel      a model directory or configuration that can't be served
└── Internal              our bug
"""

from typing import NamedTuple

import grpc


class PenstockError(Exception):
    """Base of all errors. `message` names what was wrong and what would be right."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(PenstockError): ...


class ContextExceeded(InvalidRequest): ...


class Unauthenticated(PenstockError): ...


class NotFound(PenstockError): ...


class PayloadTooLarge(PenstockError): ...


class Overloaded(PenstockError): ...


class DeadlineExceeded(PenstockError): ...


class Unavailable(PenstockError): ...


class LeaseRejected(PenstockError): ...


class CorruptBlock(PenstockError): ...


class TransferFailed(PenstockError): ...


class Cancelled(PenstockError): ...


class SettingsError(PenstockError): ...


class UnsupportedModel(PenstockError): ...


class Internal(PenstockError): ...


class Meaning(NamedTuple):
    """How an error looks from outside."""

    code: str  # machine-readable, in HTTP bodies and between services
    http_status: int
    grpc_status: grpc.StatusCode
    retry: bool  # the same request may succeed elsewhere or later


MEANING: dict[type[PenstockError], Meaning] = {
    InvalidRequest: Meaning("invalid_request_error", 400, grpc.StatusCode.INVALID_ARGUMENT, False),
    ContextExceeded: Meaning("context_length_exceeded", 400, grpc.StatusCode.OUT_OF_RANGE, False),
    Unauthenticated: Meaning("invalid_api_key", 401, grpc.StatusCode.UNAUTHENTICATED, False),
    NotFound: Meaning("not_found", 404, grpc.StatusCode.NOT_FOUND, False),
    PayloadTooLarge: Meaning("payload_too_large", 413, grpc.StatusCode.RESOURCE_EXHAUSTED, False),
    Overloaded: Meaning("overloaded", 429, grpc.StatusCode.RESOURCE_EXHAUSTED, True),
    DeadlineExceeded: Meaning("deadline_exceeded", 504, grpc.StatusCode.DEADLINE_EXCEEDED, False),
    Unavailable: Meaning("unavailable", 503, grpc.StatusCode.UNAVAILABLE, True),
    LeaseRejected: Meaning("lease_rejected", 409, grpc.StatusCode.FAILED_PRECONDITION, True),
    CorruptBlock: Meaning("corrupt_block", 500, grpc.StatusCode.DATA_LOSS, True),
    TransferFailed: Meaning("transfer_failed", 502, grpc.StatusCode.ABORTED, True),
    Cancelled: Meaning("cancelled", 499, grpc.StatusCode.CANCELLED, False),
    SettingsError: Meaning("settings_error", 500, grpc.StatusCode.FAILED_PRECONDITION, False),
    UnsupportedModel: Meaning("unsupported_model", 500, grpc.StatusCode.FAILED_PRECONDITION, False),
    Internal: Meaning("internal_error", 500, grpc.StatusCode.INTERNAL, False),
}
_BY_CODE = {meaning.code: kind for kind, meaning in MEANING.items()}


def meaning(error: BaseException) -> Meaning:
    """What an error means; anything that is not ours is `Internal`."""
    return MEANING.get(type(error), MEANING[Internal]) if isinstance(error, PenstockError) else MEANING[Internal]


def from_code(code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> PenstockError:
    """The error another service named by its code."""
    return _BY_CODE.get(code, Internal)(message, param=param, retry_after_s=retry_after_s)
