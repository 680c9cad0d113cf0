"""Attention for devices that multiply faster than they read, beside the plain way."""

import pytest
import torch

from services.worker.engine.dense import Scoring, attention, spread_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "q_heads", "kv_heads", "keys"), [(3, 8, 2, 37), (1, 4, 4, 5), (5, 6, 1, 100)])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(None, None, False), (7, None, False), (None, 20.0, True), (7, 20.0, True)]
)
def test_spread_queries_give_what_separate_heads_give(dtype, rows, q_heads, kv_heads, keys, window, softcap, sinks) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(rows)
    query, key, value = random(rows, q_heads, 16), random(rows, keys, kv_heads, 16), random(rows, keys, kv_heads, 16)
    lengths = torch.randint(1, keys + 1, (rows, 1), generator=generator)
    index = torch.arange(keys)[None]
    mask = (index < lengths) & (index >= lengths - (window or keys))
    scoring = Scoring(0.25, window, softcap, torch.randn(q_heads, generator=generator) if sinks else None)
    spread = spread_attention(query, key, value, mask, scoring)
    plain = attention(query[:, :, None], key.transpose(1, 2), value.transpose(1, 2), mask[:, None, None, :], scoring)[:, :, 0]
    torch.testing.assert_close(spread, plain, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
