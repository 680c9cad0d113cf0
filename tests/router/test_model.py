"""What the router reads of a model directory, without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvalidRequest, UnsupportedModel
from services.router.model import Model, load
from tests.router.conftest import make_model_dir


def test_the_router_never_loads_torch_even_where_it_is_installed(model_dir: Path) -> None:
    script = (
        "import sys, services.router.__main__ as main, services.router.router\n"
        "main.hide_torch()\n"
        "from services.router.model import load\n"
        f"model = load({str(model_dir)!r})\n"
        "assert model.decode(model.encode('def f(x):')) == 'def f(x):'\n"
        "assert model.chat([{'role': 'user', 'content': 'x'}], {'add_generation_prompt': True})\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_ids_are_those_of_transformers(model: Model) -> None:
    for text in ("def f(x):", " leading", "naïve 東京\U0001f642\n\n", "<|user|>x<|end|>"):
        assert model.encode(text) == model._tokenizer(text)["input_ids"]


def test_a_conversation_follows_the_models_template(model: Model) -> None:
    messages = [{"role": "user", "content": "hi"}]
    ids = model.chat(messages, {"add_generation_prompt": True})
    assert model.decode(ids, skip_special=False) == "<|user|>hi<|end|><|assistant|>"


def test_a_template_that_refuses_says_why(tmp_path: Path) -> None:
    directory = make_model_dir(tmp_path / "strict")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        load(str(directory)).chat([{"role": "user", "content": "x"}], {"add_generation_prompt": True})


@pytest.mark.parametrize(
    ("generation", "eos"),
    [(None, (0,)), ({"eos_token_id": [3, 4]}, (3, 4)), ({"eos_token_id": 4}, (4,)), ({"temperature": 0.5}, (0,))],
)
def test_eos_ids_are_those_transformers_would_stop_at(tmp_path: Path, generation: Any, eos: tuple[int, ...]) -> None:
    assert load(str(make_model_dir(tmp_path / "m", generation=generation))).defaults.eos_token_ids == eos


def test_generation_config_defaults_are_read(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
    defaults = load(str(make_model_dir(tmp_path / "m", generation=given))).defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.repetition_penalty) == (0.6, 0.95, 20, 1.05)


@pytest.mark.parametrize(
    ("broken", "content", "message"),
    [
        ("config.json", None, "config.json: No such file"),
        ("config.json", "{", "config.json: not valid JSON"),
        ("config.json", "[]", "config.json: expected a JSON object"),
        ("config.json", '{"model_type": "llama"}', "max_position_embeddings = None: expected a positive integer"),
        ("tokenizer.json", '{"trunc', "its tokenizer can't be loaded"),
        ("generation_config.json", '{"temperature": "hot"}', "generation_config.json: Expected `float | null`, got `str`"),
    ],
)
def test_a_broken_directory_is_refused_by_name(tmp_path: Path, broken: str, content: str | None, message: str) -> None:
    directory = make_model_dir(tmp_path / "m")
    (directory / broken).unlink(missing_ok=True)
    if content is not None:
        (directory / broken).write_text(content)
    with pytest.raises(UnsupportedModel) as caught:
        load(str(directory))
    assert message in caught.value.message


def test_a_missing_directory_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="no such directory"):
        load("/nowhere/at/all")
