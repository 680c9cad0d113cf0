"""`make bench-dualpath`: what each route is worth, with real services on links of a known rate.

The sum, for the default sizes (`model.py`, `trajectories.py`, `experiment.py`): KV is 8,192 bytes a token, a prompt has 2,040 tokens on
average, so a turn loads 16.6 MB and computes some 43 tokens. A storage link brings KV four times as fast as a prefill worker makes it, which
is measured first; so a turn loads about ten times longer than it computes. With the links of P prefill and D decode workers in use the
same job can be (P + D) / P times quicker, and a little more where recomputing helps, until computing takes over (the `oracle` mode, where
loads cost nothing, says when).

1. Namespaces and links of a topology are built; those of dead runs are swept away.
2. The agents' contexts are stored (once for a seed), over unshaped links; recomputing is measured.
3. Each part measures its modes, each on a copy of that store (`experiment.py`).
4. The report: `report.html`, PNG plots, `figures.json`, and one JSON line on stdout.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from common.errors import PenstockError
from loadtest.dualpath import conclusions, namespaces, report
from loadtest.dualpath.cluster import no_gpu
from loadtest.dualpath.experiment import SIZES, Experiment, Results
from loadtest.dualpath.figures import Slo
from loadtest.dualpath.links import topology
from loadtest.dualpath.model import CPU, GPU
from loadtest.dualpath.modes import ABLATION, CROSSING_MODES, MODES, ONE_REQUEST_MODES, ONLINE_MODES
from loadtest.dualpath.said import say

PARTS = ("offline", "online", "one-request", "crossing")
DEFAULT_PARTS = ("offline", "online")
FULL_TOPOLOGIES = {"1P1D": PARTS, "1P2D": ("offline",), "2P1D": ("offline",)}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-dualpath", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--topology", default="", help="such as 1P1D,1P2D,2P1D (default: 1P1D)")
    parser.add_argument("--modes", default="", help=f"of {','.join(MODES)} (default: all that a part has)")
    for part in PARTS:
        parser.add_argument(
            f"--{part}", action="store_true", help=f"measure this part (default: {' and '.join(DEFAULT_PARTS)}, 6 to 9 minutes)"
        )
    parser.add_argument(
        "--full", action="store_true", help="larger jobs; by default every part of 1P1D, and 1P2D and 2P1D offline: half an hour"
    )
    parser.add_argument("--gpu", action="store_true", help="workers on CUDA devices, a larger model and the paper's own lengths")
    parser.add_argument("--data", type=Path, help="folder for the model and the stores (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="where reports go (default: %(default)s)")
    parser.add_argument("--into", type=Path, help="a report's folder to go on with: what is measured there is not measured again")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


def main() -> int:
    options = parse(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us in the background, with SIGINT ignored
        signal.signal(number, _interrupted)
    try:
        names = options.topology.split(",") if options.topology else FULL_TOPOLOGIES if options.full else ["1P1D"]
        topologies = [topology(name) for name in names]
        unknown = [mode for mode in filter(None, options.modes.split(",")) if mode not in MODES]
        if unknown:
            print(f"--modes: no mode {unknown[0]!r}; there are {', '.join(MODES)}", file=sys.stderr)
            return 2
        missing = namespaces.why_not() or (no_gpu() if options.gpu else "")
        if missing:
            print(f"bench-dualpath can't run here: {missing}", file=sys.stderr)
            return 2
        for name in namespaces.sweep():
            say(f"deleted {name}, left by a run that is gone")
        folder = options.into or options.out / time.strftime("dualpath-%Y%m%d-%H%M%S")
        with tempfile.TemporaryDirectory(prefix="penstock-lab-") as scratch:
            for shape in topologies:
                with namespaces.Lab(shape) as lab:
                    _measure(options, lab, options.data or Path(scratch), folder)
    except PenstockError as error:
        print(f"bench-dualpath: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench-dualpath: interrupted; what was measured is kept, --into goes on with it", file=sys.stderr)
        return 130
    found = Results(folder / "measured").all()
    page = report.write(folder, found, Slo())
    say(f"report: {page}")
    print(json.dumps({"benchmark": "dualpath", "report": str(page), **conclusions.ratios(found, Slo())}))
    return 0


def _measure(options: argparse.Namespace, lab: namespaces.Lab, data: Path, folder: Path) -> None:
    data.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "measured")
    wanted = [mode for mode in options.modes.split(",") if mode]
    default = FULL_TOPOLOGIES.get(str(lab.topology), DEFAULT_PARTS) if options.full else DEFAULT_PARTS
    parts = [part for part in PARTS if getattr(options, part.replace("-", "_"))] or default
    setup = GPU if options.gpu else CPU
    size = SIZES[setup.name, "full" if options.full else "default"]
    experiment = Experiment(lab, setup, data.resolve(), folder / "logs", results, size, options.seed, Slo())
    runs = {
        "offline": (experiment.offline, ABLATION),
        "online": (experiment.online, ONLINE_MODES),
        "one-request": (experiment.one_request, ONE_REQUEST_MODES),
        "crossing": (experiment.crossing, CROSSING_MODES),
    }
    for part in parts:
        run, modes = runs[part]
        run([mode for mode in modes if not wanted or mode in wanted])


def _interrupted(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
