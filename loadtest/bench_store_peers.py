"""`make bench-store-peers`: the same blocks through Penstock's kvstore, LMCache's disk backend and Mooncake Store's SSD offload.

    python -m loadtest.bench_store_peers [--blocks 128] [--block-bytes 2097152] [--rounds 5]

Every store runs in a process of its own, on the same file system, and they take turns within each
round, in changing order, so that drift of the machine meets all of them alike:
1. `put`: a round's blocks, which nobody has seen before. Its end is when the store says that a block is on
   disk: Penstock answers so (synced), LMCache calls back (written, not synced), Mooncake's files have grown by it.
   `put_durable` ends when they are synced as well, by us where the store doesn't. A power cut may take what isn't.
2. `get` of an older round's blocks, one after another.
3. `batched_get` of the same, in one call.
At the end every accepted block of every round is read again. All bytes that are read are compared with
those that were written; page caches are dropped before reading. The first rounds only put.

The sum: a round is 256 MiB; at the 1.2 GB/s that this disk reads, a perfect store needs 0.22 s. Penstock's
bytes cross from one process to another; the peers' are wanted in the process that owns the disk.

The last line is JSON. A peer that can't be installed or fails is reported as not run, with the reason.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from loadtest.peers import environment

REPOSITORY = Path(__file__).resolve().parents[1]
MODULES = {
    "penstock": "loadtest.peers.penstock_kvstore",
    "lmcache": "loadtest.peers.lmcache_disk",
    "mooncake": "loadtest.peers.mooncake_ssd",
}
OPERATIONS = ("put", "put_durable", "get", "batched_get")
LAG = 3  # rounds between writing and reading: Mooncake's memory holds two
GB = 1e9


class NotRun(Exception):
    """A store that has no figures; the text is the reason."""


class Contestant:
    """A store in its process."""

    def __init__(self, name: str, python: Path, folder: Path, args: argparse.Namespace) -> None:
        self.name = name
        self.samples: dict[str, list[float]] = {}  # GB/s by operation
        self.put_blocks = 0
        self.read_blocks = 0
        self.wrong_blocks = 0
        self.how = ""
        self._log = folder / f"{name}.log"
        argv = [str(python), "-P", "-m", MODULES[name], "--folder", str(folder / name)]
        for flag in ("blocks", "block_bytes", "seed"):
            argv += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
        argv += [flag for chosen, flag in (one.split(":", 1) for one in args.flag) if chosen == name]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            )
        self._answer()

    def ask(self, do: str, **more: int) -> dict[str, Any]:
        """Raises `NotRun`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do} | more) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise NotRun(self._why()) from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NotRun(self._why())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _why(self) -> str:
        status = self._process.wait()
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"its process ended with {status}: {' | '.join(lines[-3:])}"

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone already
            self._process.stdin.close()
        self._process.wait()


class Race:
    """Rounds over the contestants that are still running."""

    def __init__(self, contestants: list[Contestant], reasons: dict[str, str], args: argparse.Namespace) -> None:
        self.contestants = contestants
        self.reasons = reasons
        self._args = args

    def run(self) -> None:
        for round_ in range(LAG + self._args.rounds):
            turn = round_ % max(1, len(self.contestants))
            for one in self.contestants[turn:] + self.contestants[:turn]:
                self._guarded(one, round_)
            print(f"round {round_ + 1} of {LAG + self._args.rounds}", file=sys.stderr)
        for one in list(self.contestants):
            self._guarded(one, None)

    def _guarded(self, one: Contestant, round_: int | None) -> None:
        try:
            if round_ is None:
                answer = one.ask("verify")
                one.read_blocks, one.wrong_blocks = answer["right"], one.wrong_blocks + answer["wrong"]
                one.how = answer["how"]
            else:
                self._round(one, round_)
        except NotRun as why:
            self.contestants.remove(one)
            self.reasons[one.name] = str(why)
            one.close()

    def _round(self, one: Contestant, round_: int) -> None:
        put = one.ask("put", round_=round_)
        one.put_blocks += put["accepted"]
        if round_ < LAG:
            return
        self._note(one, "put_accepted", put["accepted"], put["accepted_s"])
        for operation, seconds in (("put", put["stored_s"]), ("put_durable", put["durable_s"])):
            if seconds is not None:
                self._note(one, operation, put["accepted"], seconds)
        for operation in ("get", "batched_get"):
            answer = one.ask(operation, round_=round_ - LAG)
            self._note(one, operation, answer["right"], answer["seconds"])
            one.wrong_blocks += answer["wrong"]

    def _note(self, one: Contestant, operation: str, blocks: int, seconds: float) -> None:
        one.samples.setdefault(operation, []).append(blocks * self._args.block_bytes / seconds / GB)


