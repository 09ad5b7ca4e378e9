"""Deadlines: the earliest first, removal at any time, no growth."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.kvstore.leases import Deadlines


def test_deadline_is_due_at_its_very_time() -> None:
    """`expire` called at the time that `next_deadline` named must do something, or the caller spins."""
    deadlines = Deadlines()
    deadlines.add(1, 5.0)
    assert deadlines.due(4.999) == []
    assert deadlines.next() == 5.0
    assert deadlines.due(5.0) == [1]
    assert deadlines.next() is None


def test_keys_come_due_in_the_order_of_their_deadlines() -> None:
    deadlines = Deadlines()
    for key, deadline in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 9.0)):
        deadlines.add(key, deadline)
    assert deadlines.due(3.0) == [2, 3, 1]
    assert len(deadlines) == 1


def test_removed_key_is_never_due() -> None:
    deadlines = Deadlines()
    deadlines.add(1, 1.0)
    deadlines.add(2, 2.0)
    deadlines.remove(1)
    deadlines.remove(1)
    deadlines.remove(77)
    assert deadlines.next() == 2.0
    assert deadlines.due(10.0) == [2]


def test_key_used_again_counts_from_its_new_deadline() -> None:
    """Ids may repeat; the stale entry of the first use must not end the second."""
    deadlines = Deadlines()
    deadlines.add(1, 1.0)
    deadlines.remove(1)
    deadlines.add(1, 8.0)
    assert deadlines.due(7.0) == []
    assert deadlines.due(8.0) == [1]


def test_heap_does_not_grow_with_leases_that_were_released() -> None:
    """A daemon takes and releases leases for months; none of them ever comes due."""
    deadlines = Deadlines()
    deadlines.add(0, 1e9)
    for key in range(1, 100_000):
        deadlines.add(key, 1e6 + key)
        deadlines.remove(key)
    assert len(deadlines._heap) < 100
    assert deadlines.next() == 1e9


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(("add", "remove", "due")), st.integers(0, 8), st.integers(0, 20))))
def test_deadlines_agree_with_a_dictionary(events: list[tuple[str, int, int]]) -> None:
    deadlines, model = Deadlines(), dict[int, float]()
    for what, key, time in events:
        if what == "add" and key not in model:
            deadlines.add(key, time)
            model[key] = time
        elif what == "remove":
            deadlines.remove(key)
            model.pop(key, None)
        elif what == "due":
            expected = {k for k, t in model.items() if t <= time}
            assert set(deadlines.due(time)) == expected
            model = {k: t for k, t in model.items() if k not in expected}
        assert deadlines.next() == min(model.values(), default=None)
        assert len(deadlines) == len(model)
