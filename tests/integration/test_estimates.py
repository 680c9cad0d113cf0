"""What finished requests teach: also those whose first token prefill samples, before there is a report."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.integration.asking import ask, settled
from tests.integration.cluster import Cluster
from tests.integration.test_oracle import BLOCK_TOKENS, ROUTER_FLAGS, full_blocks, prompt_of

LEARNED = 'penstock:first_token_over_estimate_count{{model_name="{model}",plan="{plan}"}} 1.0'


@pytest.mark.timeout(180)
def test_a_request_by_prefill_corrects_the_estimates_of_its_plan(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    flags = (*ROUTER_FLAGS, "--plans", "storage_to_prefill", "--resident-timeout-ms", "0")
    with Cluster(tiny("llama"), tmp_path, router_flags=flags, block_tokens=BLOCK_TOKENS) as cluster:
        ask(cluster, prompt_of(100), tokens=4)
        settled(cluster, full_blocks(100))
        ask(cluster, prompt_of(100) + prompt_of(60, seed=1), tokens=4)
        decisions = httpx.get(f"{cluster.url}/v1/penstock/explain", timeout=10, trust_env=False)
        said = httpx.get(f"{cluster.url}/metrics", timeout=10, trust_env=False).text
        for plan in ("recompute", "storage_to_prefill"):
            assert LEARNED.format(model=cluster.model.name, plan=plan) in said, decisions.text