def summary(contestants: list[Contestant], reasons: dict[str, str]) -> dict[str, Any]:
    """Medians over the rounds, and Penstock's over each peer's."""
    out: dict[str, Any] = {}
    medians = {one.name: {name: statistics.median(values) for name, values in one.samples.items()} for one in contestants}
    for one in contestants:
        out |= {f"{one.name}_{name}_gb_per_s": round(value, 3) for name, value in medians[one.name].items()}
        out[f"{one.name}_by"] = one.how
        out[f"{one.name}_accepted_blocks"] = one.put_blocks
        out[f"{one.name}_readable_blocks"] = one.read_blocks
        out[f"{one.name}_wrong_blocks"] = one.wrong_blocks
    ours = medians.get("penstock", {})
    for peer, theirs in medians.items():
        if peer != "penstock":
            both = [name for name in OPERATIONS if name in ours and theirs.get(name)]
            ratios = {name: ours[name] / theirs[name] for name in both}
            out |= {f"{name}_over_{peer}": round(ratio, 2) for name, ratio in ratios.items()}
    return out | {f"{name}_not_run": reason for name, reason in reasons.items()}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=128, help="blocks of a round")
    parser.add_argument("--block-bytes", type=int, default=2 << 20, help="a multiple of 4096")
    parser.add_argument("--rounds", type=int, default=5, help=f"measured rounds; {LAG} that only put come before")
    parser.add_argument("--seed", type=int, default=1, help="of the blocks' bytes")
    parser.add_argument("--only", action="append", choices=list(MODULES), help="run these alone (repeatable)")
    parser.add_argument("--flag", action="append", default=[], metavar="STORE:FLAG", help="mooncake:--offload_on_evict=true")
    parser.add_argument("--data", type=Path, help="folder on the disk to measure; default: a temporary one")
    parser.add_argument("--environment", type=Path, default=environment.default_folder(), help="where the peers are installed")
    args = parser.parse_args()
    if args.block_bytes <= 0 or args.block_bytes % 4096:
        parser.error(f"--block-bytes {args.block_bytes}: expected a multiple of 4096, which O_DIRECT needs")
    return args


def start(folder: Path, args: argparse.Namespace) -> tuple[list[Contestant], dict[str, str]]:
    """The stores that could be started, and why the others could not."""
    contestants: list[Contestant] = []
    reasons: dict[str, str] = {}
    for name in args.only or MODULES:
        try:
            python = Path(sys.executable) if name == "penstock" else environment.python_of(args.environment)
            contestants.append(Contestant(name, python, folder, args))
        except (environment.NotInstalled, NotRun) as why:
            reasons[name] = str(why)
    return contestants, reasons


def main() -> None:
    args = parsed()
    with tempfile.TemporaryDirectory(dir=args.data) as folder:
        contestants, reasons = start(Path(folder), args)
        race = Race(contestants, reasons, args)
        try:
            race.run()
        finally:
            for one in race.contestants:
                one.close()
    facts = {"bench": "store-peers", "block_bytes": args.block_bytes, "blocks": args.blocks, "rounds": args.rounds}
    print(json.dumps(facts | summary(race.contestants, race.reasons)))


if __name__ == "__main__":
    main()
