"""What `up` starts, and with which flags."""

import os
from pathlib import Path

import pytest

from common.errors import SettingsError
from common.settings import load
from services.cli import plan, up
from services.cli.plan import Layout
from services.cli.settings import UpSettings
from services.cli.supervisor import Spec
from tests.service_settings import SETTINGS

LAYOUT = Layout(data=Path("/d"), run=Path("/run/p"))
MODEL = Path("/models/tiny")


def planned(*argv: str) -> list[Spec]:
    return plan.services(load(UpSettings, "up", argv, {}), MODEL, LAYOUT, "nats://127.0.0.1:4222", {})


def flags(specs: list[Spec], name: str) -> str:
    return " ".join(next(spec for spec in specs if spec.name == name).argv[4:])


def test_a_default_cluster_has_one_of_each() -> None:
    specs = planned()
    assert [spec.name for spec in specs] == ["kvstore-0", "prefill-0", "decode-0", "router"]
    assert specs[0].argv[1:4] == ("-P", "-m", "services.kvstore")
    nats = "--nats nats://127.0.0.1:4222 --log-format json"
    local = "--host 127.0.0.1 --port 0"
    assert flags(specs, "kvstore-0") == f"--id kvstore-0 {nats} {local} --run-dir /run/p --data /d/kvstore-0"
    assert flags(specs, "decode-0") == f"--id decode-0 {nats} {local} --model /models/tiny --run-dir /run/p"
    assert flags(specs, "router") == f"--id router {nats} --host 127.0.0.1 --port 8080 --model /models/tiny"


def test_counts_and_worker_settings_are_passed_on() -> None:
    specs = planned(
        "--prefill", "0", "--decode", "2", "--kvstore", "2", "--dtype", "float32", "--block-tokens", "16", "--threads", "1"
    )
    assert [spec.name for spec in specs] == ["kvstore-0", "kvstore-1", "decode-0", "decode-1", "router"]
    assert flags(specs, "decode-1").endswith("--dtype float32 --block-tokens 16 --threads 1")
    assert "--dtype" not in flags(specs, "kvstore-0") + flags(specs, "router")


def test_a_cluster_without_kvstore_is_ready_without_one() -> None:
    assert flags(planned("--kvstore", "0"), "router").endswith("--no-ready-needs-kvstore")


def test_every_flag_is_one_its_service_knows() -> None:
    everything = planned(
        "--dtype", "float32", "--block-tokens", "16", "--context-tokens", "64", "--codec", "int8", "--device", "cpu", "--threads", "1",
        "--transport", "tcp", "--otlp-endpoint", "http://x:1", "--log-level", "debug", "--kvstore", "1",
    )  # fmt: skip
    for spec in everything:
        loaded = load(SETTINGS[spec.kind], spec.kind, spec.argv[4:], {})
        assert getattr(loaded, "id") == spec.name  # noqa: B009  (one struct per service)


def test_nats_listens_on_loopback_and_keeps_its_store_in_the_data_folder() -> None:
    text = plan.nats_config(Layout(data=Path('/d "x"'), run=Path("/r")), port=-1)
    assert 'host: "127.0.0.1"' in text and "port: -1" in text
    assert 'store_dir: "/d \\"x\\"/nats/jetstream"' in text


def test_services_inherit_the_settings_file_as_a_variable() -> None:
    environ = plan.child_environ({"PYTHONPATH": "/x", "HOME": "/h"}, Path("/etc/p.toml"))
    assert environ["PENSTOCK_CONFIG"] == "/etc/p.toml"
    assert environ["PYTHONPATH"].endswith(":/x") and environ["HOME"] == "/h"


def test_flag_beats_file_beats_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.toml"
    file.write_text("[up]\nport = 2\nprefill = 3\n[decode]\nthreads = 1\n")
    monkeypatch.setenv("PENSTOCK_UP_PORT", "1")
    monkeypatch.setenv("PENSTOCK_UP_DECODE", "4")
    argv = ["--config", str(file), "--prefill", "5"]
    assert up.config_file(argv) == file
    settings = up.read_settings(argv, up.config_file(argv))
    assert (settings.port, settings.prefill, settings.decode) == (2, 5, 4)


def test_the_settings_file_in_the_repository_is_valid_and_changes_nothing() -> None:
    config = up.config_file([])
    assert config is not None and config.name == "penstock.toml"
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")} | {
        "PENSTOCK_CONFIG": str(config)
    }
    assert load(UpSettings, "up", [], environ) == UpSettings()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--decode", "0"], "decode = '0'"),
        (["--port", "70000"], "port = '70000'"),
        (["--dtype", "float8"], "dtype = 'float8'"),
    ],
)
def test_a_bad_value_is_refused_by_name(argv: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load(UpSettings, "up", argv, {})
