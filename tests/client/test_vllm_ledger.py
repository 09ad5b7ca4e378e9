"""The ranks' notices put together."""

from __future__ import annotations

import pytest

from forebay.client import vllm_ledger
from forebay.client.vllm_ledger import Ledger, Notice


def names(text: str) -> tuple[bytes, ...]:
    return tuple(letter.encode() for letter in text)


def stored(rank: int, text: str, parent: str = "", group: int = 0) -> Notice:
    return Notice(rank, group, True, parent.encode(), names(text))


def test_one_rank_speaks_for_itself() -> None:
    ledger = Ledger([1])
    assert ledger.take([stored(0, "abc"), stored(0, "d", "c")]) == [stored(0, "abc"), stored(0, "d", "c")]


def test_block_is_there_when_every_rank_has_stored_it() -> None:
    """Ranks may tell in other stretches, and one of them twice."""
    ledger = Ledger([2])
    assert ledger.take([stored(0, "ab"), stored(0, "ab")]) == []
    assert ledger.take([stored(1, "abc")]) == [stored(1, "ab")]
    assert ledger.take([stored(0, "cd", "b")]) == [stored(0, "c", "b")]
    assert ledger.take([stored(1, "xd", "c")]) == [stored(1, "d", "x")]


def test_groups_are_apart() -> None:
    ledger = Ledger([2, 2])
    assert ledger.take([stored(0, "a"), stored(1, "a", group=1)]) == []
    assert ledger.take([stored(0, "a", group=1)]) == [stored(0, "a", group=1)]


def test_only_ranks_with_layers_of_a_group_are_waited_for() -> None:
    ledger = Ledger([2, 1])
    assert ledger.take([stored(1, "a"), stored(1, "a", group=1)]) == [stored(1, "a", group=1)]


def test_block_that_one_rank_misses_is_gone_for_all() -> None:
    ledger = Ledger([2])
    missing = Notice(1, 0, False, b"", names("b"))
    assert ledger.take([stored(0, "ab"), missing]) == [missing]
    assert ledger.take([stored(1, "ab")]) == [stored(1, "a")]


def test_what_some_ranks_never_tell_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_ledger, "WAITING_MAX", 2)
    ledger = Ledger([2])
    ledger.take([stored(0, "abc")])
    assert ledger.take([stored(1, "abc")]) == [stored(1, "bc", "a")]
