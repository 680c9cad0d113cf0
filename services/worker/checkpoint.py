"""A model directory on disk: what must be there, and the digests that name its weights and configuration.

Everything here happens before a single weight is loaded, so that a bad directory is refused in
milliseconds and by name. No torch.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from common.errors import UnsupportedModel

_HASH_CHUNK_BYTES = 4 << 20
_HEADER_BYTES_MAX = 100 << 20  # the safetensors format's own bound
# Keys of config.json that do not change a single KV value.
_IRRELEVANT = frozenset(
    {
        "_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id",
        "eos_token_id", "pad_token_id", "sep_token_id", "output_attentions", "output_hidden_states", "output_router_logits",
        "return_dict", "initializer_range", "attention_dropout", "embd_pdrop", "resid_pdrop", "hidden_dropout",
        "router_aux_loss_coef", "router_jitter_noise", "attn_implementation", "_attn_implementation", "auto_map",
        "id2label", "label2id", "problem_type", "task_specific_params", "chunk_size_feed_forward",
    }
)  # fmt: skip

OnProgress = Callable[[int, int], None]


class Checkpoint(msgspec.Struct, frozen=True):
    """A directory that looks whole.

    Attributes:
        config: config.json.
        files: the safetensors files that hold the weights.
        weight_dtype: the dtype most weight bytes have, in transformers' words ("bfloat16"), or "" if it is another.
    """

    directory: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    weight_dtype: str

    @property
    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def inspect(directory: Path) -> Checkpoint:
    """Checks a model directory without loading it; `UnsupportedModel` says what is missing or broken."""
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "does not exist"
        raise UnsupportedModel(f"model {directory} {what}; expected a Hugging Face model directory")
    config = _read_json(directory / "config.json")
    if "model_type" not in config:
        raise UnsupportedModel(f"{directory / 'config.json'} names no model_type")
    files = _weight_files(directory)
    bytes_by_dtype: dict[str, int] = {}
    for path in files:
        for dtype, count in _check_safetensors(path).items():
            bytes_by_dtype[dtype] = bytes_by_dtype.get(dtype, 0) + count
    most = max(bytes_by_dtype, key=lambda dtype: bytes_by_dtype[dtype], default="")
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    return Checkpoint(directory, config, files, names.get(most, ""))


def weights_digest(checkpoint: Checkpoint, on_progress: OnProgress | None = None) -> str:
    """SHA-256 over the sorted SHA-256 digests of the weight files: content counts, file names don't."""
    total, done = checkpoint.weight_bytes, 0

    def digest(path: Path) -> bytes:
        nonlocal done
        hashed = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                hashed.update(chunk)
                done += len(chunk)
                if on_progress:
                    on_progress(min(done, total), total)
        return hashed.digest()

    with ThreadPoolExecutor(max_workers=min(len(checkpoint.files), os.cpu_count() or 1)) as threads:
        return hashlib.sha256(b"".join(sorted(threads.map(digest, checkpoint.files)))).hexdigest()


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 over config.json in canonical form, without what can't change KV."""
    relevant = {key: value for key, value in config.items() if key not in _IRRELEVANT}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UnsupportedModel(f"{path} is missing; expected a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise UnsupportedModel(f"{path} holds {type(document).__name__}, not an object")
    return document


def _weight_files(directory: Path) -> tuple[Path, ...]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UnsupportedModel(f"{index} has no weight_map")
        names = sorted(set(weight_map.values()))
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise UnsupportedModel(f"{index} names a file outside its directory")
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        others = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in directory.glob(pattern)]
        hint = f"; {others[0]} is not read, only safetensors are" if others else ""
        raise UnsupportedModel(f"{directory} lacks the weight file {missing[0]} ({len(missing)} of {len(names)} missing){hint}")
    return tuple(directory / name for name in names)


def _check_safetensors(path: Path) -> dict[str, int]:
    """Checks that a file is as long as its header says; returns bytes per dtype."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _HEADER_BYTES_MAX or 8 + length > size:
            raise UnsupportedModel(f"{path} is not a safetensors file, or is truncated ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            tensors = [value for key, value in header.items() if key != "__metadata__"]
            end = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
            out: dict[str, int] = {}
            for tensor in tensors:
                begin, stop = tensor["data_offsets"]
                out[tensor["dtype"]] = out.get(tensor["dtype"], 0) + stop - begin
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsupportedModel(f"{path} has a broken safetensors header: {error!r}") from error
    if 8 + length + end != size:
        raise UnsupportedModel(f"{path} is {size} bytes long but its header says {8 + length + end}: truncated or corrupt")
    return out
