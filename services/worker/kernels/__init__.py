"""CPU kernels for the engine's hot operations, with a pure-torch fallback of the same signatures.

`reference` says what each operation means, `ops` calls the compiled kernels where they can serve, `build` compiles them at
first import, `patching` puts them under a model's modules.
"""

from services.worker.kernels.ops import (
    BUILD,
    available,
    linear,
    paged_attention_decode,
    paged_attention_prefill,
    rms_norm,
    set_threads,
    silu_mul,
)
from services.worker.kernels.patching import patch_linears, patch_mlps, patch_norms, shares_with_torch

__all__ = [
    "BUILD",
    "available",
    "linear",
    "paged_attention_decode",
    "paged_attention_prefill",
    "patch_linears",
    "patch_mlps",
    "patch_norms",
    "rms_norm",
    "set_threads",
    "shares_with_torch",
    "silu_mul",
]
