"""Loading a model directory: what it gives, and how a directory that can't be served is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import SettingsError, UnsupportedModel
from services.worker.checkpoint import config_digest, inspect, weights_digest
from services.worker.model import MODEL_TYPES, load_model
from tests.families import FAMILIES, save_tiny, tiny_config


@pytest.fixture
def directory(llama, tmp_path: Path) -> Path:
    """A copy of a good model directory, to be broken."""
    return Path(shutil.copytree(llama.directory, tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "drop"}))


def refused(directory: Path, words: str, **options: Any) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        load_model(directory, device="cpu", **options)


def test_every_supported_type_is_proven_by_a_family_and_every_family_is_supported() -> None:
    assert {tiny_config(family).model_type for family in FAMILIES} == MODEL_TYPES


def test_a_loaded_model_says_what_it_is(llama) -> None:
    model = llama.loaded
    assert (model.layout.layers, model.layout.kv_heads, model.layout.head_dim, model.layout.dtype) == (2, 2, 8, "float32")
    assert (model.context_tokens, model.vocab_size, model.dtype, model.device.type) == (1024, 304, torch.float32, "cpu")
    assert len(model.namespace) == 64 and not model.model.training


def test_a_directory_that_is_not_there_or_not_a_model_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path, "config.json is missing")


@pytest.mark.parametrize(
    ("text", "words"), [("{", "can't be read as JSON"), ("[]", "holds list"), ("{}", "names no model_type"), ("\udcff", "JSON")]
)
def test_a_broken_configuration_file_is_refused(text: str, words: str, directory: Path) -> None:
    (directory / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(directory, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported are cohere, .*llama"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.py"}}, "'mine' is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model; expected LlamaForCausalLM"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"is_causal": False}, "is_causal = False"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"num_key_value_heads": 3}, "4 attention heads can't share 3"),
        ({"num_attention_heads": "four"}, "not a valid llama configuration"),
        ({"num_hidden_layers": 3}, "lacks 9 weights, which would be random: model.layers.2"),
        ({"hidden_size": 64}, "the weights don't load"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_a_configuration_that_can_not_be_served_is_refused_by_name(changes: dict[str, Any], words: str, directory: Path) -> None:
    edit_config(directory, **changes)
    refused(directory, words)


def test_missing_weights_are_refused_not_invented(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    refused(directory, "lacks 1 weights.*model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("keep", [0, 4, 100, 4000, -1])
def test_truncated_weights_are_refused_before_loading(keep: int, directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(directory, "truncated")


@pytest.mark.parametrize("junk", [b"\x10\0\0\0\0\0\0\0not json at all!", b"\x02\0\0\0\0\0\0\0[]", b'\x09\0\0\0\0\0\0\0{"a": {}}'])
def test_a_broken_weight_header_is_refused(junk: bytes, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(junk)
    refused(directory, "broken safetensors header")


def test_weights_in_another_format_are_refused_with_a_hint(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, "lacks the weight file model.safetensors.*pytorch_model.bin is not read")


def shard(directory: Path) -> None:
    """Splits the weights over two files with an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(weights)}
    for file in set(names.values()):
        save_file({name: weights[name] for name in names if names[name] == file}, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_sharded_weights_load_and_a_missing_shard_is_named(llama, directory: Path) -> None:
    shard(directory)
    sharded = load_model(directory, device="cpu", block_tokens=16)
    for name, parameter in llama.loaded.model.named_parameters():
        assert torch.equal(parameter, sharded.model.get_parameter(name))
    (directory / "model-00002-of-00002.safetensors").unlink()
    refused(directory, r"lacks the weight file model-00002-of-00002.safetensors \(1 of 2 missing\)")


def test_an_index_can_not_name_files_elsewhere(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    refused(directory, "outside its directory")


def test_the_namespace_follows_content_configuration_dtype_and_block_size_only(llama, directory: Path, tmp_path: Path) -> None:
    def namespace(**options: Any) -> str:
        return load_model(directory, **({"device": "cpu", "block_tokens": 16} | options)).namespace

    same = llama.loaded.namespace
    assert namespace() == same
    edit_config(directory, transformers_version="5.99", _name_or_path="elsewhere", architectures="drop")
    assert namespace() == same
    assert namespace(block_tokens=32) != same
    assert namespace(dtype="bfloat16") != same
    edit_config(directory, rms_norm_eps=1e-4)
    assert namespace() != same
    other = save_tiny("llama", tmp_path / "other", seed=2)
    assert load_model(other, device="cpu", block_tokens=16).namespace != same


def test_the_weights_digest_does_not_depend_on_file_names(directory: Path) -> None:
    shard(directory)
    before = weights_digest(inspect(directory))
    index = directory / "model.safetensors.index.json"
    document = index.read_text()
    for number in "12":
        (directory / f"model-0000{number}-of-00002.safetensors").rename(directory / f"x{3 - int(number)}.safetensors")
        document = document.replace(f"model-0000{number}-of-00002", f"x{3 - int(number)}")
    index.write_text(document)
    assert weights_digest(inspect(directory)) == before


def test_the_configuration_digest_is_canonical() -> None:
    assert config_digest({"a": 1, "b": {"c": 2}}) == config_digest({"b": {"c": 2}, "a": 1, "dtype": "float32"})
    assert config_digest({"a": 1}) != config_digest({"a": 2})


def test_progress_counts_every_weight_byte(directory: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(directory, device="cpu", on_progress=lambda done, total: seen.append((done, total)))
    size = (directory / "model.safetensors").stat().st_size
    assert seen[-1] == (size, size)


def test_settings_that_do_not_fit_the_model_are_refused(directory: Path) -> None:
    for options, words in (
        ({"block_tokens": 24}, "24 is not a power of two"),
        ({"context_tokens": 2048}, "2048 is longer than the model's max_position_embeddings = 1024"),
        ({"device": "toaster"}, "toaster"),
        ({"device": "cuda:77"}, "CUDA devices"),
        ({"kernels": "sometimes"}, "sometimes"),
    ):
        with pytest.raises(SettingsError, match=words):
            load_model(directory, **({"device": "cpu"} | options))
    assert load_model(directory, device="cpu", context_tokens=100).context_tokens == 100


def test_threads_go_to_whoever_multiplies(llama, tiny) -> None:
    assert llama.torch_only.torch_multiplies and not llama.torch_only.kernels
    assert tiny("mixtral").loaded.torch_multiplies  # experts are not linear layers
    assert llama.loaded.torch_multiplies is not llama.loaded.kernels
    before = torch.get_num_threads()
    try:
        for kernels, expected in (("off", 2), ("auto", 1 if llama.loaded.kernels else 2)):
            load_model(llama.directory, device="cpu", kernels=kernels, threads=2)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_longrope_is_served_up_to_where_its_factors_change(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 256, "factor": 4.0,
    }  # fmt: skip
    directory = save_tiny(
        "phi3", tmp_path / "phi3", rope_parameters=rope, partial_rotary_factor=1.0, original_max_position_embeddings=256
    )
    assert load_model(directory, device="cpu").context_tokens == 256
    with pytest.raises(SettingsError, match="longrope"):
        load_model(directory, device="cpu", context_tokens=512)


def test_bfloat16_checkpoints_are_loaded_as_they_are(tmp_path: Path) -> None:
    model = load_model(save_tiny("llama", tmp_path / "bf16", dtype="bfloat16"), device="cpu")
    assert model.dtype == torch.bfloat16 and model.layout.dtype == "bfloat16"
