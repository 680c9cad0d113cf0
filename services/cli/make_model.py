"""A random-weight model directory of a wanted size: Llama architecture, the demo model's tokenizer and chat template.

For benchmarks: real shapes, real bytes, no meaning. `shape_for` is pure arithmetic; `make_model` writes the weights a layer at a
time, in shards, so that its memory stays small whatever the size. torch is imported when weights are made, not before.

Weights are drawn so that activations and logits keep a spread near 1 through any depth, also in bfloat16: a matrix has standard
deviation 1/sqrt(inputs), what writes to the residual stream 1/sqrt(2 * layers) of that, and embeddings, which are not tied, 1.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.errors import SettingsError, UnsupportedModel
from services.cli.make_model_command import parse_count
from services.cli.settings import DEMO_MODEL

if TYPE_CHECKING:
    import torch

PARAMETERS_MIN, PARAMETERS_MAX = 10**6, 70 * 10**9
HEAD_DIM = 64
KV_HEADS = 4
KV_HEADS_SMALL, SMALL_HIDDEN = 1, 256  # below this width four KV heads would leave nothing to group
LAYERS_MAX = 96
HIDDEN_MAX = 12_288
INTERMEDIATE_MULTIPLE = 32
# Llama's proportions, roughly: MLP 3.5 times the width, and a width of 64 for every layer at 100M parameters, 128 at 8B.
MLP_RATIO, MLP_RATIO_MIN, MLP_RATIO_MAX = 3.5, 1.5, 6.0
SIZE_ERROR_MAX = 0.03
SHARD_BYTES_MAX = 2_000_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DTYPES = ("bfloat16", "float16", "float32")


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def attention_parameters(self) -> int:
        """Of one layer: queries and output, keys and values."""
        return 2 * self.hidden * (self.heads + self.kv_heads) * HEAD_DIM

    @property
    def parameters(self) -> int:
        layer = self.attention_parameters + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocab * self.hidden + self.hidden


def make_model(
    params: int | str,
    out: Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    vocab_size: int | None = None,
    context: int = 16_384,
) -> int:
    """Writes the directory and returns how many parameters the model has, within 3% of `params` (a count, or text such as "100m").

    `vocab_size` is the tokenizer's unless larger is asked; `context` becomes `max_position_embeddings`.
    """
    wanted = parse_count(params) if isinstance(params, str) else params
    tokens = tokenizer_tokens()
    vocab = tokens if vocab_size is None else vocab_size
    if vocab < tokens:
        raise SettingsError(f"vocab_size = {vocab}: the demo tokenizer has {tokens} tokens; expected at least as many")
    if context < 1:
        raise SettingsError(f"context = {context}: expected at least 1 token")
    shape = shape_for(wanted, vocab)
    write_model(shape, out, dtype=dtype, seed=seed, context=context)
    return shape.parameters


def write_model(shape: Shape, out: Path, *, dtype: str = "bfloat16", seed: int = 0, context: int = 16_384) -> None:
    """Writes the directory of a model of just this shape. `shape.hidden` is `shape.heads * HEAD_DIM`."""
    assert shape.hidden == shape.heads * HEAD_DIM, shape
    if dtype not in DTYPES:
        raise SettingsError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO_MODEL / name, out / name)
    _fit_tokenizer(out / "tokenizer_config.json", context)
    (out / "config.json").write_text(json.dumps(config(shape, dtype, context), indent=2) + "\n")
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}, indent=2) + "\n"
    )
    _write_weights(shape, out, dtype, seed)


def shape_for(parameters: int, vocab: int) -> Shape:
    """The best-proportioned shape within 3% of the count wanted."""
    if not PARAMETERS_MIN <= parameters <= PARAMETERS_MAX:
        raise SettingsError(f"params = {parameters:,}: expected a count from 1m to 70b, such as 10m, 100m or 1.5b")
    shapes = [shape for shape in _shapes(parameters, vocab) if abs(shape.parameters / parameters - 1) <= SIZE_ERROR_MAX]
    if not shapes:
        raise SettingsError(
            f"params = {parameters:,}: too few for a vocabulary of {vocab:,} tokens; expected more, or fewer tokens"
        )
    return min(shapes, key=lambda shape: _awkwardness(shape, parameters))


def _shapes(parameters: int, vocab: int) -> Iterator[Shape]:
    """For every width and depth, the MLP that comes nearest to the count."""
    for hidden in range(HEAD_DIM, HIDDEN_MAX + 1, HEAD_DIM):
        kv_heads = KV_HEADS if hidden > SMALL_HIDDEN else KV_HEADS_SMALL
        heads = hidden // HEAD_DIM
        if heads % kv_heads:
            continue
        for layers in range(2, LAYERS_MAX + 1):
            bare = Shape(hidden, 0, layers, heads, kv_heads, vocab)
            room = (parameters - bare.parameters) / (3 * hidden * layers)
            intermediate = round(room / INTERMEDIATE_MULTIPLE) * INTERMEDIATE_MULTIPLE
            if MLP_RATIO_MIN * hidden <= intermediate <= MLP_RATIO_MAX * hidden:
                yield bare._replace(intermediate=intermediate)


def _awkwardness(shape: Shape, parameters: int) -> float:
    """Distance from Llama's proportions, each as a ratio of at least 1; the width for a layer grows as the sixth root of the size."""
    width_for_a_layer = 64 * (parameters / 1e8) ** (1 / 6)
    ratios = (shape.intermediate / shape.hidden / MLP_RATIO, shape.hidden / shape.layers / width_for_a_layer)
    return sum(max(ratio, 1 / ratio) for ratio in ratios)


