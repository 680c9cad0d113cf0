"""The key table against a dict, also where all keys want the same place."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.kvstore.column import NONE
from services.kvstore.key_table import FEW_KEYS, KeyTable, words
from tests.kvstore.support import chain

SLOTS = 40
KEYS = chain(SLOTS)


class TableAgainstDict(RuleBasedStateMachine):
    """Keys by slot; some tables are expected to hold far less, and grow."""

    def __init__(self) -> None:
        super().__init__()
        self.table = KeyTable(slots_expected=10)
        self.table.grow(8)
        self.slots: dict[bytes, int] = {}

    @rule(key=st.sampled_from(KEYS), slot=st.integers(0, SLOTS - 1))
    def put(self, key: bytes, slot: int) -> None:
        if key not in self.slots and slot not in self.slots.values():
            self.table.grow(slot + 1)
            self.table.put_many(np.array([slot], np.int32), words(key))
            self.slots[key] = slot

    @rule(key=st.sampled_from(KEYS))
    def remove(self, key: bytes) -> None:
        if key in self.slots:
            self.table.remove(self.slots.pop(key))

    @invariant()
    def agrees(self) -> None:
        assert [self.table.find(key) for key in KEYS] == [self.slots.get(key) for key in KEYS]
        assert self.table.find_all(words(b"".join(KEYS))).tolist() == [self.slots.get(key, NONE) for key in KEYS]
        assert sorted(self.table.slots().tolist()) == sorted(self.slots.values())
        assert self.table.check_integrity() == []


class CrowdedTable(TableAgainstDict):
    """All keys share one tag, so every probe meets every other key."""

    def __init__(self) -> None:
        super().__init__()
        self.table._secret = (0, 0, 0, 0)
        self.table._secrets[:] = 0


TableAgainstDict.TestCase.settings = settings(max_examples=30, stateful_step_count=60, deadline=None, derandomize=True)
CrowdedTable.TestCase.settings = TableAgainstDict.TestCase.settings
TestTableAgainstDict = TableAgainstDict.TestCase
TestCrowdedTable = CrowdedTable.TestCase


@pytest.mark.parametrize("expected", [0, 5000])
def test_many_keys_put_at_once_are_found_one_by_one_and_together(expected: int) -> None:
    keys = chain(5000)
    table = KeyTable(expected)
    table.grow(len(keys))
    table.put_many(np.array([4999], np.int32), words(keys[0]))
    table.put_all(np.arange(4999, dtype=np.int32), words(b"".join(keys[1:])))
    assert [table.find(key) for key in keys] == [4999, *range(4999)]
    assert table.find_all(words(b"".join(keys))).tolist() == [4999, *range(4999)]
    assert table.check_integrity() == []


def test_entries_go_on_at_the_front_when_the_end_is_full() -> None:
    table = KeyTable()
    table.grow(FEW_KEYS + 40)
    last = (1 << 32) - 1
    keys = chain(FEW_KEYS + 40)
    table._tag = lambda key: last  # type: ignore[method-assign]
    table._tags = lambda keys: np.full(len(keys), last, np.uint64)  # type: ignore[method-assign]
    table.put_all(np.arange(len(keys), dtype=np.int32), words(b"".join(keys)))
    assert table.find_all(words(b"".join(keys))).tolist() == list(range(len(keys)))
    for slot in range(0, len(keys), 2):
        table.remove(slot)
    assert [table.find(key) for key in keys] == [slot if slot % 2 else None for slot in range(len(keys))]
    assert table.check_integrity() == []


def test_what_is_no_key_is_not_found() -> None:
    table = KeyTable()
    table.grow(2)
    assert table.find(KEYS[0]) is None
    table.put_many(np.array([1], np.int32), words(KEYS[0]))
    assert table.find(b"") is None and table.find(KEYS[0] + b"x") is None
