"""`make_model`: sizes kept, shapes like Llama's, and directories that `transformers` loads whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import SettingsError
from services.cli import make_model as module
from services.cli.make_model import make_model, shape_for


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "tiny"
    make_model("2m", out)
    return out


@pytest.mark.parametrize("parameters", [10**6, 2 * 10**6, 10**7, 3 * 10**7, 10**8, 10**9, 1_500_000_000, 8 * 10**9, 70 * 10**9])
def test_every_size_is_met_within_three_percent(parameters: int) -> None:
    assert shape_for(parameters, 4096).parameters == pytest.approx(parameters, rel=0.03)


def test_100m_has_twelve_layers_and_groups_its_queries_over_four_kv_heads() -> None:
    shape = shape_for(10**8, 4096)
    assert (shape.layers, shape.kv_heads, shape.hidden % module.HEAD_DIM) == (12, 4, 0)
    assert shape.heads > shape.kv_heads
    assert shape.heads % shape.kv_heads == 0


def test_the_directory_loads_whole_and_its_parameters_are_those_reported(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = make_model(2_000_000, tmp_path / "model")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert sum(one.numel() for one in model.parameters()) == made
    assert (model.dtype.itemsize, model.config.max_position_embeddings) == (2, 16_384)


def test_logits_are_finite_spread_out_and_alike_in_bfloat16_and_float32(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(7, 71)[None]
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
        with torch.no_grad():
            found[dtype] = model(tokens).logits.float()
    exact = found[torch.float32]
    assert 0.5 < float(exact.std()) < 2
    assert float((found[torch.bfloat16] - exact).abs().mean()) < 0.1 * float(exact.std())


def test_the_tokenizer_and_chat_template_come_along(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.decode(tokenizer.encode("x = 1\n"), skip_special_tokens=True) == "x = 1\n"
    assert "<|user|>hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert tokenizer.model_max_length == 16_384


def test_a_seed_makes_the_same_bytes_and_another_seed_others(tiny: Path, tmp_path: Path) -> None:
    make_model("2m", tmp_path / "same")
    make_model("2m", tmp_path / "other", seed=1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tiny, tmp_path / "same", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]


def test_a_model_over_the_shard_limit_is_split_and_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(module, "SHARD_BYTES_MAX", 1_500_000)
    make_model("2m", tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("size", ["", "big", "100x", "-5m", "10k", "900b", "nan"])
def test_a_bad_size_is_refused_by_name_with_what_would_do(size: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"params = .*expected a count .*such as"):
        make_model(size, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="vocab_size = 100: the demo tokenizer has 4096 tokens"):
        make_model("2m", tmp_path / "model", vocab_size=100)


def test_torch_is_not_imported_until_weights_are_made() -> None:
    code = "import sys, services.cli.make_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
