"""The circuit breaker, on a clock that moves when told to."""

from __future__ import annotations

from forebay.client.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    breaker.failed()
    return breaker


def test_a_closed_breaker_lets_everybody_through() -> None:
    breaker = Breaker(Clock())
    assert [breaker.allows() for _ in range(3)] == [True] * 3
    assert breaker.state == "closed"


def test_one_failure_opens_it_for_the_first_back_off() -> None:
    clock = Clock()
    breaker = opened(clock)
    assert (breaker.state, breaker.allows()) == ("open", False)
    clock.now += 0.099
    assert not breaker.allows()
    clock.now += 0.002
    assert breaker.allows()


def test_only_one_caller_probes() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 0.2
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    assert breaker.state == "half-open"


def test_each_failed_probe_doubles_the_back_off_up_to_five_seconds() -> None:
    clock = Clock()
    breaker = opened(clock)
    waits = []
    for _ in range(8):
        begun = clock.now
        while not breaker.allows():
            clock.now += 0.01
        waits.append(round(clock.now - begun, 1))
        breaker.failed()
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_probes_may_wait_a_hundredth_of_the_pause_before() -> None:
    clock = Clock()
    breaker = opened(clock)
    waits = []
    for _ in range(7):
        clock.now += 10
        assert breaker.allows()
        waits.append(round(1000 * breaker.probe_s))
        breaker.failed()
    assert waits == [1, 2, 4, 8, 16, 32, 50]


def test_a_successful_probe_closes_it_and_forgets_the_back_off() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 0.2
    assert breaker.allows()
    breaker.failed()
    clock.now += 0.3
    assert breaker.allows()
    breaker.succeeded()
    assert (breaker.state, breaker.allows()) == ("closed", True)
    breaker.failed()
    clock.now += 0.11
    assert breaker.allows()


def test_a_renewed_breaker_is_closed() -> None:
    assert opened(Clock()).renewed().state == "closed"
