"""The kvstore's settings."""

import pytest

from common.errors import SettingsError
from common.settings import load
from services.kvstore.budget import budget_that_fits
from services.kvstore.options import StoreOptions
from services.kvstore.settings import KvStoreSettings

GIB = 1 << 30


def test_the_budget_is_never_more_than_four_fifths_of_what_could_be_had() -> None:
    assert budget_that_fits(20 * GIB, 100 * GIB, 0) == 20 * GIB
    assert budget_that_fits(20 * GIB, 10 * GIB, 0) == 8 * GIB
    assert budget_that_fits(20 * GIB, 5 * GIB, 5 * GIB) == 8 * GIB


def test_every_option_of_the_store_is_a_setting_with_the_same_default() -> None:
    chosen = load(KvStoreSettings, "kvstore", ["--data", "x"], {})
    defaults = StoreOptions(budget_bytes=chosen.budget_bytes)
    for name in StoreOptions.__struct_fields__:
        assert getattr(chosen, name) == getattr(defaults, name), name


def test_a_bad_value_is_named() -> None:
    with pytest.raises(SettingsError, match="budget_bytes"):
        load(KvStoreSettings, "kvstore", ["--data", "x", "--budget-bytes", "12"], {})
