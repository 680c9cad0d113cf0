"""The estimate of the best possible hit ratio, against the truth."""

import itertools
import random

from loadtest.block_traces import MIXES, trace
from services.kvstore.reuse import ReuseSample
from tests.kvstore.support import chain


def test_while_all_is_followed_the_estimate_is_the_truth() -> None:
    sample = ReuseSample()
    assert sample.best_hit_ratio is None
    keys = chain(100)
    sample.asked(keys[:50])
    assert sample.best_hit_ratio == 0
    sample.offered(keys)
    sample.asked(keys)
    assert sample.best_hit_ratio == 100 / 150


def test_a_sample_of_a_fiftieth_is_close_and_stays_bounded() -> None:
    choice = random.Random(5)
    digests = [choice.randbytes(32) for _ in range(100_000)]
    chains = trace(MIXES[-1], 1, 2000)
    sample, seen, found, asked = ReuseSample(samples_max=256), set[int](), 0, 0
    for blocks in chains:
        sample.asked([digests[block] for block in blocks])
        found += sum(block in seen for block in blocks)
        asked += len(blocks)
        seen.update(blocks)
        assert len(sample._seen) <= 256
    assert len(seen) > 10_000 and max(itertools.chain(*chains)) < len(digests)
    assert sample.best_hit_ratio is not None and abs(sample.best_hit_ratio - found / asked) < 0.1
