"""`penstock store` on kvstores that run: stat, scrub, evict, pin, unpin, dump-block, over gRPC."""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Literal

import msgspec

from common.blocks import Namespace
from common.clients.kvstore import KvStoreClient
from common.clients.kvstore_admin import EVICT_MAX, KvStoreAdmin
from common.errors import NotFound, TransferFailed
from common.transport.client import connect
from common.transport.interface import Part, PartStatus, Span
from common.transport.region import Region
from services.cli.store_text import header_lines, hex_lines, scrub_line, stat_lines

WATCH_S = 0.5
READ_DEADLINE_S = 30.0
LEASE_S = 60.0


async def run(given: argparse.Namespace, addresses: Sequence[str]) -> int:
    """Asks every store in turn; the worst exit status."""
    if given.command == "dump-block":
        return await _dump(given, addresses)
    if given.command in ("pin", "unpin"):
        return await _pin(given, addresses)
    worst = 0
    for address in addresses:
        store = KvStoreAdmin(address)
        try:
            match given.command:
                case "stat":
                    status = await _stat(given, store)
                case "scrub":
                    status = await _scrub(given, store)
                case _:
                    status = await _evict(given, store)
        finally:
            await store.close()
        worst = max(worst, status)
    return worst


async def _stat(given: argparse.Namespace, store: KvStoreAdmin) -> int:
    stat = await store.stat()
    if given.json:
        document = msgspec.to_builtins(stat)
        document["info"]["epoch"] = stat.info.epoch.hex()
        print(json.dumps(document, indent=2))
    else:
        print("\n".join(stat_lines(store.address, stat)))
    return 1 if any(disk.problem for disk in stat.info.disks) else 0


async def _scrub(given: argparse.Namespace, store: KvStoreAdmin) -> int:
    action: Literal["REPORT", "START", "STOP"] = "START" if given.start else "STOP" if given.stop else "REPORT"
    before = await store.scrub("REPORT")
    report = await store.scrub(action)
    while given.wait and (report.state == "running" or (given.start and report.passes == before.passes)):
        await asyncio.sleep(WATCH_S)
        report = await store.scrub("REPORT")
    print(json.dumps(msgspec.to_builtins(report), indent=2) if given.json else f"{store.address}: {scrub_line(report)}")
    return 1 if given.wait and report.corrupt else 0


async def _evict(given: argparse.Namespace, store: KvStoreAdmin) -> int:
    namespace = given.namespace or ""
    evicted = kept = freed_bytes = 0
    if given.key:
        keys = [bytes.fromhex(key) for key in given.key]
        while True:
            step = await store.evict_keys(keys, namespace)
            evicted, kept = evicted + step.evicted, step.kept
            if not step.evicted or not step.kept:
                break
    elif given.fraction is not None:
        stat = await store.stat()
        blocks = sum(one.blocks for one in stat.namespaces if namespace in ("", one.namespace))
        left = round(given.fraction * blocks)
        while left > 0:
            step = await store.evict_coldest(min(left, EVICT_MAX), namespace)
            if not step.evicted:
                kept = left
                break
            evicted, left = evicted + step.evicted, left - step.evicted
    else:
        while True:
            step = await store.evict_namespace(namespace)
            evicted, kept, freed_bytes = evicted + step.evicted, step.kept, freed_bytes + step.freed_bytes
            if not step.evicted or not step.kept:
                break
    print(
        f"{store.address}: {evicted:,} blocks evicted, {kept:,} kept (leased, pinned, or on a disk that takes no writes), {freed_bytes:,} bytes freed"
    )
    return 0


async def _pin(given: argparse.Namespace, addresses: Sequence[str]) -> int:
    """0 when every chain was found at one store at least."""
    for_s = given.for_s if given.command == "pin" else 0
    found = dict.fromkeys(given.key, 0)
    for address in addresses:
        store = KvStoreAdmin(address)
        try:
            for key in found:
                blocks = await store.pin(bytes.fromhex(key), for_s)
                found[key] += blocks
                if blocks:
                    print(f"{address}: {key}: {blocks:,} blocks {f'kept for {for_s:,} s' if for_s else 'no longer kept'}")
        finally:
            await store.close()
    for key in [key for key, blocks in found.items() if not blocks]:
        print(f"penstock store: {key} is not {'stored' if for_s else 'pinned'} at {', '.join(addresses)}", file=sys.stderr)
    return 0 if all(found.values()) else 1


async def _dump(given: argparse.Namespace, addresses: Sequence[str]) -> int:
    key = bytes.fromhex(given.key)
    for address in addresses:
        store = KvStoreAdmin(address)
        try:
            info = await store.inspect(key)
        except NotFound:
            continue
        finally:
            await store.close()
        print("\n".join(header_lines(msgspec.structs.asdict(info))))
        payload = await _payload(address, Namespace(info.namespace), key, info.payload_bytes)
        if given.raw is None:
            print("\n".join(["", *hex_lines(payload)]))
        else:
            given.raw.write_bytes(payload)
            print(f"{len(payload):,} bytes written to {given.raw}")
        return 0
    print(f"penstock store: block {given.key} is not stored at {', '.join(addresses)}", file=sys.stderr)
    return 1


async def _payload(address: str, namespace: Namespace, key: bytes, length: int) -> bytes:
    """A block's bytes, verified, over the byte plane."""
    client = KvStoreClient(address)
    region = Region(length)
    try:
        found = await client.lookup(namespace, [key], LEASE_S)
        if found is None:
            raise NotFound(f"block {key.hex()} went away at {address}")
        transport = await connect(found.endpoint, region)
        try:
            (status,) = await transport.read(found.token, [Part(0, 0, length)], [Span(0, length)], deadline_s=READ_DEADLINE_S)
        finally:
            await transport.close()
            await client.release(found.token)
        if status is not PartStatus.OK:
            raise TransferFailed(f"block {key.hex()} at {address}: {status.name.lower()}")
        return bytes(region.view(Span(0, length)))
    finally:
        region.close()
        await client.close()
