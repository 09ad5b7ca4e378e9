"""A line of ``forebay stat`` is the difference of two status documents over the time between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from forebay.daemon import status
from forebay.daemon.cli_stat import HEADER, NVME_HEADER, line_between, lines
from forebay.daemon.status import DaemonSnapshot

MakeSnapshot = Callable[..., DaemonSnapshot]


def document(snapshot: DaemonSnapshot, **added: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(status.to_json(snapshot))
    for name, amount in added.items():
        found["store"]["counters"][name] += amount
    return found


def test_rates_are_differences_over_the_interval(make_snapshot: MakeSnapshot) -> None:
    before = document(make_snapshot())
    after = document(
        make_snapshot(),
        lookups=10,
        lookup_hashes=100,
        lookup_hit_blocks=75,
        acquired_blocks=70,
        acquired_bytes=14_000_000_000,
        committed_blocks=20,
        committed_bytes=4_000_000_000,
        rejected_full_blocks=2,
        rejected_orphan_blocks=2,
        evicted_blocks=6,
        promoted_blocks=8,
        demoted_blocks=4,
    )
    after["nvme"]["read_bytes"] += 6_000_000_000
    after["nvme"]["written_bytes"] += 3_000_000_000
    after["verbs"][0]["requests"] += 30
    line = line_between(before, after, 2.0)
    assert (line.requests_s, line.lookups_s, line.hit) == (15, 5, 0.75)
    assert line.read_gb_s == 7.0
    assert (line.read_blocks_s, line.stored_blocks_s, line.stored_gb_s) == (35, 10, 2.0)
    assert (line.rejected_blocks_s, line.evicted_blocks_s, line.sessions) == (2, 3, 3)
    assert line.fill == pytest.approx((123 << 20) / (1 << 30))
    assert (line.promoted_blocks_s, line.nvme_read_gb_s) == (4, 3.0)
    assert (line.demoted_blocks_s, line.nvme_written_gb_s) == (2, 1.5)
    assert line.nvme_fill == line.fill


def test_an_idle_or_empty_daemon_divides_by_nothing() -> None:
    line = line_between({}, {}, 1.0)
    assert (line.hit, line.fill, line.requests_s) == (0, 0, 0)


def test_columns_stand_under_their_heads() -> None:
    assert len(line_between({}, {}, 1.0).text()) == len(HEADER)
    assert len(line_between({}, {}, 1.0).nvme_text()) == len(NVME_HEADER)


def test_fill_of_memory_is_not_thinned_by_a_large_drive() -> None:
    tiers = [
        {"tier": "host", "capacity_bytes": 100, "resident_bytes": 90},
        {"tier": "nvme", "capacity_bytes": 10_000, "resident_bytes": 100},
    ]
    line = line_between({}, {"store": {"tiers": tiers}}, 1.0)
    assert (line.fill, line.nvme_fill) == (0.9, 0.01)


def test_the_interval_is_measured_so_that_a_late_wake_up_does_not_bend_rates() -> None:
    now = [100.0]
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        now[0] += 2 * seconds

    taken = iter([{"store": {"counters": {"lookups": count}}} for count in (0, 10, 30)])
    found = list(islice(lines(lambda: next(taken), wait, lambda: now[0], 1.0), 2))
    assert waits == [1.0, 1.0]
    assert [line.interval_s for line in found] == [2.0, 2.0]
    assert [line.lookups_s for line in found] == [5.0, 10.0]