def config(shape: Shape, dtype: str, context: int) -> dict[str, object]:
    """config.json, as `transformers` reads it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def weights(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
    """(name, dimensions, standard deviation; None for a norm, which is all ones) of every weight, in the order of the model."""
    hidden, kv = shape.hidden, shape.kv_heads * HEAD_DIM
    unit, residual = hidden**-0.5, (2 * shape.layers) ** -0.5
    yield "model.embed_tokens.weight", (shape.vocab, hidden), 1.0
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,), None
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden), unit
        yield prefix + "self_attn.k_proj.weight", (kv, hidden), unit
        yield prefix + "self_attn.v_proj.weight", (kv, hidden), unit
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden), unit * residual
        yield prefix + "post_attention_layernorm.weight", (hidden,), None
        yield prefix + "mlp.gate_proj.weight", (shape.intermediate, hidden), unit
        yield prefix + "mlp.up_proj.weight", (shape.intermediate, hidden), unit
        yield prefix + "mlp.down_proj.weight", (hidden, shape.intermediate), shape.intermediate**-0.5 * residual
    yield "model.norm.weight", (hidden,), None
    yield "lm_head.weight", (shape.vocab, hidden), unit


def _write_weights(shape: Shape, out: Path, dtype: str, seed: int) -> None:
    """One file where it fits, else numbered shards and their index."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(shape, getattr(torch, dtype).itemsize))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        tensors = {key: _tensor(size, deviation, getattr(torch, dtype), generator) for key, size, deviation in shard}
        save_file(tensors, out / name, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key, _, _ in shard}
        total = shape.parameters * getattr(torch, dtype).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(shape: Shape, bytes_per_parameter: int) -> Iterator[list[tuple[str, tuple[int, ...], float | None]]]:
    shard: list[tuple[str, tuple[int, ...], float | None]] = []
    used = 0
    for name, size, deviation in weights(shape):
        count = size[0] * (size[1] if len(size) == 2 else 1) * bytes_per_parameter
        if shard and used + count > SHARD_BYTES_MAX:
            yield shard
            shard, used = [], 0
        shard.append((name, size, deviation))
        used += count
    yield shard


def _tensor(size: tuple[int, ...], deviation: float | None, dtype: "torch.dtype", generator: "torch.Generator") -> "torch.Tensor":
    import torch

    if deviation is None:
        return torch.ones(size, dtype=dtype)
    return torch.empty(size, dtype=torch.float32).normal_(0.0, deviation, generator=generator).to(dtype)


def tokenizer_tokens() -> int:
    """How many tokens the demo model's tokenizer has."""
    missing = [name for name in TOKENIZER_FILES if not (DEMO_MODEL / name).is_file()]
    if missing:
        raise UnsupportedModel(
            f"no {', '.join(missing)} in {DEMO_MODEL}: make-model copies the demo model's tokenizer from there"
        )
    return len(json.loads((DEMO_MODEL / "tokenizer.json").read_text())["model"]["vocab"])


def _fit_tokenizer(path: Path, context: int) -> None:
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"model_max_length": context}, indent=2) + "\n")
