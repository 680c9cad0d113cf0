"""What makes a sequence unservable whatever runs at the moment. Pure."""

from common.codec import StoredLayout
from common.errors import ContextExceeded, InvalidRequest
from services.worker.engine.allocator import blocks_for
from services.worker.engine.types import LoadedKv, NewSequence


def check(new: NewSequence, stored: StoredLayout, context_tokens: int, vocab_size: int) -> None:
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
    if len(new.claim.blocks) * stored.raw.block_tokens >= tokens:
        raise InvalidRequest(f"{len(new.claim.blocks)} claimed blocks for a sequence of {tokens} tokens: one must be computed")
    if new.kv is not None:
        _check_kv(new.kv, len(new.claim.blocks), tokens, stored)


def _check_kv(kv: LoadedKv, claimed: int, tokens: int, stored: StoredLayout) -> None:
    end, full = blocks_for(kv.tokens, stored.raw.block_tokens), kv.tokens // stored.raw.block_tokens
    needed = end - kv.first_block
    raw, encoded = {stored.raw.bytes_per_block}, {stored.bytes_per_block}
    sizes = [raw | encoded if block < full else raw for block in range(kv.first_block, end)]  # a partial block is never encoded
    if kv.first_block > claimed:
        raise InvalidRequest(f"KV begins at block {kv.first_block}, and only {claimed} blocks are claimed before it")
    if not 0 <= kv.tokens < tokens:
        raise InvalidRequest(f"KV of {kv.tokens} tokens for a sequence of {tokens}: at least one token must be computed")
    if len(kv.buffers) != needed or any(buffer.nbytes not in fit for buffer, fit in zip(kv.buffers, sizes, strict=True)):
        given = sorted({buffer.nbytes for buffer in kv.buffers})
        or_encoded = "" if stored.codec == "raw" else f", or full ones of {stored.bytes_per_block} as {stored.codec}"
        raise InvalidRequest(
            f"KV of {kv.tokens} tokens comes in {len(kv.buffers)} buffers of {given} bytes; "
            f"expected {needed} of {stored.raw.bytes_per_block}{or_encoded}"
        )
