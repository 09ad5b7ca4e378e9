"""Loads are foreseen by their size out of the last few of each size, and a late one among them says nothing."""

from __future__ import annotations

import random

import pytest

from forebay.kvstore.load_times import SAMPLES, LoadTimes
from forebay.kvstore.planner import Origin

MIB = 1 << 20


def true_s(size_bytes: int) -> float:
    """A load with a latency, and a rate that falls with its size."""
    return 0.8e-3 + size_bytes / 9e9 + max(0, size_bytes - 16 * MIB) / 15e9


def measured(sizes: tuple[int, ...], rounds: int = SAMPLES) -> LoadTimes:
    link = LoadTimes("host", 20.0)
    for _ in range(rounds):
        for size in sizes:
            link.measured(size, true_s(size))
    return link


def test_until_a_load_was_measured_the_assumption_stands() -> None:
    link = LoadTimes("host", 20.0, 0.001)
    assert link.eta_s(20_000_000) == pytest.approx(0.002)
    assert link.bytes_per_s(MIB) == 20e9
    assert link.origin is Origin.ASSUMED
    link.measured(MIB, true_s(MIB))
    assert link.origin is Origin.MEASURED


def test_one_size_speaks_for_all_in_proportion() -> None:
    link = measured((8 * MIB,))
    assert link.eta_s(8 * MIB) == pytest.approx(true_s(8 * MIB))
    assert link.eta_s(2 * MIB) == pytest.approx(true_s(8 * MIB) / 4)
    assert link.eta_s(16 * MIB) == pytest.approx(true_s(8 * MIB) * 2)


@pytest.mark.parametrize("size_mib", [4, 6, 8, 12, 16, 24, 32])
def test_sizes_between_those_measured_are_foreseen(size_mib: int) -> None:
    link = measured((4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB))
    assert link.eta_s(size_mib * MIB) == pytest.approx(true_s(size_mib * MIB), rel=0.01)


def test_what_is_there_for_no_bytes_is_the_latency() -> None:
    link = measured((4 * MIB, 8 * MIB))
    assert link.latency_s == pytest.approx(0.8e-3)
    assert link.bytes_per_s(MIB) == pytest.approx(9e9)
    assert link.eta_s(MIB) == pytest.approx(link.latency_s + MIB / link.bytes_per_s(MIB))


def test_a_line_that_would_begin_before_its_time_is_one_through_nothing() -> None:
    link = LoadTimes("host", 20.0)
    link.measured(4 * MIB, 0.001)
    link.measured(8 * MIB, 0.004)
    assert link.latency_s == 0.0
    assert link.eta_s(MIB) == pytest.approx(0.001 / 4)


def test_more_bytes_never_take_less() -> None:
    link = LoadTimes("host", 20.0)
    link.measured(4 * MIB, 0.004)
    link.measured(8 * MIB, 0.001)
    assert link.eta_s(8 * MIB) == link.eta_s(6 * MIB) == pytest.approx(0.004)


def test_a_late_load_in_four_is_no_matter() -> None:
    draw = random.Random(5)
    link = LoadTimes("host", 20.0)
    for turn in range(200):
        size = draw.choice((4, 8, 16, 32)) * MIB
        late = 10.0 if turn % 4 == 0 else 1.0
        link.measured(size, true_s(size) * late * draw.uniform(0.95, 1.05))
    for size_mib in (4, 8, 16, 32):
        assert link.eta_s(size_mib * MIB) == pytest.approx(true_s(size_mib * MIB), rel=0.06)


def test_a_machine_that_becomes_slower_is_followed() -> None:
    link = measured((8 * MIB,))
    for _ in range(SAMPLES // 2 + 1):
        link.measured(8 * MIB, 3 * true_s(8 * MIB))
    assert link.eta_s(8 * MIB) == pytest.approx(3 * true_s(8 * MIB))


def test_ranks_load_their_parts_of_a_block_beside_each_other() -> None:
    link = measured((4 * MIB, 8 * MIB))
    assert link.blocks_s(2, 8 * MIB, 4) == pytest.approx(true_s(4 * MIB))
