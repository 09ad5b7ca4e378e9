"""Requests are counted once, in the right bucket."""

from __future__ import annotations

import pytest

from forebay.daemon.counters import LATENCY_BOUNDS_S, RequestCounters


def test_totals_are_by_verb_and_error() -> None:
    counters = RequestCounters()
    counters.observe("ping", 1e-5)
    counters.observe("lookup", 1e-5, "Busy")
    counters.observe("lookup", 3e-5, "Busy")
    lookup, ping = counters.freeze()
    assert (lookup.verb, lookup.requests, lookup.errors) == ("lookup", 2, {"Busy": 2})
    assert (ping.verb, ping.requests, ping.errors) == ("ping", 1, {})
    assert lookup.latency_sum_s == pytest.approx(4e-5)


def test_every_latency_falls_in_one_bucket_and_a_bound_belongs_to_its_own() -> None:
    counters = RequestCounters()
    for bound in LATENCY_BOUNDS_S:
        counters.observe("x", bound)
    counters.observe("x", 1e9)
    (found,) = counters.freeze()
    assert found.latency_counts == (1,) * (len(LATENCY_BOUNDS_S) + 1)


def test_a_frozen_total_does_not_move() -> None:
    counters = RequestCounters()
    counters.observe("x", 1.0, "Busy")
    before = counters.freeze()
    counters.observe("x", 1.0, "Busy")
    assert before[0].requests == 1
    assert before[0].errors == {"Busy": 1}
