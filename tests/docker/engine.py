"""Where a Docker engine answers, and Penstock's compose file brought up on it by testcontainers."""

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from testcontainers.compose import DockerCompose

REPOSITORY = Path(__file__).resolve().parents[2]
READY_DEADLINE_S = 420.0
PROBE_EVERY_S = 0.5


def engine_address() -> str | None:
    """DOCKER_HOST of an engine that answers ("" when the client finds it by itself), or None."""
    script = REPOSITORY / "deploy/docker/engine.sh"
    done = subprocess.run(["sh", script, "env"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        return None
    return done.stdout.strip().rpartition("DOCKER_HOST=")[2] or os.environ.get("DOCKER_HOST", "")


def compose_command() -> list[str]:
    """`docker compose` where the client has it, else docker-compose 1.29."""
    found = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    if not found and not shutil.which("docker-compose"):
        raise AssertionError("neither `docker compose` nor docker-compose is installed")
    return ["docker", "compose"] if found else ["docker-compose"]


class Compose(DockerCompose):
    """The cluster under a project name of its own. The file's variables come from the environment."""

    def __init__(self, project: str, scale: Sequence[str]) -> None:
        super().__init__(REPOSITORY, compose_file_name="docker-compose.yml", wait=False)
        self.project = project
        self._scale = [part for service in scale for part in ("--scale", service)]

    @cached_property
    def compose_command_property(self) -> list[str]:
        return [*compose_command(), "-p", self.project, "-f", "docker-compose.yml"]

    def start(self) -> None:
        """Starts every container, and returns when the router says that the cluster is ready."""
        self._run_command([*self.compose_command_property, "up", "--detach", "--no-build", *self._scale])
        until = time.monotonic() + READY_DEADLINE_S
        while reason := self.not_ready():
            assert time.monotonic() < until, f"not ready after {READY_DEADLINE_S} s: {reason}\n{self.tail()}"
            time.sleep(PROBE_EVERY_S)

    @property
    def url(self) -> str:
        """Of the router's published port, which the engine chose."""
        done = self._run_command([*self.compose_command_property, "port", "router", "8080"])
        return f"http://{done.stdout.decode().strip()}"

    def not_ready(self) -> str:
        """Why the cluster isn't ready with all its workers; empty when it is."""
        try:
            self.ask("/ready")
            roles = [member["role"] for member in self.ask("/v1/penstock/status")["members"] if member["usable"]]
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            return repr(error)
        missing = [s for s in self._scale[1::2] if roles.count(s.split("=")[0]) != int(s.split("=")[1])]
        return f"usable members: {roles}; wanted {missing}" if missing else ""

    def ask(self, path: str, body: dict[str, Any] | None = None, deadline_s: float = 60.0) -> Any:
        """GET, or POST of `body`; the decoded answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=deadline_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise ValueError(f"{path}: {error.code}: {error.read().decode(errors='replace')}") from error
        return json.loads(text) if text[:1] in (b"{", b"[") else text.decode()

    def container_ids(self) -> list[str]:
        done = self._run_command([*self.compose_command_property, "ps", "-q"])
        return done.stdout.decode().split()

    def tail(self) -> str:
        """The last lines of every container's log."""
        done = self._run_command([*self.compose_command_property, "logs", "--no-color", "--tail", "25"])
        return done.stdout.decode()
