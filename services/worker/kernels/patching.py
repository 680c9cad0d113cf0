"""Puts the kernels under a model's linear layers, norms and gated MLPs.

The forward of each instance is replaced, not the module: names, weights, hooks and `state_dict` stay as they were, tied
weights stay tied. Norms and MLPs are recognised by structure and then by result: one is patched only if it gives on a trial
input what it gave before. A plain Python call is used: a `torch.library` operation costs about 5 us more for each call, and nothing
compiles the CPU path.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from services.worker.kernels import ops

DTYPES = (torch.bfloat16, torch.float32)
# With few rows a product is the reading of its weights: ours read at 28-34 GB/s where torch's bfloat16 path reads at
# 13-21 (docs/benchmarks.md); from 8 rows on torch's matrix instructions win.
FEW_ROWS = 4


def patch_linears(model: nn.Module) -> list[str]:
    """Let every plain CPU `nn.Linear` call `ops.linear`; the names of those that now do.

    Subclasses (quantised, LoRA) keep their own forward. Nothing is patched without compiled kernels. In bfloat16 where torch has
    matrix instructions of its own (AVX512 and later), ours take the products of at most `FEW_ROWS` rows only.
    """
    if not ops.available():
        return []
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and _patch(module)]


def _patch(module: nn.Linear) -> bool:
    weight = module.weight
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or not weight.is_contiguous():
        return False
    forward = _forward_few_rows if shares_with_torch(weight.dtype) else _forward
    # Through the dictionary: `module.weight` costs a slow attribute look-up, a captured tensor would outlive its replacement.
    vars(module)["forward"] = partial(forward, module._parameters)
    return True


def patch_norms(model: nn.Module) -> list[str]:
    """Let root-mean-square norms call `ops.rms_norm`; the names of those that now do."""
    if not ops.available():
        return []
    return [name for name, module in model.named_modules() if _is_norm(module) and _patch_norm(module)]


def patch_mlps(model: nn.Module) -> list[str]:
    """Let gated SiLU MLPs (`gate_proj`, `up_proj`, `down_proj`) call `ops.silu_mul`; the names of those that now do."""
    if not ops.available():
        return []
    return [name for name, module in model.named_modules() if _is_gated_mlp(module) and _patch_mlp(module)]


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return type(module).__name__.endswith("RMSNorm") and weight is not None and weight.dim() == 1 and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _patch_norm(module: nn.Module) -> bool:
    weight, eps = module._parameters["weight"], _epsilon(module)
    assert weight is not None and eps is not None
    for unit_offset in (False, True):
        if _try(module, partial(_norm_forward, module._parameters, eps, unit_offset), weight, weight.numel()):
            return True
    return False


def _is_gated_mlp(module: nn.Module) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj")
    return module._modules.keys() == {*parts, "act_fn"} and all(isinstance(module._modules[part], nn.Linear) for part in parts)


def _patch_mlp(module: nn.Module) -> bool:
    gate = module._modules["gate_proj"]
    assert isinstance(gate, nn.Linear)
    return _try(module, partial(_mlp_forward, module), gate.weight, gate.in_features)


@torch.inference_mode()
def _try(module: nn.Module, forward: Callable[[Tensor], Tensor], weight: Tensor, width: int) -> bool:
    """Patch if `forward` agrees with the module on a trial input, to a rounding or two."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return False
    trial = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).mul(3).to(weight.dtype)
    before, after = module(trial), forward(trial)
    tolerance = 2 * torch.finfo(weight.dtype).eps * float(before.abs().max())
    if before.dtype != after.dtype or not torch.allclose(before, after, rtol=0, atol=tolerance):
        return False
    vars(module)["forward"] = forward
    return True


def _norm_forward(parameters: Mapping[str, nn.Parameter | None], eps: float, unit_offset: bool, x: Tensor) -> Tensor:
    weight = parameters["weight"]
    assert weight is not None
    return ops.rms_norm(x, weight, eps, unit_offset=unit_offset)


def _mlp_forward(module: nn.Module, x: Tensor) -> Tensor:
    parts = module._modules
    gate, up, down = parts["gate_proj"], parts["up_proj"], parts["down_proj"]
    assert gate is not None and up is not None and down is not None
    result: Tensor = down(ops.silu_mul(gate(x), up(x)))
    return result


def shares_with_torch(dtype: torch.dtype) -> bool:
    """Whether products of many rows are left to torch: oneDNN has instructions for them on this CPU."""
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _forward(parameters: Mapping[str, nn.Parameter | None], x: Tensor) -> Tensor:
    weight = parameters["weight"]
    assert weight is not None
    return ops.linear(x, weight, parameters["bias"])


def _forward_few_rows(parameters: Mapping[str, nn.Parameter | None], x: Tensor) -> Tensor:
    weight = parameters["weight"]
    assert weight is not None
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        return ops.linear(x, weight, parameters["bias"])
    return nn.functional.linear(x, weight, parameters["bias"])
