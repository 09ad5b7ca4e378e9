"""The write budget is a bucket of an hour's share; what is worth writing is weighed by runs of a chain."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from forebay.kvstore.admission import DAY_S, WorthWriting, WriteBudget, WriteOnEvict, WriteTerms
from forebay.kvstore.eviction.policies import hazard
from forebay.kvstore.groups import HOST, Group
from forebay.kvstore.planner import PrefillRate
from forebay.kvstore.stats import Counters
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


class Known:
    """Stands for the policy: the chances of rows by number."""

    def __init__(self, chances: dict[int, float]) -> None:
        self.by_row = chances

    def chances(self, rows: Sequence[int], within_s: float, now: float) -> list[float]:
        del within_s, now
        return [self.by_row.get(row, 0.0) for row in rows]


class Weighed:
    """A rule over a small world of chains in memory; `rows` are those of each."""

    def __init__(self, terms: WriteTerms, *chains: str, per_day: int = 0, rate: PrefillRate | None = None) -> None:
        self.world = TwoTiers()
        self.counters = Counters()
        self.budget = WriteBudget(per_day)
        self.rule = WorthWriting(terms, self.budget, rate or PrefillRate(), self.counters)
        self.rows = []
        for name in chains:
            self.world.write(chain(name, 3))
            self.rows.append([self.group.index.find(each) for each in chain(name, 3)])

    @property
    def group(self) -> Group:
        return self.world.store.shard(1, self.world.ns).group

    def admit(self, chances: dict[int, float], now: float = 0.0) -> list[int]:
        group = self.group
        learned = group.policies
        group.policies = (Known(chances), *learned[1:])  # type: ignore[assignment]
        try:
            return list(self.rule.admit(group, [row for rows in self.rows for row in rows], now))
        finally:
            group.policies = learned


def test_without_prices_and_budget_nothing_is_weighed() -> None:
    weighed = Weighed(WriteTerms(), "a")
    assert weighed.admit({}) == weighed.rows[0]


def test_a_run_is_written_up_to_the_last_block_that_is_worth_it() -> None:
    weighed = Weighed(WriteTerms(least_chance=0.5), "a", "b", "c")
    (a, b, c) = weighed.rows
    chances = dict.fromkeys(a, 0.9) | {b[0]: 0.1, b[1]: 0.6, b[2]: 0.2} | dict.fromkeys(c, 0.4)
    assert weighed.admit(chances) == [*a, b[0], b[1]]
    assert weighed.group.declined == {b[2], *c}
    assert (weighed.counters.declined_cost_chains, weighed.counters.declined_blocks) == (2, 4)
    weighed.admit(chances)
    assert (weighed.counters.declined_cost_chains, weighed.counters.declined_blocks) == (2, 4), "counted once"
    assert weighed.admit(dict.fromkeys((*a, *b, *c), 0.5)) == [*a, *b, *c]
    assert not weighed.group.declined


def test_what_leads_to_a_block_on_the_drive_is_written() -> None:
    weighed = Weighed(WriteTerms(least_chance=0.5), "a")
    rows = weighed.rows[0]
    weighed.world.store.movement.write(weighed.group, rows[2:], [weighed.group], 0.0, asked=True)  # type: ignore[union-attr]
    weighed.rows = [rows[:2]]
    assert weighed.admit({}) == rows[:2]


def test_the_bar_is_where_a_write_costs_what_it_saves() -> None:
    tokens_per_s, block_bytes = 1000.0, 4096
    rate = PrefillRate(tokens_per_s)
    weighed = Weighed(WriteTerms(dollars_per_byte=1.0, gpu_dollars_per_s=1.0), "a", rate=rate)
    tokens = weighed.group.spec.block_tokens
    seconds = tokens / tokens_per_s
    for share, admitted in ((1.01, 3), (0.99, 0)):
        bar = 0.25
        terms = WriteTerms(dollars_per_byte=bar * seconds / block_bytes, gpu_dollars_per_s=1.0)
        weighed.rule = WorthWriting(terms, weighed.budget, rate, weighed.counters)
        assert weighed.group.complete_bytes == block_bytes
        assert len(weighed.admit(dict.fromkeys(weighed.rows[0], share * bar))) == admitted


def test_as_the_budget_runs_out_the_less_likely_is_declined() -> None:
    weighed = Weighed(WriteTerms(), "a", per_day=24_000)
    likely = dict.fromkeys(weighed.rows[0], 0.6)
    assert weighed.admit(likely) == weighed.rows[0]
    weighed.budget.take(500, 0.0)
    assert weighed.admit(likely) == weighed.rows[0], "half is left: at least one half"
    weighed.budget.take(200, 0.0)
    assert weighed.admit(likely) == []
    assert weighed.counters.declined_budget_chains == 1
    assert weighed.admit(likely, now=3600.0) == weighed.rows[0], "an hour later it is full"


def test_over_a_day_what_is_written_keeps_to_the_budget() -> None:
    weighed = Weighed(WriteTerms(), "a", per_day=8640 * 3 * 4096)
    written = 0
    for second in range(0, int(DAY_S), 5):  # twice as much is offered as may be written, at all chances alike
        chance = second * 0.6180339887 % 1.0
        rows = weighed.admit(dict.fromkeys(weighed.rows[0], chance), float(second))
        written += sum(weighed.budget.take(4096, float(second)) for _ in rows) * 4096
    assert abs(written / weighed.budget.bytes_per_day - 1) <= 0.05


def test_a_policy_that_has_learned_says_a_chance_for_each_row() -> None:
    world = TwoTiers(host_policy=hazard)
    group = world.store.shard(1, world.ns).group
    world.write(chain("a", 3))
    rows = [group.index.find(each) for each in chain("a", 3)]
    assert group.policies[HOST].chances(rows, 60.0, 1.0) is None, "nothing is learned yet"
    for at in range(200):
        world.store.lookup(1, world.ns, chain("a" if at % 2 else f"b{at}", 3), 20.0 * at)
    chances = group.policies[HOST].chances(rows, 600.0, 4000.0)
    assert chances is not None
    assert len(chances) == 3
    assert all(0.5 < each <= 1 for each in chances)
