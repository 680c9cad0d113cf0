"""Model directories for the integration tests, made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny random model of a family."""
    root = tmp_path_factory.mktemp("models")

    def directory(family: str) -> Path:
        path = root / f"tiny-{family}"
        if not path.exists():
            save_tiny(family, path, seed=1)
        return path

    return directory
