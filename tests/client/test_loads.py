"""How far leases are: notices and replies in any order, threads that wait, bounds."""

from __future__ import annotations

import itertools
import threading

import pytest

from forebay.client import loads as module
from forebay.client.loads import NOTHING, Loads, Progress


@pytest.fixture
def loads() -> Loads:
    return Loads()


def test_a_lease_is_as_far_as_the_last_that_was_told(loads: Loads) -> None:
    assert loads.begin(7, Progress(1, 5)) == Progress(1, 5)
    loads.tell(7, Progress(3, 5))
    loads.tell(7, Progress(4, 4))
    assert loads.progress(7) == Progress(4, 4)
    assert loads.progress(7).ended


def test_reply_and_notices_may_come_in_any_order() -> None:
    facts = [Progress(1, 6), Progress(3, 6), Progress(4, 4)]
    for order in itertools.permutations(range(3)):
        loads = Loads()
        for fact in order:
            loads.begin(7, facts[0]) if fact == 0 else loads.tell(7, facts[fact])
        assert loads.progress(7) == Progress(4, 4)


def test_less_is_never_ready_than_was_told_before(loads: Loads) -> None:
    loads.begin(7, Progress(3, 6))
    loads.tell(7, Progress(2, 6))
    assert loads.progress(7) == Progress(3, 6)


def test_news_is_more_ready_blocks_or_the_end(loads: Loads) -> None:
    loads.begin(7, Progress(1, 6))
    assert loads.news(7, 0) == Progress(1, 6)
    assert loads.news(7, 1) is None
    loads.tell(7, Progress(1, 4))
    assert loads.news(7, 1) is None
    loads.tell(7, Progress(1, 1))
    assert loads.news(7, 1) == Progress(1, 1)


def test_an_ended_lease_has_no_progress_and_its_notices_are_dropped(loads: Loads) -> None:
    loads.begin(7, Progress(1, 6))
    assert loads.end(7)
    assert not loads.end(7)
    loads.tell(7, Progress(6, 6))
    assert len(loads) == 0
    assert loads.news(7, 3) == NOTHING


def test_a_lease_held_twice_ends_with_its_last_holder(loads: Loads) -> None:
    """Acquired and resolved, for another shard, in one session."""
    loads.begin(7, Progress(1, 6))
    loads.begin(7, Progress(2, 6))
    assert not loads.end(7)
    loads.tell(7, Progress(6, 6))
    assert loads.progress(7) == Progress(6, 6)
    assert loads.end(7)


def test_notices_of_unknown_leases_are_bounded(loads: Loads) -> None:
    for lease in range(1, 3 * module.EARLY_LEASES_MAX):
        loads.tell(lease, Progress(1, 6))
    assert len(loads) == module.EARLY_LEASES_MAX
    last = 3 * module.EARLY_LEASES_MAX - 1
    assert loads.begin(last, Progress(0, 6)) == Progress(1, 6)
    assert loads.begin(1, Progress(0, 6)) == Progress(0, 6)


def test_whoever_waits_is_told_of_progress_and_of_the_end(loads: Loads) -> None:
    loads.begin(7, Progress(0, 2))
    seen: list[Progress | None] = []
    waiting = threading.Barrier(2)

    def wait(ready: int) -> None:
        with loads.changed:
            waiting.wait(10)
            loads.changed.wait_for(lambda: loads.news(7, ready) is not None, 10)
            seen.append(loads.news(7, ready))

    for ready, event in ((0, lambda: loads.tell(7, Progress(1, 2))), (1, lambda: loads.end(7))):
        thread = threading.Thread(target=wait, args=(ready,))
        thread.start()
        waiting.wait(10)
        event()
        thread.join(10)
        assert not thread.is_alive()
    assert seen == [Progress(1, 2), NOTHING]
