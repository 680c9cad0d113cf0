"""What makes a sequence unservable whatever runs at the moment. Pure."""

from common.errors import ContextExceeded, InvalidRequest
from common.kv_layout import KvLayout
from services.worker.engine.pool import blocks_for
from services.worker.engine.types import LoadedKv, NewSequence


def check(new: NewSequence, layout: KvLayout, context_tokens: int, vocab_size: int) -> None:
    """Raises `InvalidRequest` or `ContextExceeded` with the value that is wrong and what would be right."""
    tokens, limit = len(new.prompt) + len(new.output), new.sampling.max_tokens
    if not new.prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if tokens >= context_tokens:
        raise ContextExceeded(
            f"prompt and output so far are {tokens} tokens; at most {context_tokens - 1} leave room for one more in the "
            f"context of {context_tokens} tokens",
            param="prompt",
        )
    for ids in (new.prompt, new.output):
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise InvalidRequest(f"token id {wrong} is outside the vocabulary of {vocab_size}", param="prompt")
    if len(new.output) >= limit:
        raise InvalidRequest(f"{len(new.output)} of max_tokens = {limit} are generated already", param="max_tokens")
    if new.kv is not None:
        _check_kv(new.kv, tokens, layout)


def _check_kv(kv: LoadedKv, tokens: int, layout: KvLayout) -> None:
    needed = blocks_for(kv.tokens, layout.block_tokens)
    if not 0 <= kv.tokens < tokens:
        raise InvalidRequest(f"KV of {kv.tokens} tokens for a sequence of {tokens}: at least one token must be computed")
    if len(kv.buffers) != needed or any(buffer.nbytes != layout.bytes_per_block for buffer in kv.buffers):
        sizes = sorted({buffer.nbytes for buffer in kv.buffers})
        raise InvalidRequest(
            f"KV of {kv.tokens} tokens comes in {len(kv.buffers)} buffers of {sizes} bytes; "
            f"expected {needed} of {layout.bytes_per_block}"
        )
