"""What a cluster on one machine consists of: every process, its flags, its folders. Pure.

DATA/penstock.json    what runs (`state`)          DATA/kvstore-N/   blocks on disk
DATA/lock             held while it runs           DATA/nats/        JetStream, nats.conf
DATA/logs/NAME.log    one per service              RUN               unix sockets (short path, 0700)
"""

import json
import string
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from services.cli.settings import LOCAL, REPOSITORY, UpSettings
from services.cli.supervisor import Spec

STOP_WAVES = (("router",), ("decode",), ("prefill",), ("kvstore",), ("nats",))  # who calls whom, callers first
AT_ONCE = (("router", "decode", "prefill", "kvstore", "nats"),)  # when nothing was served yet


class Layout(msgspec.Struct, frozen=True):
    """Where things lie. `run` is outside `data`: unix socket paths may have 107 bytes at most."""

    data: Path
    run: Path

    def log(self, name: str) -> Path:
        return self.data / "logs" / f"{name}.log"

    @property
    def nats_store(self) -> Path:
        return self.data / "nats" / "jetstream"

    @property
    def nats_config(self) -> Path:
        return self.data / "nats" / "nats.conf"


def child_environ(environ: Mapping[str, str], config: Path | None) -> dict[str, str]:
    """What every service inherits; the settings file travels as a variable, so that flags still win over it."""
    paths = [str(REPOSITORY), *filter(None, environ.get("PYTHONPATH", "").split(":"))]
    ours = {"PYTHONPATH": ":".join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**environ, **ours, **({"PENSTOCK_CONFIG": str(config)} if config else {})}


def nats_config(layout: Layout, port: int) -> str:
    """The text of nats.conf. Port -1 takes a free one."""
    template = string.Template((LOCAL / "nats.conf.template").read_text())
    return template.substitute(port=port, store=json.dumps(str(layout.nats_store)))


def nats(binary: str, layout: Layout, environ: Mapping[str, str]) -> Spec:
    argv = (binary, "-c", str(layout.nats_config))
    return Spec(name="nats", kind="nats", argv=argv, environ=environ, log=layout.log("nats"))


def services(settings: UpSettings, model: Path, layout: Layout, nats_url: str, environ: Mapping[str, str]) -> list[Spec]:
    """Everything but NATS. All of it may start at once: members find each other over NATS."""
    common = ["--nats", nats_url, "--log-format", "json", *_set(settings, "otlp_endpoint", "log_level")]
    worker = [*common, "--host", "127.0.0.1", "--port", "0", "--model", str(model), "--run-dir", str(layout.run)]
    worker += _set(settings, "dtype", "block_tokens", "context_tokens", "codec", "device", "threads", "transport")
    store = [*common, "--host", "127.0.0.1", "--port", "0", "--run-dir", str(layout.run)]
    router = [*common, "--host", settings.host, "--port", str(settings.port), "--model", str(model)]
    router += [] if settings.kvstore else ["--no-ready-needs-kvstore"]

    found = [
        _spec("kvstore", i, [*store, "--data", str(layout.data / f"kvstore-{i}")], layout, environ)
        for i in range(settings.kvstore)
    ]
    found += [_spec(kind, i, worker, layout, environ) for kind in ("prefill", "decode") for i in range(getattr(settings, kind))]
    return [*found, _spec("router", None, router, layout, environ)]


def _spec(kind: str, index: int | None, flags: list[str], layout: Layout, environ: Mapping[str, str]) -> Spec:
    name = kind if index is None else f"{kind}-{index}"
    argv = (sys.executable, "-P", "-m", f"services.{kind}", "--id", name, *flags)
    return Spec(name=name, kind=kind, argv=argv, environ=environ, log=layout.log(name))


def _set(settings: UpSettings, *keys: str) -> list[str]:
    """Flags for the keys that were set; the others stay with the service's own table and defaults."""
    given = [(key, getattr(settings, key)) for key in keys]
    return [part for key, value in given if value not in (None, "") for part in ("--" + key.replace("_", "-"), str(value))]
