"""What is expected is kept until its time, its session's end, or while there is other room; and all is bounded."""

from __future__ import annotations

import pytest

from forebay.kvstore import expectations
from forebay.kvstore.expectations import Expectations

HOST, NVME = 0, 1


def named(text: str, tier: int = HOST) -> list[tuple[bytes, int]]:
    return [(letter.encode(), tier) for letter in text]


def kept(made: Expectations, tier: int = HOST) -> str:
    return b"".join(sorted(made.kept[tier])).decode()


def test_each_tier_has_room_of_its_own_and_leading_blocks_come_first() -> None:
    made = Expectations(2)
    assert made.add(1, 10.0, named("ab") + named("cd", NVME) + named("e"), (2, 3)) == 4
    assert (kept(made), kept(made, NVME)) == ("ab", "cd")
    assert made.add(1, 10.0, named("ab") + named("x", NVME) + named("y", NVME), (2, 3)) == 3
    assert made.until == 10.0


def test_the_call_that_ends_last_counts() -> None:
    made = Expectations(1)
    made.add(1, 10.0, named("ab"), (9,))
    made.add(2, 20.0, named("bc"), (9,))
    made.add(3, 5.0, named("c"), (9,))
    made.expire(5.0)
    assert kept(made) == "abc"
    made.expire(10.0)
    assert (kept(made), made.until) == ("bc", 20.0)
    made.expire(20.0)
    assert (kept(made), made.until) == ("", None)


def test_what_a_session_expected_ends_with_it() -> None:
    made = Expectations(2)
    made.add(1, 10.0, named("ab") + named("z", NVME), (9, 9))
    made.add(2, 20.0, named("bc"), (9, 9))
    assert made.end_session(1)
    assert (kept(made), kept(made, NVME), made.until) == ("bc", "", 20.0)
    assert not made.end_session(1)
    assert made.end_session(2)
    assert (kept(made), made.until) == ("", None)


def test_what_was_given_up_does_not_come_back_by_itself() -> None:
    made = Expectations(2)
    made.add(1, 10.0, named("ab") + named("c", NVME), (9, 9))
    made.add(2, 20.0, named("b"), (9, 9))
    assert made.give_up(HOST)
    assert not made.give_up(HOST)
    made.end_session(2)
    made.expire(10.0)
    assert (kept(made), kept(made, NVME)) == ("", "")


def test_calls_and_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Expectations(1)
    monkeypatch.setattr(expectations, "CALLS_MAX", 3)
    assert [made.add(1, 10.0, named("a"), (9,)) for _ in range(4)] == [1, 1, 1, 0]
    made.expire(10.0)
    monkeypatch.setattr(expectations, "NAMES_MAX", 4)
    assert [made.add(1, 20.0, named("abcde"), (9,)) for _ in range(2)] == [5, 0]
    made.end_session(1)
    assert made.add(1, 20.0, named("a"), (9,)) == 1
