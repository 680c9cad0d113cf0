"""The images, built from these sources, and one cluster of them for the whole module."""

import os
import subprocess
from collections.abc import Iterator

import docker
import pytest

from tests.docker.engine import REPOSITORY, Compose, engine_address

BUILD_DEADLINE_S = 1200
VARIABLES = {"PORT": "0", "GRPC_PORT": "0", "DTYPE": "float32", "POOL_BYTES": str(256 << 20), "STAGE_BYTES": str(128 << 20)}


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    """A client of an engine that answers."""
    address = engine_address()
    if address is None:
        pytest.skip("not run: no Docker engine")
    with pytest.MonkeyPatch.context() as patch:
        if address:
            patch.setenv("DOCKER_HOST", address)
        client = docker.from_env()
        yield client
        client.close()


@pytest.fixture(scope="module")
def images(engine: docker.DockerClient) -> None:
    """Everything cached makes this a matter of seconds."""
    done = subprocess.run(
        ["make", "docker-build"], cwd=REPOSITORY, capture_output=True, text=True, timeout=BUILD_DEADLINE_S, check=False
    )
    assert done.returncode == 0, f"make docker-build failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def cluster(images: None) -> Iterator[Compose]:
    """Two prefill and two decode workers that compute in float32, on a port that the engine chooses."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        for name in ("MODEL_DIR", "MODEL_NAME", "LOG_LEVEL", "RESERVOIR_BYTES", "WORKER_MEMORY"):
            patch.delenv(name, raising=False)
        compose = Compose(f"penstock-test-{os.getpid()}", ["prefill=2", "decode=2"])
        with compose:
            yield compose
