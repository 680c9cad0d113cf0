"""Many agents on one policy: what is best for each request in turn is good for all of them together."""

from statistics import median

import pytest

from common.routes import Plan
from services.router.policy.settings import PolicySettings, Scheduler
from tests.router.closed_loop import run

BASIC = PolicySettings(plans=(Plan.STORAGE_TO_PREFILL,), layerwise=False, scheduler=Scheduler.ROUND_ROBIN)
FULL = PolicySettings()
IMBALANCE_MAX = 1.18  # the paper's


@pytest.mark.parametrize(("prefills", "decodes"), [(1, 1), (1, 2), (2, 1)])
def test_a_job_gains_what_the_links_allow_and_loads_them_evenly(prefills: int, decodes: int) -> None:
    basic, full = run(prefills, decodes, 16, BASIC), run(prefills, decodes, 16, FULL)
    bound = (prefills + decodes) / prefills
    assert basic.seconds / full.seconds >= 0.9 * bound
    assert full.imbalance <= IMBALANCE_MAX < basic.imbalance


@pytest.mark.parametrize("agents", [1, 4, 16, 64])
def test_nobody_starves(agents: int) -> None:
    """However many there are, and though nothing is measured when they all come, no turn takes much longer than the others."""
    job = run(1, 1, agents, FULL, turns=8)
    assert len(job.first_tokens_s) == 8 * agents
    assert max(job.first_tokens_s) <= 4 * median(job.first_tokens_s)


def test_one_agent_alone_gains_from_both_links() -> None:
    assert run(1, 1, 1, BASIC).seconds / run(1, 1, 1, FULL).seconds > 1.3
