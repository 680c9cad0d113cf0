"""Torch meaning of the codecs' arithmetic, on any device: what codec_ops.py compiles, and what serves where it can't.

For each (layer, k|v, head) of a block, with `peak` the largest magnitude of its elements and L the codec's largest code
(448 for fp8, 127 for int8, 7 for int4), every step in float32, rounded to nearest, ties to even:

    scale = peak / L                      0 where peak < 2^-100
    code  = round(x * (L / peak))         fp8: to e4m3 (4 exponent bits, bias 7; 3 of fraction; no infinities)
    x'    = code * scale, rounded to the KV dtype

int8 is stored in two's complement; int4 as code + 8, the even element of a pair in the low half of the byte.
"""

import torch
from torch import Tensor

LEVELS = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
PEAK_MIN = 2.0**-100  # a head below it is zeros: its scale would not have an inverse
PEAK_END = 2.0**127  # a head at it, or not finite, can't be stored: decoding could overflow


def encode(block: Tensor, codec: str) -> tuple[Tensor, int | None]:
    """Codes and scales of whole layers.

    Args:
        block: `[layer, k|v, token, head, dim]`.

    Returns:
        `[layer, bytes]` uint8, and a plane (2 * layer + k|v) that can't be stored, or None.
    """
    layers = block.shape[0]
    values = block.float()
    peak = values.abs().amax(dim=(2, 4))  # [layer, k|v, head]; NaN where one is
    levels = peak.new_tensor(LEVELS[codec])  # torch turns a division by a number, or of one, into a product with a reciprocal
    scale = torch.where(peak < PEAK_MIN, 0.0, peak / levels)
    inverse = torch.where(peak < PEAK_MIN, 0.0, levels / peak)
    unfit = torch.nonzero(~(peak < PEAK_END).all(dim=2).flatten()).flatten().tolist()
    codes = _codes(values * inverse[:, :, None, :, None], codec)
    parts = scale.view(torch.uint8).reshape(layers, -1), codes.reshape(layers, -1)
    return torch.cat(parts, dim=1), unfit[0] if unfit else None


def decode(data: Tensor, codec: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """`[layer, bytes]` uint8 back to `[layer, k|v, token, head, dim]`; `shape` is (tokens, heads, dim).

    A scale that is not finite, or negative, was never written: its head decodes to NaN.
    """
    layers, heads = data.shape[0], shape[1]
    split = 2 * heads * 4
    scale = data[:, :split].contiguous().view(torch.float32).view(layers, 2, 1, heads, 1)
    scale = torch.where((scale >= 0) & scale.isfinite(), scale, torch.nan)
    values: Tensor = _values(data[:, split:], codec).view(layers, 2, *shape) * scale
    return values.to(dtype)


def _codes(scaled: Tensor, codec: str) -> Tensor:
    if codec == "fp8":
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    nearest = scaled.round().to(torch.int8)
    if codec == "int8":
        return nearest.view(torch.uint8)
    pairs = (nearest + 8).view(torch.uint8).unflatten(-1, (-1, 2))
    packed: Tensor = pairs[..., 0] | pairs[..., 1] << 4
    return packed


def _values(codes: Tensor, codec: str) -> Tensor:
    if codec == "fp8":
        return codes.contiguous().view(torch.float8_e4m3fn).float()
    if codec == "int8":
        return codes.contiguous().view(torch.int8).float()
    return torch.stack((codes & 15, codes >> 4), dim=-1).float() - 8.0
