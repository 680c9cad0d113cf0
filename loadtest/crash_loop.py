"""`make crash-loop`: a kvstore is killed at random moments, a thousand times, and must keep its promises.

    python -m loadtest.crash_loop --kills 1000 [--seed 1] [--stores 2] [--flag=--no-direct]

Real kvstore processes, real writers and readers over gRPC and the byte plane. A life: the process is
started, everything promised is read back, writers and readers work, SIGKILL comes. Half of the
lives keep what was not synced in the process, so that their SIGKILL is a power cut; some are killed
while they start, some while they drain after SIGTERM (or end in time). Several stores live side by side, each with a folder and a ledger of its own.

The promises:
1. No byte is served that was not written (every read is compared).
2. A block that was answered OK and is leased is there after every crash.
3. The folder never takes more than the budget on disk, as `du` counts.
4. The store starts again, by itself.

A run is planned by its seed: deaths, moments, carriers, chains. The first broken promise ends it, with exit
status 1, and the folder stays. The last line is JSON.
"""

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from loadtest.crash.ledger import BrokenPromise, Ledger, Promise
from loadtest.crash.life import Store, live
from loadtest.crash.plan import Death, Plan, plan_of

BUDGET_BYTES = 8 << 20  # some 330 blocks: soon full, so that slots are written over all the time
BAR = 30  # characters


class Loop:
    """Lives of several stores until there were enough kills."""

    def __init__(self, folder: Path, seed: int, kills: int, stores: int, flags: list[str]) -> None:
        self.counts: Counter[str] = Counter()
        self.stores = [Store(folder / f"store{i}", BUDGET_BYTES, flags) for i in range(stores)]
        self._seed = seed
        self._kills = kills
        self._living = 0

    async def run(self) -> None:
        """Raises `BrokenPromise`."""
        try:
            async with asyncio.TaskGroup() as group:
                for number, store in enumerate(self.stores):
                    group.create_task(self._lives(number, store))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _lives(self, number: int, store: Store) -> None:
        store.folder.mkdir(parents=True)
        ledger = Ledger(random.Random(f"{self._seed}/{number}"))
        life = 0
        while self.counts["kills"] + self._living < self._kills:
            plan = plan_of(f"{self._seed}/{number}/{life}")
            self._living += 1
            hit = await live(store, ledger, plan, self.counts)
            self._living -= 1
            self._count(plan, hit)
            life += 1

    def _count(self, plan: Plan, hit: bool) -> None:
        if not hit:
            self.counts["clean_ends"] += 1
            return
        self.counts["kills"] += 1
        self.counts["power_cuts"] += plan.death is Death.POWER
        self.counts["kills_while_starting"] += plan.while_starting
        self.counts["kills_while_draining"] += plan.warning_s is not None and not plan.while_starting
        self._show()

    def _show(self) -> None:
        done = self.counts["kills"]
        bar = "#" * (BAR * done // self._kills)
        text = f"[{bar:<{BAR}}] {done} of {self._kills} kills, {self.counts['checked_blocks']} committed blocks found again"
        if sys.stderr.isatty():
            print(f"\r{text}", end="" if done < self._kills else "\n", file=sys.stderr, flush=True)
        elif done == self._kills or done % max(1, self._kills // 20) == 0:
            print(text, file=sys.stderr, flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None, help="plans the run; default: a random one, printed")
    parser.add_argument("--stores", type=int, default=2, help="stores side by side")
    parser.add_argument("--data", type=Path, help="folder to put the stores in; default: a temporary one")
    parser.add_argument("--flag", action="append", default=[], help="passed on to the kvstore (repeatable: --flag=--no-direct)")
    args = parser.parse_args()
    for name in ("kills", "stores"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    return args


def result(loop: Loop, seed: int, broken: BrokenPromise | None) -> dict[str, Any]:
    kinds = ("kills", "power_cuts", "kills_while_starting", "kills_while_draining", "clean_ends")
    counted = (*kinds, "committed_blocks", "checked_blocks", "reads")
    promises = {promise.value.replace(" ", "_"): int(broken is not None and broken.promise is promise) for promise in Promise}
    return {
        "bench": "crash-loop",
        "seed": seed,
        **{name: loop.counts[name] for name in counted},
        **promises,
        "budget_bytes": BUDGET_BYTES,
        "peak_bytes": max(store.peak_bytes for store in loop.stores),
    }


def main() -> int:
    args = parsed()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="crash-", dir=args.data))
    loop = Loop(folder, seed, args.kills, args.stores, args.flag)
    broken: BrokenPromise | None = None
    try:
        asyncio.run(loop.run())
    except BrokenPromise as error:
        broken = error
        print(f"\nbroken promise: {error}\nseed {seed}; what is left is in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    print(json.dumps(result(loop, seed, broken)))
    return int(broken is not None)


if __name__ == "__main__":
    sys.exit(main())
