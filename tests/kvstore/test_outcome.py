"""Outcome and scope numbers travel on the wire."""

from __future__ import annotations

from forebay.kvstore.outcome import Outcome, Scope


def test_numbers_are_the_golden_ones() -> None:
    """A client of another release reads them."""
    assert {o.name: o.value for o in Outcome} == {
        "WRITE": 0,
        "PRESENT": 1,
        "IN_FLIGHT": 2,
        "FULL": 16,
        "ORPHAN": 17,
        "DRAINING": 18,
        "BYPASSED": 19,
    }
    assert {s.name: s.value for s in Scope} == {"BLOCKS": 0, "PREFIX": 1, "NAMESPACE": 2}
