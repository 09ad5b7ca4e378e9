"""Transfers that were decided on and have not begun: in what order they begin, and what becomes of those given up."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forebay.daemon.mover import BEGIN_MAX, Mover
from forebay.kvstore.groups import Direction, Effects, Transfer
from forebay.kvstore.movement import Verdict


@dataclass
class FakeStore:
    """Hears how transfers ended."""

    ended: list[tuple[int, list[int]]] = field(default_factory=list)

    def transfer_done(self, transfer_id: int, verdicts: list[int], checksums: list[int], now: float) -> None:
        assert len(verdicts) == len(checksums)
        self.ended.append((transfer_id, verdicts))


@dataclass
class FakeTier:
    begun: list[int] = field(default_factory=list)
    faulty: set[int] = field(default_factory=set)
    cancelled: list[int] = field(default_factory=list)

    def cancel(self, job_id: int) -> None:
        self.cancelled.append(job_id)


class BeginningMover(Mover):
    """Notes what begins instead of making a job of it."""

    def __init__(self) -> None:
        self.store, self.tier = FakeStore(), FakeTier()
        super().__init__(cast(Any, self.store), cast(Any, self.tier), cast(Any, None))

    def _begin(self, transfer: Transfer, now: float) -> None:
        if transfer.transfer_id in self.tier.faulty:
            raise ValueError("a place that does not exist")
        self.tier.begun.append(transfer.transfer_id)


def decided(ids: range, cancelled: list[int] | None = None) -> Effects:
    shard = cast(Any, SimpleNamespace())
    transfers = [Transfer(number, Direction.LOAD, shard, [0, 1], [0, 1], [0, 1], [1, 1], 0.0) for number in ids]
    return Effects(transfers=transfers, cancelled=cancelled or [])


@pytest.fixture
def mover() -> BeginningMover:
    return BeginningMover()


def test_transfers_begin_in_order_a_few_a_turn(mover: BeginningMover) -> None:
    mover.carry_out(decided(range(2 * BEGIN_MAX)), (), 0.0)
    assert not mover.tier.begun
    mover.go_on(0.0)
    assert mover.tier.begun == list(range(BEGIN_MAX))
    assert mover.has_more
    mover.go_on(0.0)
    assert mover.tier.begun == list(range(2 * BEGIN_MAX))
    assert not mover.has_more


def test_cancelled_transfer_ends_once_and_never_begins(mover: BeginningMover) -> None:
    mover.carry_out(decided(range(20)), (), 0.0)
    mover.go_on(0.0)
    begun = list(range(BEGIN_MAX))
    mover.carry_out(decided(range(0), [*begun, 7, 9, 19]), (), 0.0)
    assert mover.store.ended == [(number, [Verdict.CANCELLED] * 2) for number in (7, 9, 19)]
    assert sorted(mover.tier.cancelled) == begun, "the tier ends those it was given, and knows no others"
    while mover.has_more:
        mover.go_on(0.0)
    assert mover.tier.begun == [number for number in range(20) if number not in (7, 9, 19)]


def test_transfer_cancelled_together_with_its_decision_ends_once(mover: BeginningMover) -> None:
    mover.carry_out(decided(range(3), [1]), (), 0.0)
    assert mover.store.ended == [(1, [Verdict.CANCELLED] * 2)]
    mover.go_on(0.0)
    assert mover.tier.begun == [0, 2]


def test_transfer_that_cannot_be_begun_fails_alone(mover: BeginningMover, caplog: pytest.LogCaptureFixture) -> None:
    mover.tier.faulty = {1}
    mover.carry_out(decided(range(3)), (), 0.0)
    mover.go_on(0.0)
    assert mover.tier.begun == [0, 2]
    assert mover.store.ended == [(1, [Verdict.FAILED] * 2)]
    [record] = caplog.records
    assert record.exc_info is not None
    assert "a place that does not exist" in str(record.exc_info[1])
