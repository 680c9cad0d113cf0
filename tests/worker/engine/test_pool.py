"""Blocks on their way to a device and back, beside the way that a CPU has: on a CPU here, unless PENSTOCK_TEST_DEVICE names another."""

import pytest
import torch

from common.codec import StoredLayout
from common.kv_layout import KvLayout
from services.worker.codec import Codec
from services.worker.engine import pool as pools
from services.worker.engine.pool import BlockPool
from tests.worker.conftest import DEVICE

LAYOUT = KvLayout(2, 2, 16, "bfloat16", 16)


@pytest.mark.parametrize("codec", ["raw", "fp8", "int8", "int4"])
def test_a_device_gets_what_the_host_gets_raw_and_encoded_in_one_load(codec, monkeypatch) -> None:
    monkeypatch.setattr(pools, "DECODED_AT_ONCE", 2)
    stored, generator = StoredLayout(LAYOUT, codec), torch.Generator().manual_seed(1)
    raw = [memoryview(bytearray(torch.randn(LAYOUT.bytes_per_block // 2, generator=generator).bfloat16().view(torch.uint8).numpy()))
           for _ in range(6)]  # fmt: skip
    buffers = list(raw)
    for block in (0, 1, 3, 4, 5):
        buffers[block] = memoryview(bytearray(stored.bytes_per_block))
        Codec(stored).encode(raw[block], buffers[block])
    host, device = BlockPool(stored, 8), BlockPool(stored, 8, DEVICE)
    places = [5, 0, 7, 2, 3, 1]
    host.load(places, buffers, 6 * LAYOUT.block_tokens)
    device._upload(places, buffers)
    assert torch.equal(device.tensor.cpu().view(torch.uint8), host.tensor.view(torch.uint8))
    back = [memoryview(bytearray(LAYOUT.bytes_per_block)) for _ in places]
    device.export(places, back, 6 * LAYOUT.block_tokens)
    wanted = [memoryview(bytearray(LAYOUT.bytes_per_block)) for _ in places]
    host.export(places, wanted, 6 * LAYOUT.block_tokens)
    assert back == wanted


@pytest.mark.parametrize("blocks", [1, 512, 4096])
def test_a_pool_in_host_memory_begins_at_a_cache_line(blocks) -> None:
    assert BlockPool(StoredLayout(LAYOUT, "raw"), blocks).tensor.data_ptr() % 64 == 0
