from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Admission(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADMISSION_UNSPECIFIED: _ClassVar[Admission]
    ACCEPTED: _ClassVar[Admission]
    PRESENT: _ClassVar[Admission]
    IN_FLIGHT: _ClassVar[Admission]
    DROPPED: _ClassVar[Admission]
    INVALID: _ClassVar[Admission]

class ScrubAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPORT: _ClassVar[ScrubAction]
    START: _ClassVar[ScrubAction]
    STOP: _ClassVar[ScrubAction]
ADMISSION_UNSPECIFIED: Admission
ACCEPTED: Admission
PRESENT: Admission
IN_FLIGHT: Admission
DROPPED: Admission
INVALID: Admission
REPORT: ScrubAction
START: ScrubAction
STOP: ScrubAction

class Endpoint(_message.Message):
    __slots__ = ("shm", "tcp", "grpc")
    SHM_FIELD_NUMBER: _ClassVar[int]
    TCP_FIELD_NUMBER: _ClassVar[int]
    GRPC_FIELD_NUMBER: _ClassVar[int]
    shm: str
    tcp: str
    grpc: str
    def __init__(self, shm: _Optional[str] = ..., tcp: _Optional[str] = ..., grpc: _Optional[str] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("namespace", "keys", "lease_ms", "lease")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    lease_ms: int
    lease: bool
    def __init__(self, namespace: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ..., lease_ms: _Optional[int] = ..., lease: _Optional[bool] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("blocks", "token", "ttl_ms", "endpoint", "epoch")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    token: bytes
    ttl_ms: int
    endpoint: Endpoint
    epoch: bytes
    def __init__(self, blocks: _Optional[int] = ..., token: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ..., endpoint: _Optional[_Union[Endpoint, _Mapping]] = ..., epoch: _Optional[bytes] = ...) -> None: ...

class BlockMeta(_message.Message):
    __slots__ = ("key", "parent", "length")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent: bytes
    length: int
    def __init__(self, key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., length: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("namespace", "blocks", "lease_ms", "tenant", "keep_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KEEP_S_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    blocks: _containers.RepeatedCompositeFieldContainer[BlockMeta]
    lease_ms: int
    tenant: bytes
    keep_s: int
    def __init__(self, namespace: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[BlockMeta, _Mapping]]] = ..., lease_ms: _Optional[int] = ..., tenant: _Optional[bytes] = ..., keep_s: _Optional[int] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("admissions", "token", "ttl_ms", "endpoint", "epoch")
    ADMISSIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    admissions: _containers.RepeatedScalarFieldContainer[Admission]
    token: bytes
    ttl_ms: int
    endpoint: Endpoint
    epoch: bytes
    def __init__(self, admissions: _Optional[_Iterable[_Union[Admission, str]]] = ..., token: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ..., endpoint: _Optional[_Union[Endpoint, _Mapping]] = ..., epoch: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("token", "lease_ms")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    lease_ms: int
    def __init__(self, token: _Optional[bytes] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("ttl_ms",)
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ttl_ms: int
    def __init__(self, ttl_ms: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    def __init__(self, token: _Optional[bytes] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreInfo(_message.Message):
    __slots__ = ("id", "epoch", "endpoint", "budget_bytes", "used_bytes", "blocks", "reads", "writes", "evictions", "corrupt_blocks", "dropped_writes", "draining", "read_bytes", "written_bytes", "leases", "disks")
    ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    WRITES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_WRITES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    DISKS_FIELD_NUMBER: _ClassVar[int]
    id: str
    epoch: bytes
    endpoint: Endpoint
    budget_bytes: int
    used_bytes: int
    blocks: int
    reads: int
    writes: int
    evictions: int
    corrupt_blocks: int
    dropped_writes: int
    draining: bool
    read_bytes: int
    written_bytes: int
    leases: int
    disks: _containers.RepeatedCompositeFieldContainer[DiskInfo]
    def __init__(self, id: _Optional[str] = ..., epoch: _Optional[bytes] = ..., endpoint: _Optional[_Union[Endpoint, _Mapping]] = ..., budget_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., reads: _Optional[int] = ..., writes: _Optional[int] = ..., evictions: _Optional[int] = ..., corrupt_blocks: _Optional[int] = ..., dropped_writes: _Optional[int] = ..., draining: _Optional[bool] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., leases: _Optional[int] = ..., disks: _Optional[_Iterable[_Union[DiskInfo, _Mapping]]] = ...) -> None: ...

class DiskInfo(_message.Message):
    __slots__ = ("folder", "state", "problem", "budget_bytes", "used_bytes", "errors")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    folder: str
    state: str
    problem: str
    budget_bytes: int
    used_bytes: int
    errors: int
    def __init__(self, folder: _Optional[str] = ..., state: _Optional[str] = ..., problem: _Optional[str] = ..., budget_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., errors: _Optional[int] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatReply(_message.Message):
    __slots__ = ("info", "namespaces", "counters", "scrub", "pins", "pinned_bytes")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    INFO_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SCRUB_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    info: StoreInfo
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceInfo]
    counters: _containers.ScalarMap[str, int]
    scrub: ScrubReply
    pins: int
    pinned_bytes: int
    def __init__(self, info: _Optional[_Union[StoreInfo, _Mapping]] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceInfo, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., scrub: _Optional[_Union[ScrubReply, _Mapping]] = ..., pins: _Optional[int] = ..., pinned_bytes: _Optional[int] = ...) -> None: ...

class NamespaceInfo(_message.Message):
    __slots__ = ("namespace", "payload_bytes", "slot_bytes", "slots_per_segment", "segments", "blocks", "free_slots")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    payload_bytes: int
    slot_bytes: int
    slots_per_segment: int
    segments: int
    blocks: int
    free_slots: int
    def __init__(self, namespace: _Optional[str] = ..., payload_bytes: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., slots_per_segment: _Optional[int] = ..., segments: _Optional[int] = ..., blocks: _Optional[int] = ..., free_slots: _Optional[int] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    def __init__(self, key: _Optional[bytes] = ...) -> None: ...

class BlockInfo(_message.Message):
    __slots__ = ("namespace", "key", "parent", "sequence", "payload_bytes", "payload_crc32c", "path", "slot", "offset", "pinned")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_CRC32C_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    key: bytes
    parent: bytes
    sequence: int
    payload_bytes: int
    payload_crc32c: int
    path: str
    slot: int
    offset: int
    pinned: bool
    def __init__(self, namespace: _Optional[str] = ..., key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., sequence: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., payload_crc32c: _Optional[int] = ..., path: _Optional[str] = ..., slot: _Optional[int] = ..., offset: _Optional[int] = ..., pinned: _Optional[bool] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("namespace", "keys", "for_s", "last")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FOR_S_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    for_s: int
    last: bytes
    def __init__(self, namespace: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ..., for_s: _Optional[int] = ..., last: _Optional[bytes] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("namespace", "keys", "coldest", "whole")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    COLDEST_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    keys: BlockKeys
    coldest: int
    whole: bool
    def __init__(self, namespace: _Optional[str] = ..., keys: _Optional[_Union[BlockKeys, _Mapping]] = ..., coldest: _Optional[int] = ..., whole: _Optional[bool] = ...) -> None: ...

class BlockKeys(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("evicted", "kept", "freed_bytes")
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    evicted: int
    kept: int
    freed_bytes: int
    def __init__(self, evicted: _Optional[int] = ..., kept: _Optional[int] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class ScrubRequest(_message.Message):
    __slots__ = ("action",)
    ACTION_FIELD_NUMBER: _ClassVar[int]
    action: ScrubAction
    def __init__(self, action: _Optional[_Union[ScrubAction, str]] = ...) -> None: ...

class ScrubReply(_message.Message):
    __slots__ = ("state", "blocks_done", "blocks_total", "bytes_done", "corrupt", "seconds", "bytes_per_s_max", "passes")
    STATE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_DONE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_MAX_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    state: str
    blocks_done: int
    blocks_total: int
    bytes_done: int
    corrupt: int
    seconds: float
    bytes_per_s_max: int
    passes: int
    def __init__(self, state: _Optional[str] = ..., blocks_done: _Optional[int] = ..., blocks_total: _Optional[int] = ..., bytes_done: _Optional[int] = ..., corrupt: _Optional[int] = ..., seconds: _Optional[float] = ..., bytes_per_s_max: _Optional[int] = ..., passes: _Optional[int] = ...) -> None: ...
