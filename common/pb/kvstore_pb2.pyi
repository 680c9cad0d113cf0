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
ADMISSION_UNSPECIFIED: Admission
ACCEPTED: Admission
PRESENT: Admission
IN_FLIGHT: Admission
DROPPED: Admission
INVALID: Admission

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
    __slots__ = ("namespace", "blocks", "lease_ms")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    blocks: _containers.RepeatedCompositeFieldContainer[BlockMeta]
    lease_ms: int
    def __init__(self, namespace: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[BlockMeta, _Mapping]]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("id", "epoch", "endpoint", "budget_bytes", "used_bytes", "blocks", "reads", "writes", "evictions", "corrupt_blocks", "dropped_writes", "draining", "read_bytes", "written_bytes", "leases")
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
    def __init__(self, id: _Optional[str] = ..., epoch: _Optional[bytes] = ..., endpoint: _Optional[_Union[Endpoint, _Mapping]] = ..., budget_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., reads: _Optional[int] = ..., writes: _Optional[int] = ..., evictions: _Optional[int] = ..., corrupt_blocks: _Optional[int] = ..., dropped_writes: _Optional[int] = ..., draining: _Optional[bool] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., leases: _Optional[int] = ...) -> None: ...
