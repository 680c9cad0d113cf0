"""The cluster of docker-compose.yml against the oracle: fresh, and after a restart of every container."""

import inspect
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from tests.docker.engine import REPOSITORY, Compose

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1500)]
MODEL = REPOSITORY / "deploy/demo_model/penstock-demo"
UID = 10001
TOKENS = 24


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Sources of the standard library, several blocks long, as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    sources = [inspect.getsource(module) for module in (json, inspect, pytest.MonkeyPatch)]
    return [tokenizer.encode(source)[:length] for source, length in zip(sources, (700, 333, 512), strict=True)]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """What `transformers.generate` says on this host."""
    from tests.integration.oracle import greedy

    return [greedy(MODEL, prompt, TOKENS)[0] for prompt in prompts]


def complete(cluster: Compose, prompt: list[int]) -> dict[str, Any]:
    body = {"model": MODEL.name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    answer: dict[str, Any] = cluster.ask("/v1/completions", body)
    return answer


def tokens_of(answer: dict[str, Any]) -> list[int]:
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


def cached_tokens_of(answer: dict[str, Any]) -> int:
    cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def test_containers_give_the_oracles_tokens_and_find_their_blocks_on_the_volume_after_a_restart(
    cluster: Compose, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with ThreadPoolExecutor(len(prompts)) as threads:
        fresh = list(threads.map(lambda prompt: complete(cluster, prompt), prompts))
    assert [tokens_of(answer) for answer in fresh] == expected
    assert [cached_tokens_of(answer) for answer in fresh] == [0] * len(prompts)

    cluster.stop(down=False)
    cluster.start()

    block_tokens = cluster.ask("/v1/penstock/status")["block_tokens"]
    for prompt, wanted in zip(prompts, expected, strict=True):
        answer = complete(cluster, prompt)
        assert tokens_of(answer) == wanted
        assert cached_tokens_of(answer) == (len(prompt) - 1) // block_tokens * block_tokens


def test_bytes_between_containers_of_one_host_cross_no_socket(cluster: Compose, prompts: list[list[int]]) -> None:
    complete(cluster, prompts[0])
    complete(cluster, prompts[0])
    carriers = re.findall(r'penstock:routes_carried_out_total\{.*?carrier="(\w+)"', cluster.ask("/metrics"))
    assert {"shm", "extent"} & set(carriers)  # the peer's memory, or the SSD itself by a descriptor that was handed over
    assert set(carriers) <= {"shm", "extent", "none"}


def test_every_container_runs_unprivileged_on_a_read_only_root(cluster: Compose, engine: docker.DockerClient) -> None:
    containers: list[Container] = [engine.containers.get(id_) for id_ in cluster.container_ids()]
    assert len(containers) == 7
    for container in containers:
        host = container.attrs["HostConfig"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["Privileged"], container.name
        assert "no-new-privileges:true" in host["SecurityOpt"], container.name
        status, output = container.exec_run(["id", "-u"])
        assert (status, int(output)) == (0, UID), container.name
        status, _ = container.exec_run(["sh", "-c", "echo x >/app/x"])
        assert status != 0, container.name


def test_only_the_router_publishes_ports_and_only_on_loopback(cluster: Compose, engine: docker.DockerClient) -> None:
    for id_ in cluster.container_ids():
        container = engine.containers.get(id_)
        published = [binding["HostIp"] for bindings in container.ports.values() for binding in bindings or ()]
        service = container.labels["com.docker.compose.service"]
        assert published == (["127.0.0.1"] * 2 if service == "router" else []), service


def test_router_and_kvstore_have_no_torch(cluster: Compose) -> None:
    probe = "import importlib.util as u; raise SystemExit(u.find_spec('torch') is not None)"
    for service in ("router", "kvstore"):
        _, _, status = cluster.exec_in_container(["python", "-c", probe], service)
        assert status == 0, service


def test_health_checks_of_the_images_pass(cluster: Compose) -> None:
    for service, check in {
        "nats": ["http", "127.0.0.1:8222/healthz"],
        "kvstore": ["grpc", "127.0.0.1:50051"],
        "prefill": ["grpc", "127.0.0.1:50051"],
        "decode": ["grpc", "127.0.0.1:50051"],
        "router": ["http", "127.0.0.1:8080/ready"],
    }.items():
        said, _, status = cluster.exec_in_container(["python3", "/app/healthy.py", *check], service)
        assert (status, said.strip()) == (0, "SERVING"), service


def test_stopped_containers_have_drained_and_ended_by_themselves(cluster: Compose, engine: docker.DockerClient) -> None:
    containers = [engine.containers.get(id_) for id_ in cluster.container_ids()]
    cluster.stop(down=False)
    for container in containers:
        container.reload()
        assert container.attrs["State"]["ExitCode"] == 0, f"{container.name}:\n{container.logs(tail=20).decode()}"
