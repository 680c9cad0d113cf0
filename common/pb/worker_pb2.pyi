from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_UNSPECIFIED: _ClassVar[Source]
    RESIDENT: _ClassVar[Source]
    STORAGE_TO_DECODE: _ClassVar[Source]
    STORAGE_TO_PREFILL: _ClassVar[Source]
    RECOMPUTE: _ClassVar[Source]
    RESIDENT_AT_PREFILL: _ClassVar[Source]

class Order(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORDER_UNSPECIFIED: _ClassVar[Order]
    FORWARD: _ClassVar[Order]
    MEET: _ClassVar[Order]
    WHOLE: _ClassVar[Order]
SOURCE_UNSPECIFIED: Source
RESIDENT: Source
STORAGE_TO_DECODE: Source
STORAGE_TO_PREFILL: Source
RECOMPUTE: Source
RESIDENT_AT_PREFILL: Source
ORDER_UNSPECIFIED: Order
FORWARD: Order
MEET: Order
WHOLE: Order

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResidentRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ResidentReply(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("role", "id", "epoch", "model", "namespace", "block_tokens", "bytes_per_block", "context_tokens", "vocab_size", "draining", "load", "bytes_endpoint", "codec", "stored_bytes_per_block")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    BYTES_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    role: str
    id: str
    epoch: bytes
    model: str
    namespace: str
    block_tokens: int
    bytes_per_block: int
    context_tokens: int
    vocab_size: int
    draining: bool
    load: Load
    bytes_endpoint: Endpoint
    codec: str
    stored_bytes_per_block: int
    def __init__(self, role: _Optional[str] = ..., id: _Optional[str] = ..., epoch: _Optional[bytes] = ..., model: _Optional[str] = ..., namespace: _Optional[str] = ..., block_tokens: _Optional[int] = ..., bytes_per_block: _Optional[int] = ..., context_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., draining: _Optional[bool] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., bytes_endpoint: _Optional[_Union[Endpoint, _Mapping]] = ..., codec: _Optional[str] = ..., stored_bytes_per_block: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "tokens", "pool_blocks_free", "pool_blocks_total", "stage_slots_free", "stage_slots_total", "prefill_tokens_per_s", "read_bytes_per_s", "read_queue_bytes", "peer_read_bytes_per_s", "peer_read_queue_bytes", "peer_write_bytes_per_s", "peer_write_queue_bytes", "queued_tokens", "prefill_step_s", "queued_runs")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    POOL_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    POOL_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STAGE_SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    STAGE_SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    READ_QUEUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEER_READ_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PEER_READ_QUEUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEER_WRITE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PEER_WRITE_QUEUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_STEP_S_FIELD_NUMBER: _ClassVar[int]
    QUEUED_RUNS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    tokens: int
    pool_blocks_free: int
    pool_blocks_total: int
    stage_slots_free: int
    stage_slots_total: int
    prefill_tokens_per_s: float
    read_bytes_per_s: float
    read_queue_bytes: int
    peer_read_bytes_per_s: float
    peer_read_queue_bytes: int
    peer_write_bytes_per_s: float
    peer_write_queue_bytes: int
    queued_tokens: int
    prefill_step_s: float
    queued_runs: _containers.RepeatedCompositeFieldContainer[QueuedRun]
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., tokens: _Optional[int] = ..., pool_blocks_free: _Optional[int] = ..., pool_blocks_total: _Optional[int] = ..., stage_slots_free: _Optional[int] = ..., stage_slots_total: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., read_bytes_per_s: _Optional[float] = ..., read_queue_bytes: _Optional[int] = ..., peer_read_bytes_per_s: _Optional[float] = ..., peer_read_queue_bytes: _Optional[int] = ..., peer_write_bytes_per_s: _Optional[float] = ..., peer_write_queue_bytes: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., prefill_step_s: _Optional[float] = ..., queued_runs: _Optional[_Iterable[_Union[QueuedRun, _Mapping]]] = ...) -> None: ...

class QueuedRun(_message.Message):
    __slots__ = ("tokens", "due_s")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DUE_S_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    due_s: float
    def __init__(self, tokens: _Optional[int] = ..., due_s: _Optional[float] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("shm", "tcp", "grpc")
    SHM_FIELD_NUMBER: _ClassVar[int]
    TCP_FIELD_NUMBER: _ClassVar[int]
    GRPC_FIELD_NUMBER: _ClassVar[int]
    shm: str
    tcp: str
    grpc: str
    def __init__(self, shm: _Optional[str] = ..., tcp: _Optional[str] = ..., grpc: _Optional[str] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("token", "endpoint", "ttl_ms", "epoch")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    endpoint: Endpoint
    ttl_ms: int
    epoch: bytes
    def __init__(self, token: _Optional[bytes] = ..., endpoint: _Optional[_Union[Endpoint, _Mapping]] = ..., ttl_ms: _Optional[int] = ..., epoch: _Optional[bytes] = ...) -> None: ...

class StoredPrefix(_message.Message):
    __slots__ = ("blocks", "lease", "kvstore")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    KVSTORE_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    lease: Lease
    kvstore: str
    def __init__(self, blocks: _Optional[int] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., kvstore: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop_token_ids", "eos_token_ids", "ignore_eos", "min_tokens", "logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    min_tokens: int
    logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., min_tokens: _Optional[int] = ..., logprobs: _Optional[int] = ...) -> None: ...

class Leg(_message.Message):
    __slots__ = ("first_block", "last_block", "source")
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    LAST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    last_block: int
    source: Source
    def __init__(self, first_block: _Optional[int] = ..., last_block: _Optional[int] = ..., source: _Optional[_Union[Source, str]] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("legs", "stored", "prefill", "kvstore", "order", "plan", "replicas", "replicated_blocks", "alternates", "tail_tokens")
    LEGS_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    KVSTORE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REPLICATED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATES_FIELD_NUMBER: _ClassVar[int]
    TAIL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    legs: _containers.RepeatedCompositeFieldContainer[Leg]
    stored: StoredPrefix
    prefill: str
    kvstore: str
    order: Order
    plan: str
    replicas: _containers.RepeatedScalarFieldContainer[str]
    replicated_blocks: int
    alternates: _containers.RepeatedScalarFieldContainer[str]
    tail_tokens: int
    def __init__(self, legs: _Optional[_Iterable[_Union[Leg, _Mapping]]] = ..., stored: _Optional[_Union[StoredPrefix, _Mapping]] = ..., prefill: _Optional[str] = ..., kvstore: _Optional[str] = ..., order: _Optional[_Union[Order, str]] = ..., plan: _Optional[str] = ..., replicas: _Optional[_Iterable[str]] = ..., replicated_blocks: _Optional[int] = ..., alternates: _Optional[_Iterable[str]] = ..., tail_tokens: _Optional[int] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("start", "cancel")
    START_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    start: Start
    cancel: Cancel
    def __init__(self, start: _Optional[_Union[Start, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("request_id", "token_ids", "sampling", "route", "deadline_ms", "chain_root", "traceparent", "output_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_ROOT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    route: Route
    deadline_ms: int
    chain_root: bytes
    traceparent: str
    output_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., route: _Optional[_Union[Route, _Mapping]] = ..., deadline_ms: _Optional[int] = ..., chain_root: _Optional[bytes] = ..., traceparent: _Optional[str] = ..., output_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class StepBatch(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceStep]
    def __init__(self, sequences: _Optional[_Iterable[_Union[SequenceStep, _Mapping]]] = ...) -> None: ...

class SequenceStep(_message.Message):
    __slots__ = ("request_id", "tokens", "finish", "error", "report", "stop_token")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    finish: str
    error: Error
    report: Report
    stop_token: int
    def __init__(self, request_id: _Optional[str] = ..., tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., finish: _Optional[str] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., stop_token: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "logprob", "top")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("id", "logprob")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "param", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    retry_after_s: float
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Flow(_message.Message):
    __slots__ = ("bytes", "seconds")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    seconds: float
    def __init__(self, bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("plan", "cached_tokens", "computed_tokens", "prefill", "carrier", "storage_to_decode", "storage_to_prefill", "decode_to_prefill", "prefill_to_decode", "host_to_device", "queue_s", "prefill_s", "preemptions", "fallback", "prefill_retries", "kept_tokens")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    STORAGE_TO_DECODE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_TO_PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_TO_PREFILL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TO_DECODE_FIELD_NUMBER: _ClassVar[int]
    HOST_TO_DEVICE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RETRIES_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    plan: str
    cached_tokens: int
    computed_tokens: int
    prefill: str
    carrier: str
    storage_to_decode: Flow
    storage_to_prefill: Flow
    decode_to_prefill: Flow
    prefill_to_decode: Flow
    host_to_device: Flow
    queue_s: float
    prefill_s: float
    preemptions: int
    fallback: str
    prefill_retries: int
    kept_tokens: int
    def __init__(self, plan: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., prefill: _Optional[str] = ..., carrier: _Optional[str] = ..., storage_to_decode: _Optional[_Union[Flow, _Mapping]] = ..., storage_to_prefill: _Optional[_Union[Flow, _Mapping]] = ..., decode_to_prefill: _Optional[_Union[Flow, _Mapping]] = ..., prefill_to_decode: _Optional[_Union[Flow, _Mapping]] = ..., host_to_device: _Optional[_Union[Flow, _Mapping]] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., preemptions: _Optional[int] = ..., fallback: _Optional[str] = ..., prefill_retries: _Optional[int] = ..., kept_tokens: _Optional[int] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "sampling", "legs", "order", "stored", "stage", "namespace", "deadline_ms", "traceparent", "chain_root")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LEGS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    CHAIN_ROOT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    legs: _containers.RepeatedCompositeFieldContainer[Leg]
    order: Order
    stored: StoredPrefix
    stage: Lease
    namespace: str
    deadline_ms: int
    traceparent: str
    chain_root: bytes
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., legs: _Optional[_Iterable[_Union[Leg, _Mapping]]] = ..., order: _Optional[_Union[Order, str]] = ..., stored: _Optional[_Union[StoredPrefix, _Mapping]] = ..., stage: _Optional[_Union[Lease, _Mapping]] = ..., namespace: _Optional[str] = ..., deadline_ms: _Optional[int] = ..., traceparent: _Optional[str] = ..., chain_root: _Optional[bytes] = ...) -> None: ...

class RunEvent(_message.Message):
    __slots__ = ("computed_blocks", "pull_from", "first", "finish", "stop_token", "report", "storage_to_prefill", "decode_to_prefill", "prefill_to_decode")
    COMPUTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PULL_FROM_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    STORAGE_TO_PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_TO_PREFILL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TO_DECODE_FIELD_NUMBER: _ClassVar[int]
    computed_blocks: int
    pull_from: _containers.RepeatedScalarFieldContainer[int]
    first: Token
    finish: str
    stop_token: int
    report: Report
    storage_to_prefill: Flow
    decode_to_prefill: Flow
    prefill_to_decode: Flow
    def __init__(self, computed_blocks: _Optional[int] = ..., pull_from: _Optional[_Iterable[int]] = ..., first: _Optional[_Union[Token, _Mapping]] = ..., finish: _Optional[str] = ..., stop_token: _Optional[int] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., storage_to_prefill: _Optional[_Union[Flow, _Mapping]] = ..., decode_to_prefill: _Optional[_Union[Flow, _Mapping]] = ..., prefill_to_decode: _Optional[_Union[Flow, _Mapping]] = ...) -> None: ...
