"""The small parts of the byte plane: checksums, counters, gRPC's chunks, streams."""

import asyncio
import random
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import TransferFailed
from common.pb import bytes_pb2
from common.transport.counters import Flow
from common.transport.grpc_carrier import pack_chunk, unpack_chunk
from common.transport.interface import PartStatus
from common.transport.memory import (
    SUM_BYTES,
    Checksums,
    checksums,
    checksums_in_turns,
    checksums_of_copy,
    copy_with_checksum,
    crc32c,
    crc32c_in_turns,
)
from common.transport.streams import SocketStream
from tests.contract.wire import until


def test_crc32c_is_the_published_one() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C (RFC 3720, appendix B.4 uses it)
    assert crc32c(b"") == 0
    assert crc32c(memoryview(bytearray(32))) == 0x8A9136AA  # RFC 3720, B.4: 32 bytes of zeros


@pytest.mark.parametrize("size", [1, 4096, (1 << 18) + 1, (3 << 20) + 7])
async def test_a_copy_returns_the_checksum_of_its_bytes(size: int) -> None:
    source = memoryview(bytearray(range(256)) * (size // 256 + 1))[:size]
    assert await crc32c_in_turns(source) == crc32c(source)
    into = memoryview(bytearray(size))
    assert await copy_with_checksum(into, source) == crc32c(source) and into == source
    into = memoryview(bytearray(size))
    assert await checksums_of_copy(into, source) == await checksums_in_turns(source) == checksums(source) and into == source


@pytest.mark.parametrize("size", [0, 1, SUM_BYTES - 1, SUM_BYTES, SUM_BYTES + 1, 5 * SUM_BYTES, 37 * SUM_BYTES + 4096])
def test_the_pieces_checksums_give_the_whole_s(size: int) -> None:
    data = random.Random(size).randbytes(size)
    pieces = [crc32c(data[at : at + SUM_BYTES]) for at in range(0, size, SUM_BYTES)]
    assert checksums(data) == Checksums(crc32c(data), pieces)


async def test_a_copy_gives_others_their_turn_and_ends_when_its_buffer_is_taken_back() -> None:
    memory = bytearray(8 << 20)
    source, into = memoryview(bytearray(b"\x01" * (8 << 20))), memoryview(memory)
    copying = asyncio.create_task(checksums_of_copy(into, source))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    into.release()
    done = memory.count(1)
    assert 0 < done < 8 << 20
    with pytest.raises(ValueError, match="released"):
        await copying
    assert memory.count(1) == done


@given(st.binary(max_size=1 << 15))
def test_our_chunks_are_protobuf_s(data: bytes) -> None:
    assert pack_chunk(data) == bytes_pb2.Chunk(data=data).SerializeToString() or not data
    assert bytes_pb2.Chunk.FromString(pack_chunk(data)).data == data
    assert unpack_chunk(bytes_pb2.Chunk(data=data).SerializeToString()) == data


def test_a_chunk_with_an_unknown_field_is_still_read() -> None:
    assert bytes(unpack_chunk(b"\x10\x05" + pack_chunk(b"abc"))) == b"abc"


def test_busy_time_counts_overlapping_transfers_once() -> None:
    now = 0.0
    flow = Flow(lambda: now)
    with flow.transfer():
        now = 1.0
        with flow.transfer():
            now = 3.0
        assert flow.busy_s == 3.0
        now = 4.0
    now = 9.0
    assert flow.busy_s == 4.0
    flow.count([PartStatus.OK, PartStatus.CORRUPT], [10, 20])
    assert (flow.bytes, flow.parts_ok, flow.parts_failed) == (10, 1, 1)


def stream_pair() -> tuple[SocketStream, SocketStream]:
    one, two = socket.socketpair()
    return SocketStream(one), SocketStream(two)


async def test_what_is_taken_back_while_sending_goes_out_as_zeros_and_the_rest_as_it_is() -> None:
    near, far = stream_pair()
    view = memoryview(bytearray(b"\xaa" * (8 << 20)))
    sending = asyncio.create_task(near.send([b"head", view, b"tail", memoryview(b"x" * 5)]))
    await asyncio.sleep(0)
    view.release()
    into = bytearray((8 << 20) + 13)
    assert await far.receive(memoryview(into), len(into))
    await sending
    assert into[:4] == b"head" and into[-9:] == b"tailxxxxx"
    body = bytes(into[4:-9])
    assert body == b"\xaa" * body.count(b"\xaa") + bytes(body.count(b"\0")) and body.count(b"\0") > 0
    await near.close()
    await far.close()


async def test_what_is_taken_back_while_receiving_is_dropped_and_the_next_bytes_arrive() -> None:
    near, far = stream_pair()
    memory = bytearray(1000)
    view = memoryview(memory)[:900]
    receiving = asyncio.create_task(far.receive(view, 900))
    await near.send([b"\x01" * 300])
    await until(lambda: far.received_bytes == 300)
    view.release()
    await near.send([b"\x02" * 600, b"next"])
    assert await receiving is False
    assert memory == b"\x01" * 300 + bytes(700)
    into = bytearray(4)
    assert await far.receive(memoryview(into), 4) and into == b"next"
    await near.close()
    await far.close()


async def test_the_end_of_a_stream_and_an_abort_are_told_apart() -> None:
    near, far = stream_pair()
    waiting = asyncio.create_task(near.receive(memoryview(bytearray(4)), 4))
    await asyncio.sleep(0)
    near.abort()
    with pytest.raises(TransferFailed, match="was closed"):
        await waiting
    assert not near.ended
    await near.close()
    with pytest.raises(TransferFailed, match="4 bytes short"):
        await far.receive(memoryview(bytearray(4)), 4)
    assert far.ended
    with pytest.raises(TransferFailed):
        await far.send([b"x" * 100, b"y"])
        await far.send([b"x"])
    await far.close()
