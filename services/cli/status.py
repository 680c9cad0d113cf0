"""`penstock status`: what the launcher runs, and what the router says of the members and their load."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from services.cli import state, web
from services.cli.state import ClusterState

_TIMEOUT_S = 5.0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="penstock status", description=__doc__.strip(), allow_abbrev=False)
    parser.add_argument("--data", default="data", metavar="DIR", help="the folder given to up (default: data)")
    parser.add_argument("--url", default="", help="ask this router instead of the data folder's (http://host:port)")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    given = parser.parse_args(argv)
    data = Path(given.data).expanduser().resolve()
    cluster = None if given.url else state.read(data)
    if cluster is None and not given.url:
        print(f"No cluster runs on {data}. Start one with: penstock up --data {data}")
        return 1
    url = given.url or (cluster.url if cluster else "")
    answer = web.get(url.rstrip("/") + "/v1/penstock/status", _TIMEOUT_S) if url else None
    router = answer.body if answer is not None and answer.status == 200 and isinstance(answer.body, dict) else None
    if given.json:
        print(json.dumps({"launcher": msgspec.to_builtins(cluster), "router": router}, indent=2))
    else:
        print("\n".join(report(cluster, url, router, time.time())))
    return 0 if router is not None and router.get("ready") else 1


def report(cluster: ClusterState | None, url: str, router: Mapping[str, Any] | None, now: float) -> list[str]:
    """The status for people. Pure but for asking the kernel whether processes live."""
    lines: list[str] = []
    if cluster is not None:
        running = f"launcher pid {cluster.launcher.pid}" if state.alive(cluster.launcher) else "its launcher is gone"
        lines += [f"{cluster.served_name} at {url or '(starting)'}   up {_span(now - cluster.started_at)}, {running}", ""]
        lines += table([["SERVICE", "STATE", "PID", "ADDRESS", "RESTARTS"], *(_service(service) for service in cluster.services)])
    if router is None:
        return [*lines, "", "The router does not answer." if url else "The router is not up yet."]
    lines += ["", _verdict(router), ""]
    return [*lines, *table([["MEMBER", "ROLE", "CONNECTED", "LOAD"], *(_member(member) for member in router.get("members", []))])]


def _service(service: state.ServiceState) -> list[str]:
    pid = str(service.process.pid) if service.process is not None and state.alive(service.process) else "-"
    shown = service.state if service.state == "ready" else f"{service.state}: {service.stage}"
    address = next((service.addresses[key] for key in ("http", "grpc", "nats") if key in service.addresses), "-")
    return [service.name, shown, pid, address, str(service.restarts)]


def _verdict(router: Mapping[str, Any]) -> str:
    nats = router.get("nats", {})
    plane = "NATS connected" if nats.get("connected") else "NATS not connected" if nats.get("url") else "no NATS"
    ready = "ready" if router.get("ready") else f"not ready: {router.get('reason')}"
    return f"{ready}; {router.get('in_flight', 0)} of {router.get('requests_max', 0)} sequences in flight; {plane}"


def _member(member: Mapping[str, Any]) -> list[str]:
    connected = "draining" if member.get("draining") else "yes" if member.get("usable") else "no"
    return [str(member.get("id")), str(member.get("role")), connected, load_in_words(member)]


def load_in_words(member: Mapping[str, Any]) -> str:
    """A member's load: a worker's batch and memory, a store's fill."""
    if not member.get("usable"):
        return str(member.get("detail", ""))
    store, load = member.get("store"), member.get("load")
    if store:
        used, budget = store.get("used_bytes", 0), store.get("budget_bytes", 0)
        share = f" ({used / budget:.0%})" if budget else ""
        failed = f", {store['disks_failed']} of its disks failed" if store.get("disks_failed") else ""
        return f"{size(used)} of {size(budget)}{share}, {store.get('blocks', 0):,} blocks, {store.get('evictions', 0):,} evicted{failed}"
    if not load:
        return str(member.get("detail", ""))
    total, free = load.get("pool_blocks_total", 0), load.get("pool_blocks_free", 0)
    pool = f", pool {(total - free) / total:.0%} of {total:,} blocks" if total else ""
    return f"{load.get('running', 0)} running, {load.get('waiting', 0)} waiting{pool}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _span(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{int(seconds)} s" if minutes < 1 else f"{minutes} min" if hours < 1 else f"{hours} h {minutes % 60} min"
