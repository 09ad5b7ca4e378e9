"""Threads that stand back."""

from __future__ import annotations

import os
import queue
import threading

import pytest

from forebay.transports.threads import BackgroundThread

WAIT_S = 20.0


def policy_in_a_thread() -> int:
    seen = queue.SimpleQueue[int]()
    thread = BackgroundThread(lambda: seen.put(os.sched_getscheduler(0)), name="looks")
    assert thread.daemon
    thread.start()
    thread.join(WAIT_S)
    return seen.get(timeout=WAIT_S)


def test_background_thread_is_a_batch_task_and_who_starts_it_is_not() -> None:
    before = os.sched_getscheduler(0)
    assert policy_in_a_thread() == os.SCHED_BATCH
    assert os.sched_getscheduler(threading.get_native_id()) == before


def test_system_that_refuses_costs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert policy_in_a_thread() == os.sched_getscheduler(0)
