"""Puts the kernels under a model's `nn.Linear` modules.

The forward of each instance is replaced, not the module: names, weights, hooks and `state_dict` stay as they were, tied
weights stay tied. A plain Python call is used: a `torch.library` operation costs about 5 us more for each call, and nothing
compiles the CPU path.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from services.worker.kernels import ops

DTYPES = (torch.bfloat16, torch.float32)


def patch_linears(model: nn.Module) -> list[str]:
    """Let every plain CPU `nn.Linear` call `ops.linear`; the names of those that now do.

    Subclasses (quantised, LoRA) keep their own forward. Nothing is patched without compiled kernels, nor in bfloat16 where torch
    has matrix instructions of its own for it (AVX512 and later), which then are faster than ours.
    """
    if not ops.available():
        return []
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and _patch(module)]


def _patch(module: nn.Linear) -> bool:
    weight = module.weight
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or not weight.is_contiguous():
        return False
    if weight.dtype == torch.bfloat16 and torch_is_fast_in_bfloat16():
        return False
    # Through the dictionary: `module.weight` costs a slow attribute look-up, a captured tensor would outlive its replacement.
    vars(module)["forward"] = partial(_forward, module._parameters)
    return True


def torch_is_fast_in_bfloat16() -> bool:
    """Whether oneDNN takes bfloat16 products on this CPU instead of torch's reference path."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _forward(parameters: Mapping[str, nn.Parameter | None], x: Tensor) -> Tensor:
    weight = parameters["weight"]
    assert weight is not None
    return ops.linear(x, weight, parameters["bias"])
