"""`penstock explain [REQUEST_ID]`: why a request took its route, what the others would have taken, and what it then took."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from services.cli import state, web
from services.cli.status import table

_TIMEOUT_S = 5.0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="penstock explain", description=__doc__.strip(), allow_abbrev=False)
    parser.add_argument(
        "id", nargs="?", default="", metavar="REQUEST_ID", help="of the request or its answer; none: the last one"
    )
    parser.add_argument("--data", default="data", metavar="DIR", help="the folder given to up (default: data)")
    parser.add_argument("--url", default="", help="ask this router instead of the data folder's (http://host:port)")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    given = parser.parse_args(argv)
    url = given.url
    if not url:
        data = Path(given.data).expanduser().resolve()
        cluster = state.read(data)
        if cluster is None or not cluster.url:
            print(f"No cluster runs on {data}. Start one with: penstock up --data {data}")
            return 1
        url = cluster.url
    path = f"/v1/penstock/explain/{quote(given.id, safe='')}" if given.id else "/v1/penstock/explain"
    answer = web.get(url.rstrip("/") + path, _TIMEOUT_S)
    if answer is None or not isinstance(answer.body, dict):
        print(f"The router at {url} does not answer.")
        return 1
    if answer.status != 200:
        print(answer.body.get("error", {}).get("message", f"The router answered {answer.status}."))
        return 1
    print(json.dumps(answer.body, indent=2) if given.json else "\n".join(report(answer.body)))
    return 0


def report(body: Mapping[str, Any]) -> list[str]:
    """The explanation for people. Pure."""
    lines: list[str] = []
    for decision in body["decisions"]:
        lines += [*([""] if lines else []), *_decision(decision)]
    return lines


def _decision(decision: Mapping[str, Any]) -> list[str]:
    query = decision["query"]
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision["at"]))
    move = f", move {decision['move']}" if decision["move"] else ""
    stored = f"{query['stored_blocks']} blocks of it stored at {query['kvstore']}" if query["stored_blocks"] else "nothing stored"
    lines = [
        f"request {decision['request_id']}, choice {decision['choice']}{move}, placed {at}",
        f"prompt of {query['prompt_tokens']:,} tokens, {stored}",
    ]
    if decision.get("refused"):
        return [*lines, f"refused ({decision['refused']}): {decision['reason']}"]
    names = {worker["address"]: worker["id"] for worker in decision["workers"]}
    lines += [f"{names.get(address, address)} still holds {blocks} blocks" for address, blocks in query["resident"].items()]
    lines += ["", *table([["WORKER", "ROLE", "QUEUED", "COMPUTES", *_LINK_TITLES], *map(_worker, decision["workers"])])]
    titles = ["  PLAN", "DECODE", "PREFILL", "FINISH", "FIRST TOKEN", "LOADED", "QUEUE", "COMPUTED", "BLOCKS FROM"]
    lines += ["", *table([titles, *(_candidate(c, names) for c in decision["candidates"])])]
    return [*lines, "", f"* {decision['reason']}", *_took(decision.get("took"))]


_LINKS = {"storage": "READS STORAGE", "peer_read": "PREFILL READS", "peer_write": "PREFILL WRITES"}
_LINK_TITLES = list(_LINKS.values())


def _worker(worker: Mapping[str, Any]) -> list[str]:
    speed = worker["prefill_tokens_per_s"]
    computes = f"{speed:,.0f} tokens/s" if speed else "not measured"
    return [
        worker["id"],
        worker["role"],
        f"{worker['queued_tokens']:,.0f} tokens",
        computes,
        *(_link(worker[key]) for key in _LINKS),
    ]


def _link(link: Mapping[str, Any]) -> str:
    rate = f"{link['bytes_per_s'] / 1e6:,.1f} MB/s" if link["bytes_per_s"] else "not measured"
    return f"{rate}, {link['queue_bytes'] / 1e6:,.1f} MB queued" if link["queue_bytes"] >= 5e4 else rate


def _candidate(candidate: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    legs = [f"[{leg['first_block']}, {leg['last_block']}) {leg['source']}" for leg in candidate["legs"]]
    return [
        ("* " if candidate["chosen"] else "  ") + candidate["plan"],
        names.get(candidate["decode"], candidate["decode"]),
        names.get(candidate["prefill"], "-"),
        _seconds(candidate["finish_s"]),
        _seconds(candidate["first_token_s"]),
        _seconds(candidate["load_s"]),
        _seconds(candidate["wait_s"]),
        f"{candidate['computed_tokens']:,}",
        ", ".join(legs) or "-",
    ]


def _took(took: Mapping[str, Any] | None) -> list[str]:
    """What then happened."""
    if took is None or took["first_token_s"] is None:
        return [
            "  no token has come yet"
            if took is None or not took.get("ended")
            else f"  it ended without a token ({took['ended']})"
        ]
    lines = [f"  first token after {_seconds(took['first_token_s'])}, {took['over_estimate']:.2f} times the estimate"]
    if "plan" in took:
        lines[0] += f"; carried out as {took['plan']}, {took['cached_tokens']:,} tokens not computed again"
        lines.append(f"  queue {_seconds(took['queue_s'])}, prefill {_seconds(took['prefill_s'])}")
        lines += [f"  {_path(name, flow)}" for name, flow in took["paths"].items() if flow["bytes"]]
        lines += [f"  {took['prefill']} still held {took['kept_tokens']:,} of these tokens"] if took["kept_tokens"] else []
        lines += [f"  fell back: {took['fallback']}"] if took["fallback"] else []
        if took["prefill_retries"]:
            lines.append(
                f"  asked {took['prefill_retries']} more of prefill; {took['prefill'] or 'decode'} brought it to its end"
            )
    return lines


def _path(name: str, flow: Mapping[str, Any]) -> str:
    rate = f", {flow['bytes'] / flow['seconds'] / 1e6:,.1f} MB/s" if flow["seconds"] else ""
    return f"{name.replace('_to_', ' -> ')}: {flow['bytes'] / 1e6:,.2f} MB in {_seconds(flow['seconds'])}{rate}"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:,.2f} s"
