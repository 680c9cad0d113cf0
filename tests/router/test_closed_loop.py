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


@pytest.mark.parametrize(("prefills", "decodes", "agents"), [(1, 1, 16), (2, 1, 16), (4, 2, 16), (4, 2, 64)])
def test_agents_stay_with_the_prefill_worker_that_keeps_their_context_and_storage_is_spared(
    prefills: int, decodes: int, agents: int
) -> None:
    """By the estimate alone: who stays would be quicker elsewhere seldom, and moves when it would."""
    forgetful, keeping = run(prefills, decodes, agents, FULL), run(prefills, decodes, agents, FULL, keeping=True)
    assert keeping.seconds <= forgetful.seconds / 2
    assert sum(keeping.link_bytes) <= sum(forgetful.link_bytes) / 4
    assert keeping.moves <= len(keeping.first_tokens_s) / 4
    assert max(keeping.first_tokens_s) <= max(forgetful.first_tokens_s), "nobody waits longer because others stay"
