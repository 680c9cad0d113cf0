"""Blocks that stay in the pool under their keys: found again, never wrong, and the first to go when memory is needed."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.blocks import BlockKey, ChainRoot, block_keys
from common.errors import InvalidRequest
from services.worker.engine.allocator import BlockAllocator
from services.worker.engine.types import Claim, LoadedKv
from tests.worker.conftest import make_prompt
from tests.worker.engine.drive import exported_kv, greedy, make_engine, new, run, run_one
from tests.worker.engine.test_oracle import assert_same

ROOT = ChainRoot(bytes(32))
BLOCK = 16


def keys(prompt: list[int]) -> list[BlockKey]:
    return block_keys(ROOT, prompt, BLOCK)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("shared", [15, 16, 17, 32, 47, 53])
def test_a_prompt_with_a_resident_beginning_gives_the_oracles_tokens(family: str, shared: int, tiny) -> None:
    model, first = tiny(family), make_prompt(53)
    engine = make_engine(model.loaded)
    run_one(engine, first, greedy(20), root=ROOT)
    prompt = first[:shared] + make_prompt(9, seed=7)
    outcome = run_one(engine, prompt, greedy(20, logprobs=2), root=ROOT)
    assert outcome.steps[0].resident == min(shared, len(prompt) - 1) // BLOCK * BLOCK
    assert_same(outcome, model.generate(prompt, 20))


def test_generated_blocks_are_found_by_the_next_turn(llama) -> None:
    engine, prompt = make_engine(llama.loaded), make_prompt(20)
    answer = run_one(engine, prompt, greedy(40, ignore_eos=True), root=ROOT).ids
    turn = prompt + answer + make_prompt(5, seed=1)
    outcome = run_one(engine, turn, greedy(10, logprobs=1), root=ROOT)
    assert outcome.steps[0].resident == 48, "59 of 60 tokens have KV: three whole blocks"
    assert_same(outcome, llama.generate(turn, 10))


def test_another_root_finds_nothing(llama) -> None:
    engine, prompt = make_engine(llama.loaded), make_prompt(40)
    run_one(engine, prompt, greedy(2), root=ROOT)
    assert run_one(engine, prompt, greedy(2), root=ChainRoot(b"t" * 32)).steps[0].resident == 0
    assert run_one(engine, prompt, greedy(2)).steps[0].resident == 0
    assert engine.claim(keys(prompt)).blocks and not engine.claim(block_keys(ChainRoot(b"u" * 32), prompt, BLOCK)).blocks


def test_a_claim_keeps_blocks_until_it_is_given_up(llama) -> None:
    engine, prompt = make_engine(llama.loaded, pool_blocks=4), make_prompt(33)
    run_one(engine, prompt, greedy(1), root=ROOT)
    claim = engine.claim(keys(prompt))
    assert len(claim.blocks) == 2 and engine.pool.allocator.free == 2
    engine.check_integrity()
    run_one(engine, make_prompt(17, seed=4), greedy(2))
    assert_same(run_one(engine, prompt, greedy(8, logprobs=0), root=ROOT, claim=claim), llama.generate(prompt, 8))
    again = engine.claim(keys(prompt))
    engine.give_up(again)
    engine.give_up(again)
    engine.check_integrity()
    assert engine.pool.allocator.free == 4


def test_a_claim_is_given_back_when_its_sequence_is_refused_or_cancelled_while_it_waits(llama) -> None:
    engine, prompt = make_engine(llama.loaded, pool_blocks=6), make_prompt(33)
    run_one(engine, prompt, greedy(1), root=ROOT)
    with pytest.raises(InvalidRequest, match="one must be computed"):
        engine.add(new("refused", prompt[:32], greedy(1), root=ROOT, claim=engine.claim(keys(prompt))))
    engine.check_integrity()
    engine.add(new("gone", prompt, greedy(1), root=ROOT, claim=engine.claim(keys(prompt))))
    engine.cancel("gone")
    run(engine)
    assert engine.pool.allocator.free == 6


def test_what_is_loaded_goes_behind_what_is_claimed(llama) -> None:
    prompt = make_prompt(70)
    source, engine = make_engine(llama.loaded), make_engine(llama.loaded)
    run(source, [new("kept", prompt, greedy(1), hold=True)])
    run_one(engine, prompt[:33], greedy(1), root=ROOT)
    claim, copied = engine.claim(keys(prompt)), []
    assert len(claim.blocks) == 2
    whole = exported_kv(source, "kept", 64, copied)
    kv = LoadedKv(64, whole.buffers[2:], whole.on_copied, first_block=2)
    outcome = run_one(engine, prompt, greedy(10, logprobs=1), root=ROOT, claim=claim, kv=kv)
    assert_same(outcome, llama.generate(prompt, 10))
    assert copied == [1] and outcome.steps[0].computed == 70
    with pytest.raises(InvalidRequest, match="begins at block 2"):
        engine.add(new("hole", prompt, greedy(1), kv=kv))


def test_loaded_blocks_are_resident_too(llama) -> None:
    prompt = make_prompt(70)
    source, engine = make_engine(llama.loaded), make_engine(llama.loaded)
    run(source, [new("kept", prompt, greedy(1), hold=True)])
    run_one(engine, prompt, greedy(1), kv=exported_kv(source, "kept", 64), root=ROOT)
    outcome = run_one(engine, prompt, greedy(10, logprobs=1), root=ROOT)
    assert outcome.steps[0].resident == 64
    assert_same(outcome, llama.generate(prompt, 10))


def test_a_preempted_sequence_takes_up_what_is_still_there(llama) -> None:
    prompts = {f"s{index}": make_prompt(20 + 3 * index, seed=index) for index in range(12)}
    engine = make_engine(llama.loaded, pool_blocks=24, step_tokens_max=64)
    outcomes = run(engine, [new(name, prompt, greedy(40, logprobs=0), root=ROOT) for name, prompt in prompts.items()])
    assert sum(outcome.preemptions for outcome in outcomes.values()) > 0
    for name, prompt in prompts.items():
        assert_same(outcomes[name], llama.generate(prompt, 40))
    assert engine.pool.allocator.free == 24


def test_claims_of_those_who_wait_never_stop_the_head_of_the_queue(llama) -> None:
    engine, prompts = make_engine(llama.loaded, pool_blocks=6), [make_prompt(40, seed=seed) for seed in range(2)]
    for prompt in prompts:
        run_one(engine, prompt, greedy(1), root=ROOT)
    claims = [engine.claim(keys(prompt)) for prompt in prompts]
    assert [len(claim.blocks) for claim in claims] == [2, 2]
    big = make_prompt(90, seed=9)
    engine.add(new("big", big, greedy(4, logprobs=0)))
    for index, prompt in enumerate(prompts):
        engine.add(new(f"w{index}", prompt, greedy(4, logprobs=0), root=ROOT, claim=claims[index]))
    outcomes = run(engine)
    assert_same(outcomes["big"], llama.generate(big, 4))
    for index, prompt in enumerate(prompts):
        assert_same(outcomes[f"w{index}"], llama.generate(prompt, 4))


def test_kv_that_is_not_finite_is_never_found_again(llama) -> None:
    engine, prompt = make_engine(llama.loaded), make_prompt(40)
    head = engine.model.model.lm_head
    weight = head.weight.detach().clone()
    head.weight.data.fill_(float("nan"))
    try:
        assert run_one(engine, prompt, greedy(2), root=ROOT).finish == "error"
    finally:
        head.weight.data.copy_(weight)
    assert engine.claim(keys(prompt)) == Claim()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_names_and_holders_agree_whatever_happens(seed: int) -> None:
    chance = random.Random(seed)
    allocator = BlockAllocator(8)
    chains = [[BlockKey(bytes([chain, depth]) * 16) for depth in range(4)] for chain in range(3)]
    held: list[list[int]] = []
    content: dict[int, BlockKey] = {}
    for _ in range(60):
        action = chance.choice(["take", "claim", "name", "release", "forget"])
        if action == "take" and (taken := allocator.take(chance.randint(0, 3), spare=chance.randint(0, 1))) is not None:
            for block in taken:
                content.pop(block, None)
            held.append(taken)
        elif action == "claim":
            chain = chance.choice(chains)
            claimed = allocator.claim(chain)
            assert [content[block] for block in claimed] == chain[: len(claimed)], "a claim holds what it asked for"
            held.append(claimed)
        elif action == "name" and held:
            for block in chance.choice(held):
                if block not in content:
                    content[block] = key = chance.choice(chance.choice(chains))
                    allocator.name(block, key)
        elif action == "release" and held:
            allocator.release(held.pop(chance.randrange(len(held))))
        elif action == "forget" and held:
            blocks = chance.choice(held)
            alone = allocator.forget(blocks)
            assert all(sum(holder.count(block) for holder in held) == 1 for block in alone)
        allocator.check_integrity([block for holder in held for block in holder])


def test_a_chain_goes_from_its_end_and_the_least_recently_used_first() -> None:
    allocator = BlockAllocator(4)
    old, young = ([BlockKey(bytes([name, depth]) * 16) for depth in range(2)] for name in range(2))
    for chain in (old, young):
        blocks = allocator.take(2)
        assert blocks is not None
        for block, key in zip(blocks, chain, strict=True):
            allocator.name(block, key)
        allocator.release(blocks)
    held = list(allocator.take(1) or [])
    assert (len(allocator.claim(old)), len(allocator.claim(young))) == (1, 2)
    assert allocator.take(1) is None and held
