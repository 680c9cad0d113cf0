"""CPU kernels for the engine's hot operations, with a pure-torch fallback of the same signatures."""

from services.worker.kernels.reference import linear, paged_attention_decode, paged_attention_prefill

__all__ = ["linear", "paged_attention_decode", "paged_attention_prefill"]
