"""Typed calls of the compiled codecs; `codec_reference` says what they compute, and serves what they can't take.

They take float32 and bfloat16 with a head dimension of whole groups of 16.
"""

import ctypes
from typing import Final

import numpy as np
import torch

from services.worker.kernels import codec_reference as reference
from services.worker.kernels import ops

CODES: Final = {"fp8": 0, "int8": 1, "int4": 2}  # codec.h

_encode = _decode = None
if ops.BUILD.library is not None:
    _encode, _decode = ops.BUILD.library.penstock_encode_block, ops.BUILD.library.penstock_decode_block
    _encode.argtypes = _decode.argtypes = (
        *(ctypes.c_int,) * 2,
        *(ctypes.c_long,) * 4,
        *(ctypes.c_void_p,) * 2,
        ctypes.c_int,
    )
    _encode.restype, _decode.restype = ctypes.c_long, None


def compiled(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels take such blocks."""
    return _encode is not None and dtype in ops.KIND and head_dim % ops.GROUP == 0


def encode(raw: np.ndarray, out: np.ndarray, codec: str, shape: tuple[int, int, int], dtype: torch.dtype) -> int | None:
    """`reference.encode` of the layers in `raw` into `out`, both of bytes; `shape` is (tokens, heads, dim)."""
    if _encode is not None and compiled(dtype, shape[2]):
        layers = raw.nbytes // (2 * dtype.itemsize * int(np.prod(shape)))
        unfit = _encode(ops.KIND[dtype], CODES[codec], layers, *shape, raw.ctypes.data, out.ctypes.data, ops.threads())
        return None if unfit < 0 else int(unfit)
    block = _tensor(raw).view(dtype).view(-1, 2, *shape)
    encoded, unfit_plane = reference.encode(block, codec)
    np.copyto(out, encoded.numpy().reshape(-1))
    return unfit_plane


def decode(data: np.ndarray, out: np.ndarray, codec: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """`reference.decode` of the layers in `data` into `out`, both of bytes, which must not overlap."""
    layers = out.nbytes // (2 * dtype.itemsize * int(np.prod(shape)))
    if _decode is not None and compiled(dtype, shape[2]):
        _decode(ops.KIND[dtype], CODES[codec], layers, *shape, data.ctypes.data, out.ctypes.data, ops.threads())
        return
    block = reference.decode(_tensor(data).view(layers, -1), codec, shape, dtype)
    np.copyto(out, block.view(torch.uint8).numpy().reshape(-1))


def _tensor(data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data if data.flags.writeable else data.copy())  # torch warns of memory that it could write to
