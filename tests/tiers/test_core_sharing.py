"""Whether the threads of a drive's process give way to others."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from forebay.tiers.core_sharing import REVIEW_S, CoreSharing

OURS, OTHERS = 2, 5


class Machine:
    """Its cores' ticks, its clock, and what its scheduler was told."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stat = directory / "stat"
        self.now = 0.0
        self.told: list[tuple[int, int]] = []
        self._ticks = {OURS: [0] * 10, OTHERS: [0] * 10}
        self._write()
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {OURS})
        monkeypatch.setattr(os, "sched_setscheduler", self._schedule)
        monkeypatch.setattr(os, "sched_yield", lambda: self.told.append((0, -1)))

    def sharing(self) -> CoreSharing:
        return CoreSharing(stat=self.stat, clock=lambda: self.now)

    def passes(self, *, ours_idle: int = 0, ours_waiting: int = 0, others_idle: int = 0, of: int = 100) -> None:
        self.now += REVIEW_S
        for core, idle, waiting in ((OURS, ours_idle, ours_waiting), (OTHERS, others_idle, 0)):
            ticks = self._ticks[core]
            ticks[0] += of - idle - waiting
            ticks[3] += idle
            ticks[4] += waiting
            ticks[8] += of  # a guest's, in the first as well
        self._write()

    def policies(self) -> set[int]:
        policies, self.told = {policy for _, policy in self.told}, []
        return policies

    def _schedule(self, thread: int, policy: int, param: os.sched_param) -> None:
        assert param.sched_priority == 0
        self.told.append((thread, policy))

    def _write(self) -> None:
        rows = ["cpu  1 2 3 4 5 6 7 8 9 10"]
        rows += [f"cpu{core} {' '.join(map(str, ticks))}" for core, ticks in self._ticks.items()]
        self.stat.write_text("\n".join([*rows, "intr 7 7", "", "ctxt 9"]))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_every_thread_gives_way_until_its_cores_never_idle(machine: Machine) -> None:
    sharing = machine.sharing()
    sharing.apply()
    threads = {int(thread) for thread in os.listdir("/proc/self/task")}
    assert {thread for thread, _ in machine.told} >= {threading.get_native_id()}
    assert {thread for thread, _ in machine.told} <= threads
    assert machine.policies() == {os.SCHED_BATCH}
    machine.passes(ours_idle=9, others_idle=100)
    sharing.review()
    assert machine.policies() == {os.SCHED_OTHER}
    machine.passes(ours_idle=4, ours_waiting=6)
    sharing.review()
    assert machine.policies() == {os.SCHED_BATCH}


def test_nothing_is_told_twice_nor_looked_at_too_often(machine: Machine) -> None:
    sharing = machine.sharing()
    machine.passes(ours_idle=50)
    sharing.review()
    assert machine.policies() == set()
    machine.passes(ours_idle=0)
    machine.now -= REVIEW_S / 2
    sharing.review()
    assert sharing.gives_way
    machine.now += REVIEW_S / 2
    sharing.review()
    assert not sharing.gives_way


def test_turns_are_given_only_while_it_gives_way(machine: Machine) -> None:
    sharing = machine.sharing()
    sharing.give_turn()
    assert machine.policies() == {-1}
    machine.passes()
    sharing.review()
    machine.policies()
    sharing.give_turn()
    assert machine.policies() == set()


@pytest.mark.parametrize("told", [None, "", "cpu 1 2 3\nctxt 9"])
def test_system_that_tells_nothing_of_its_cores_changes_nothing(machine: Machine, told: str | None) -> None:
    if told is None:
        machine.stat.unlink()
    else:
        machine.stat.write_text(told)
    sharing = machine.sharing()
    machine.now += REVIEW_S
    sharing.review()
    assert sharing.gives_way
    assert machine.policies() == set()


def test_system_that_refuses_a_priority_costs_nothing_more(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that is nicer than it may make its child, a container that allows no such call."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    sharing = CoreSharing(5, stat=machine.stat)
    sharing.be_nice()
    sharing.apply()
    assert sharing.gives_way
