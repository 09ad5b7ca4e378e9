"""Calls that are given up when they take too long."""

from __future__ import annotations

import queue
import threading

import pytest

from forebay.tiers.deadline import within

WAIT_S = 20.0


def test_answer_and_error_in_time_are_the_callers() -> None:
    late: list[int] = []
    assert within(WAIT_S, lambda: 7, late.append) == 7
    with pytest.raises(ZeroDivisionError):
        within(WAIT_S, lambda: 1 // 0, late.append)
    assert late == []


def test_answer_that_comes_too_late_is_handed_on() -> None:
    go_on, late = threading.Event(), queue.SimpleQueue[bool]()
    with pytest.raises(TimeoutError, match="within"):
        within(0.05, lambda: go_on.wait(WAIT_S), late.put)
    assert late.empty()
    go_on.set()
    assert late.get(timeout=WAIT_S) is True
