"""A real launcher over fake services (and a real NATS server): `fake_up.py DATA KIND=BEHAVIOURS... [--report-fd=N]`."""

import os
import sys
import tempfile
from pathlib import Path

from services.cli import nats_binary, plan, state, up
from services.cli.detach import Reporter
from services.cli.launch import Cluster
from services.cli.plan import Layout
from services.cli.screen import both, screen
from services.cli.supervisor import Spec

KINDS = ("kvstore", "prefill", "decode", "router")
FAKE = str(Path(__file__).with_name("fake_service.py"))


def main() -> int:
    data = Path(sys.argv[1])
    behaviours = dict(argument.split("=", 1) for argument in sys.argv[2:] if not argument.startswith("--"))
    report = [int(argument.partition("=")[2]) for argument in sys.argv if argument.startswith("--report-fd=")]
    lock = state.take_lock(data)
    layout = Layout(data=data, run=Path(tempfile.mkdtemp(prefix="penstock-test-")))
    environ = plan.child_environ(os.environ, None)

    def services(nats_url: str) -> list[Spec]:
        assert nats_url.startswith("nats://127.0.0.1:")
        words = {kind: behaviours.get(kind, "").replace("RUN", str(layout.run)).split() for kind in KINDS}
        return [
            Spec(name=kind, kind=kind, argv=(sys.executable, FAKE, kind, *words[kind]), environ=environ, log=layout.log(kind))
            for kind in KINDS
        ]

    cluster = Cluster(
        layout=layout,
        model="/models/fake",
        served_name="fake",
        host="127.0.0.1",
        ready_s=float(behaviours.get("ready_s", "60")),
        drain_s=float(behaviours.get("drain_s", "60")),
        nats=plan.nats(nats_binary.find(), layout, environ),
        services=services,
        curl=lambda url: f"curl {url}/v1/models",
    )
    out = screen()
    try:
        return up.run_cluster(cluster, both(out.show, Reporter(report[0]).show) if report else out.show)
    finally:
        out.close()
        os.close(lock)


if __name__ == "__main__":
    sys.exit(main())
