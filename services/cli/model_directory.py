"""What the launcher and `doctor` see of a model directory without loading anything. Reads files only."""

import json
import shlex
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from services.cli.settings import DEMO_MODEL


def resolve(given: str) -> Path:
    """The model directory, absolute.

    Raises:
        SettingsError: it isn't one; says what is missing.
    """
    path = Path(given).expanduser().resolve() if given else DEMO_MODEL
    problem = problem_with(path)
    if problem is None:
        return path
    shown = f"model = {given!r}" if given else f"the demo model {path}"
    hint = "expected a Hugging Face model directory" if given else "name a model directory with --model PATH"
    raise SettingsError(f"{shown}: {problem}; {hint}")


def problem_with(path: Path) -> str | None:
    """What keeps this from being a model directory; None when nothing obvious does."""
    if not path.is_dir():
        return "no such directory" if not path.exists() else "not a directory"
    if not (path / "config.json").is_file():
        return "it holds no config.json"
    try:
        config: Any = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        return f"config.json can't be read ({error})"
    if not isinstance(config, dict) or "model_type" not in config:
        return "config.json names no model_type"
    if not any(path.glob("*.safetensors")):
        return "it holds no weights (*.safetensors)"
    return None


def has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file():
        return True
    try:
        return "chat_template" in json.loads((path / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False


def example_request(path: Path, name: str, url: str) -> str:
    """A curl line that works when pasted."""
    body: dict[str, Any] = {"model": name, "max_tokens": 64}
    if has_chat_template(path):
        where = "chat/completions"
        body["messages"] = [{"role": "user", "content": 'def is_even(n):\n    """Whether n is even."""'}]
    else:
        where = "completions"
        body["prompt"] = "def is_even(n):\n"
    return f"curl {url}/v1/{where} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
