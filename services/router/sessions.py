"""One connection to a peer, from handshake to loss: connect -> Describe -> (decode) open the stream -> poll -> lost.

`session` always ends by raising, with why. Whatever the peer says of itself goes to `described`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from common.aio import first_of
from common.clients.decode import DecodeConnection
from common.clients.kvstore import KvStoreClient
from common.clients.prefill import PrefillConnection
from common.errors import DeadlineExceeded, Unavailable
from services.router.peers import Peer, PeerInfo, store_info, worker_info

DESCRIBE_TIMEOUT_S = 2.0
POLL_S = 1.0  # without fresh loads over NATS
POLL_SLOW_S = 5.0  # with them
UNANSWERED_MAX = 5  # polls in a row: ten seconds of silence on a live connection is a stuck process

Described = Callable[[Peer, PeerInfo], None]
Describe = Callable[[], Awaitable[PeerInfo]]


async def session(peer: Peer, described: Described) -> None:
    """Raises `PenstockError` when the connection is lost, or was never made."""
    sessions = {"decode": _decode_session, "prefill": _prefill_session, "kvstore": _store_session}
    await sessions[peer.role](peer, described)


async def _decode_session(peer: Peer, described: Described) -> None:
    connection = DecodeConnection(peer.address)

    async def describe() -> PeerInfo:
        return worker_info(await connection.describe(DESCRIBE_TIMEOUT_S))

    def opened() -> None:
        peer.connection = connection
        described(peer, info)

    try:
        info = await describe()
        await first_of(connection.serve(opened), _poll(peer, describe, described))
    finally:
        peer.connection = None
        await connection.close()


async def _prefill_session(peer: Peer, described: Described) -> None:
    connection = PrefillConnection(peer.address)

    async def describe() -> PeerInfo:
        return worker_info(await connection.describe(DESCRIBE_TIMEOUT_S))

    try:
        info = await describe()
        peer.prefill = connection
        described(peer, info)
        await _poll(peer, describe, described)
    finally:
        peer.prefill = None
        await connection.close()


async def _store_session(peer: Peer, described: Described) -> None:
    store = KvStoreClient(peer.address)

    async def describe() -> PeerInfo:
        return store_info(await store.describe(deadline_s=DESCRIBE_TIMEOUT_S))

    try:
        info = await describe()
        peer.store = store
        described(peer, info)
        await _poll(peer, describe, described)
    finally:
        peer.store = None
        await store.close()


async def _poll(peer: Peer, describe: Describe, described: Described) -> None:
    unanswered = 0
    while True:
        await asyncio.sleep(POLL_SLOW_S if peer.nats_fresh(time.monotonic()) else POLL_S)
        try:
            info = await describe()
            unanswered = 0
        except DeadlineExceeded:
            unanswered += 1
            if unanswered >= UNANSWERED_MAX:
                raise Unavailable(f"{peer.role} {peer.address}: connected, but {unanswered} calls went unanswered") from None
            continue
        if peer.info is not None and info.epoch != peer.info.epoch:
            raise Unavailable(f"{peer.role} {peer.address}: restarted")
        described(peer, info)
