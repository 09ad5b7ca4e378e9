"""Prefills are told now and then, off the engine's thread, and what cannot be measured or told hurts nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from forebay.client.vllm_prefill import EVERY_S, PrefillMeter, Seconds, Stop
from forebay.client.vllm_work import Prefill
from forebay.kvstore.errors import PeerLost, Timeout
from support.live import eventually

ONE = Prefill(512, 1024)


class Rig:
    """A meter, what it told, and a watch that shows `seconds`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds = 0.25
        self.started = 0
        self.told: list[tuple[int, int, float]] = []
        self.on: set[threading.Thread] = set()
        self.error: Exception | None = None
        self.open_ = threading.Event()
        self.open_.set()
        self.meter = PrefillMeter(self, lambda: self.now)

    def report_prefill(self, tokens: int, depth_tokens: int, seconds: float) -> bool:
        self.on.add(threading.current_thread())
        if self.error is not None:
            raise self.error
        self.told.append((tokens, depth_tokens, seconds))
        return True

    def start(self) -> Stop:
        self.started += 1
        return lambda: self.read

    def read(self) -> float:
        assert self.open_.wait(10)
        return self.seconds

    def step(self, prefill: Prefill | None) -> None:
        self.meter.begin(prefill, self.start)
        self.meter.end()

    def tells(self, count: int) -> None:
        eventually(lambda: len(self.told) == count and self.idle, f"{count} prefills are told")

    @property
    def idle(self) -> bool:
        return self.meter._told is None or self.meter._told.done()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.open_.set()
    made.meter.close()


def test_a_prefill_is_told_from_another_thread(rig: Rig) -> None:
    rig.step(ONE)
    rig.tells(1)
    assert rig.told == [(512, 1024, 0.25)]
    assert threading.current_thread() not in rig.on


def test_not_more_often_than_now_and_then(rig: Rig) -> None:
    for _ in range(10):
        rig.step(ONE)
        rig.now += EVERY_S / 10
    assert rig.started == 1
    rig.tells(1)
    rig.now = EVERY_S
    rig.step(ONE)
    rig.tells(2)


def test_steps_of_no_one_prompt_are_not_watched(rig: Rig) -> None:
    rig.step(None)
    assert rig.started == 0
    rig.meter.begin(ONE, rig.start)
    rig.meter.begin(None, rig.start)
    rig.meter.end()
    assert rig.told == []


def test_nobody_is_queued_behind_one_that_is_not_over(rig: Rig) -> None:
    rig.open_.clear()
    rig.step(ONE)
    rig.now += 10.0
    rig.step(ONE)
    assert rig.started == 1
    rig.open_.set()
    rig.tells(1)


def test_an_error_is_logged_and_the_next_one_is_told(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    def late() -> Seconds:
        def read() -> float:
            raise Timeout("the device hangs")

        return read

    rig.meter.begin(ONE, lambda: late)
    rig.meter.end()
    eventually(lambda: "Timeout" in caplog.text and rig.idle, "the time-out is logged")
    rig.error, rig.now = PeerLost("gone"), 10.0
    rig.step(ONE)
    eventually(lambda: "PeerLost" in caplog.text and rig.idle, "the loss is logged")
    rig.error, rig.now = None, 20.0
    rig.step(ONE)
    rig.tells(1)


def test_after_closing_nothing_is_watched(rig: Rig) -> None:
    rig.meter.close()
    rig.meter.close()
    rig.step(ONE)
    assert rig.started == 0
