"""The write budget is a bucket of an hour's share; what is worth writing is, for now, everything."""

from __future__ import annotations

import pytest

from forebay.kvstore.admission import WriteBudget, WriteOnEvict
from support.core import TwoTiers, chain

DAY = 24 * 3600


def test_without_a_limit_everything_may_be_written() -> None:
    budget = WriteBudget(0)
    assert budget.left_bytes(0.0) == -1
    assert all(budget.take(1 << 40, 0.0) for _ in range(10))


def test_budget_begins_with_an_hours_share() -> None:
    budget = WriteBudget(24_000)
    assert budget.left_bytes(5.0) == 1000
    assert budget.take(1000, 5.0)
    assert not budget.take(1, 5.0)


def test_refused_write_spends_nothing() -> None:
    budget = WriteBudget(24_000)
    assert not budget.take(1001, 0.0)
    assert budget.left_bytes(0.0) == 1000


def test_budget_fills_evenly_and_holds_no_more_than_an_hours_share() -> None:
    budget = WriteBudget(24_000)
    budget.take(1000, 0.0)
    assert budget.left_bytes(1800.0) == 500
    assert budget.left_bytes(10 * DAY) == 1000


def test_day_of_bursts_writes_no_more_than_the_day_allows() -> None:
    budget = WriteBudget(24_000)
    written = sum(budget.take(10, float(second)) for second in range(0, DAY, 7)) * 10
    assert 24_000 <= written <= 25_000


def test_what_was_not_written_is_given_back_up_to_the_share() -> None:
    budget = WriteBudget(24_000)
    budget.take(800, 0.0)
    budget.give_back(500)
    assert budget.left_bytes(0.0) == 700
    budget.give_back(5000)
    assert budget.left_bytes(0.0) == 1000


@pytest.mark.parametrize("rows", [[], [3, 4, 5]])
def test_all_that_is_about_to_leave_is_worth_writing(rows: list[int]) -> None:
    world = TwoTiers()
    world.write(chain("a", 1))
    assert WriteOnEvict().admit(world.store.shard(1, world.ns).group, rows, 0.0) == rows
