"""Loads a model directory for the engine, or refuses it by name.

In order: the directory (checkpoint.py), the configuration, the weights (no network, no remote code,
every weight present), then one tiny forward pass that looks at what each layer really hands to attention.
The namespace of the loaded model commits to the weights' content, the configuration and the KV layout.
"""

import inspect
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from common.blocks import Namespace
from common.codec import CodecName, StoredLayout
from common.errors import SettingsError, UnsupportedModel
from common.kv_layout import DTYPE_BYTES, KvLayout, default_block_tokens, namespace_of
from services.worker import checkpoint as checkpoints
from services.worker.checkpoint import Checkpoint, OnProgress
from services.worker.codec import DTYPES
from services.worker.engine import attention

log = logging.getLogger(__name__)

# Every type here is proven against `transformers.generate` by tests/worker/engine.
MODEL_TYPES = frozenset(
    {
        "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "gpt_oss", "granite",
        "llama", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
        "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
    }
)  # fmt: skip
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Flags that change what attention sees, with the value that is served.
_REQUIRED_FLAGS = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "attention_chunk_size": None,
    "quantization_config": None,
}
# Longrope picks one of two rotary tables by the longest position in a call; up to here it is always the short one.
_ROPE_LIMIT_KEY = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: the `transformers` causal LM, in eval mode on `device`.
        stored: the KV layout, and how the reservoir keeps it.
        context_tokens: longest prompt plus output.
        kernels: whether the compiled CPU kernels serve it.
        torch_multiplies: some of its matrix products are left to torch.
    """

    model: Any
    config: Any
    stored: StoredLayout
    namespace: Namespace
    context_tokens: int
    vocab_size: int
    device: torch.device
    dtype: torch.dtype
    kernels: bool = False
    torch_multiplies: bool = True

    @property
    def layout(self) -> KvLayout:
        return self.stored.raw


def load_model(
    directory: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    block_tokens: int = 0,
    context_tokens: int = 0,
    codec: CodecName = "raw",
    kernels: str = "auto",
    threads: int = 0,
    on_progress: OnProgress | None = None,
) -> LoadedModel:
    """Loads a checkpoint. 0 and "auto" choose from the model, as `WorkerSettings` says.

    Args:
        kernels: "auto", "off" or "require": the compiled CPU kernels.
        threads: CPU threads of this process's engine.
        on_progress: called with (bytes done, bytes in all) while the weights are read; from several threads.

    Raises:
        UnsupportedModel: the directory or its configuration can't be served; names what and why.
        SettingsError: `device`, `block_tokens`, `context_tokens` or `codec` don't fit.
    """
    directory = Path(directory)
    place = resolve_device(device)
    if place.type == "cuda":
        # cuDNN's attention takes 0.1 to 0.7 s for every new shape, and a batch has a new one every few steps.
        torch.backends.cuda.enable_cudnn_sdp(False)
    compiled = use_kernels(kernels, place)
    checkpoint = checkpoints.inspect(directory)
    config = read_config(checkpoint)
    dtype = resolve_dtype(checkpoint, config, dtype)
    layout = layout_of(config, dtype, block_tokens)
    stored = StoredLayout(layout, codec)
    context = resolve_context(config, context_tokens)
    with ThreadPoolExecutor(max_workers=1) as hashing:
        digest = hashing.submit(checkpoints.weights_digest, checkpoint, on_progress)
        model = _load_weights(directory, config, DTYPES[dtype], place)
        weights = digest.result()
    _probe(model, layout, place)
    torch_multiplies = not (compiled and _patch(model))
    set_threads(threads, torch_multiplies)
    return LoadedModel(
        model=model,
        config=config,
        stored=stored,
        namespace=namespace_of(layout, weights, checkpoints.config_digest(checkpoint.config), codec),
        context_tokens=context,
        vocab_size=config.vocab_size,
        device=place,
        dtype=DTYPES[dtype],
        kernels=compiled,
        torch_multiplies=torch_multiplies,
    )


def _patch(model: Any) -> bool:
    """Puts the kernels under the model's modules; whether all its matrix products are theirs now."""
    from services.worker.kernels import patch_linears, patch_mlps, patch_norms, shares_with_torch

    linears, norms, mlps = (len(patch(model)) for patch in (patch_linears, patch_norms, patch_mlps))
    log.info("kernels serve %d linear layers, %d norms, %d gated MLPs", linears, norms, mlps)
    experts = any(parameter.ndim > 2 for parameter in model.parameters())
    all_linears = linears == sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    return all_linears and not experts and not shares_with_torch(model.dtype)


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device = {name!r} is not a torch device; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def use_kernels(mode: str, device: torch.device) -> bool:
    """Whether the compiled CPU kernels serve; `mode` as in `WorkerSettings.kernels`."""
    if mode not in ("auto", "off", "require"):
        raise SettingsError(f"kernels = {mode!r}; expected auto, off or require")
    if mode == "off" or device.type != "cpu":
        return False
    from services.worker.kernels import ops  # the import compiles

    if not ops.available():
        if mode == "require":
            raise SettingsError(f"kernels = require, but {ops.BUILD.reason}")
        log.warning("%s", ops.BUILD.reason)
    return ops.available()


def set_threads(count: int, torch_multiplies: bool) -> None:
    """Threads of this process; 0: the machine's cores.

    Where the compiled kernels do all matrix products torch gets one thread: what is left to it is small, and
    every parallel region of its OpenMP pool waits for a thread that other processes may keep from running
    (docs/benchmarks.md), which the kernels' own pool does not.
    """
    if torch_multiplies:
        torch.set_num_threads(count or torch.get_num_threads())
    else:
        from services.worker.kernels import ops

        ops.set_threads(count or len(os.sched_getaffinity(0)))
        torch.set_num_threads(1)


def read_config(checkpoint: Checkpoint) -> Any:
    """The configuration, if every part of it can be served."""
    path, kind = checkpoint.directory / "config.json", checkpoint.config["model_type"]
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise UnsupportedModel(f"{path}: model_type {kind!r} is not supported; supported are {', '.join(sorted(MODEL_TYPES))}")
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever validation of that type raises
        raise UnsupportedModel(f"{path} is not a valid {kind} configuration: {error}") from error
    architectures = checkpoint.config.get("architectures") or []
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    expected = model_class.__name__
    if architectures and expected not in architectures:
        raise UnsupportedModel(f"{path}: architecture {architectures[0]} is not a causal language model; expected {expected}")
    for flag, served in _REQUIRED_FLAGS.items():
        value = getattr(config, flag, served)
        if value != served and not (value is None and served is False):
            raise UnsupportedModel(f"{path}: {flag} = {value!r} is not supported, only {served!r}")
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if foreign:
        raise UnsupportedModel(f"{path}: layer type {foreign[0]!r} is not supported, only {', '.join(sorted(_LAYER_TYPES))}")
    return config


def resolve_dtype(checkpoint: Checkpoint, config: Any, dtype: str) -> str:
    if dtype != "auto":
        return dtype
    named = str(getattr(config, "dtype", None) or checkpoint.weight_dtype).removeprefix("torch.")
    if named not in DTYPE_BYTES:
        raise UnsupportedModel(f"{checkpoint.directory}: weights of dtype {named!r} are not served as they are; set dtype")
    return named


def layout_of(config: Any, dtype: str, block_tokens: int) -> KvLayout:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise UnsupportedModel(f"{heads} attention heads can't share {kv_heads} key-value heads evenly")
    if block_tokens & (block_tokens - 1) or block_tokens < 0:
        raise SettingsError(f"block_tokens = {block_tokens} is not a power of two")
    if not block_tokens:
        per_token = 2 * config.num_hidden_layers * kv_heads * head_dim * DTYPE_BYTES[dtype]
        block_tokens = default_block_tokens(per_token)
    return KvLayout(config.num_hidden_layers, kv_heads, head_dim, dtype, block_tokens)


def resolve_context(config: Any, wanted: int) -> int:
    """The context to serve; `wanted` 0 is as long as the model allows."""
    limit = config.max_position_embeddings
    reason = f"the model's max_position_embeddings = {limit}"
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for table in tables:
        if table.get("rope_type") == "longrope":
            limit = min(limit, table.get(_ROPE_LIMIT_KEY) or getattr(config, _ROPE_LIMIT_KEY, limit))
            reason = f"{limit}, where longrope would change its factors for the whole sequence"
    if wanted > limit:
        raise SettingsError(f"context_tokens = {wanted} is longer than {reason}")
    if not wanted and limit < config.max_position_embeddings:
        log.warning("context limited to %s", reason)
    return wanted or limit


def _load_weights(directory: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    attention.register()
    config.use_cache = False
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UnsupportedModel(f"{directory}: the weights don't load: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        named = ", ".join(missing[:3])
        raise UnsupportedModel(f"{directory} lacks {len(missing)} weights, which would be random: {named}")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"{type(model).__name__} can't compute the logits of chosen positions")
    return model.to(device).eval()


class _Probe:
    """A paging object that only looks: which layers attend, and with which shapes."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, ...]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: object) -> Tensor:
        if layer in self.seen:
            raise UnsupportedModel(f"layer {layer} attends twice")
        self.seen[layer] = (*key.shape, *value.shape)
        return query.transpose(1, 2)


def _probe(model: Any, layout: KvLayout, device: torch.device) -> None:
    """One forward pass over two tokens: attention must be called once per layer, with the layout's shapes."""
    probe = _Probe()
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device)
    positions, keep = torch.arange(2, device=device)[None], torch.tensor([1], device=device)
    name = type(model).__name__
    with torch.inference_mode():
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=keep, paging=probe).logits
    shape = (1, layout.kv_heads, 2, layout.head_dim) * 2
    if sorted(probe.seen) != list(range(layout.layers)):
        raise UnsupportedModel(f"{name}: {len(probe.seen)} of {layout.layers} layers use attention that can be paged")
    for layer, seen in probe.seen.items():
        if seen != shape:
            raise UnsupportedModel(f"{name}: layer {layer} has keys and values {seen}, but the layout is uniformly {shape}")
    if logits.shape[:2] != (1, 1):
        raise UnsupportedModel(f"{name} gives logits {tuple(logits.shape)} for one position")
