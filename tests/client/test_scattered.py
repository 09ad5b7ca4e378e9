"""Blocks with gaps between them, held against a plain list, on a real daemon: its dry run of an eviction counts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forebay.client import Client, FetchResult, NamespaceSpec, SegmentTable, scattered
from forebay.client.core import FETCH_DEADLINE_MS
from forebay.client.scattered import fetch_each, store_chain, stored, worth_loading
from support.live import LiveDaemon

SPEC = NamespaceSpec(model="m", revision="1", dtype="uint8", block_tokens=4, segment_bytes=(512,))
NAMES = [number.to_bytes(32, "big") for number in range(200)]


@pytest.fixture(scope="module")
def daemon() -> Iterator[LiveDaemon]:
    with LiveDaemon() as live:
        yield live


@pytest.fixture
def client(daemon: LiveDaemon) -> Iterator[Client]:
    with Client(daemon.runtime_dir, budget_ms=500) as made:
        yield made
        made.clear()


def rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (len(NAMES), 512), dtype=np.uint8)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_what_is_stored_is_told_for_each(client: Client, share: float) -> None:
    ns, chance, data = client.open_namespace(SPEC), random.Random(int(share * 100)), rows(1)
    present = [chance.random() < share for _ in NAMES]
    for number, there in enumerate(present):
        if there:
            client.store(ns, NAMES[number : number + 1], data, [number])
    asked = client.stats().calls
    assert stored(client, ns, NAMES) == worth_loading(client, ns, NAMES) == present
    if share in (0.0, 1.0):
        assert client.stats().calls - asked <= 4
    target = np.zeros_like(data)
    assert fetch_each(client, ns, NAMES, SegmentTable.of(target), range(len(NAMES))) == present
    assert all(np.array_equal(target[number], data[number]) for number, there in enumerate(present) if there)


def test_one_stored_block_among_many_is_found_in_few_calls(client: Client) -> None:
    ns = client.open_namespace(SPEC)
    client.store(ns, NAMES[150:151], rows(1), [150])
    asked = client.stats().calls
    assert stored(client, ns, NAMES).index(True) == 150
    assert client.stats().calls - asked <= 2 * 2 * 8


def test_chain_of_an_unknown_block_is_stored_all_the_same(client: Client) -> None:
    ns, table = client.open_namespace(SPEC), SegmentTable.of(rows(1))
    assert store_chain(client, ns, NAMES[1:3], table, [1, 2], NAMES[0]) == [True, True]
    assert store_chain(client, ns, NAMES[3:5], table, [3, 4], NAMES[2]) == [True, True]
    assert stored(client, ns, NAMES[:6]) == [False, True, True, True, True, False]


def test_nothing_is_stored_without_a_daemon(tmp_path: object) -> None:
    with Client(str(tmp_path)) as client:
        ns, table = client.open_namespace(SPEC), SegmentTable.of(rows(1))
        assert stored(client, ns, NAMES) == [False] * len(NAMES)
        assert stored(client, ns, []) == []
        assert fetch_each(client, ns, NAMES[:3], table, [0, 1, 2]) == [False] * 3
        assert store_chain(client, ns, NAMES[:3], table, [0, 1, 2], NAMES[3]) == [False] * 3


def test_after_a_stretch_that_was_given_up_nothing_more_is_waited_for(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ns, asked = client.open_namespace(SPEC), []

    def late(ns: Any, hashes: Any, *arguments: Any, **named: Any) -> FetchResult:
        asked.append(len(hashes))
        return FetchResult(2, 2 * SPEC.block_bytes, "late")

    monkeypatch.setattr(client, "fetch", late)
    target = SegmentTable.of(rows(0))
    assert fetch_each(client, ns, NAMES[:5], target, range(5)) == [True, True, False, False, False]
    assert asked == [5]


def test_all_stretches_together_wait_no_longer_than_one_fetch(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stretch gets what the ones before it left."""
    ns, data, given, now = client.open_namespace(SPEC), rows(1), [], [0.0]
    for number in (0, 2, 4):
        client.store(ns, NAMES[number : number + 1], data, [number])
    fetch = client.fetch

    def slow(*arguments: Any, **named: Any) -> FetchResult:
        given.append(named.get("deadline_ms", FETCH_DEADLINE_MS))
        now[0] += 20.0
        return fetch(*arguments, **named)

    monkeypatch.setattr(client, "fetch", slow)
    monkeypatch.setattr(scattered, "time", SimpleNamespace(monotonic=lambda: now[0]), raising=False)
    target = SegmentTable.of(np.zeros_like(data))
    assert fetch_each(client, ns, NAMES[:5], target, range(5)) == [True, False, True, False, True]
    assert given == [FETCH_DEADLINE_MS, FETCH_DEADLINE_MS - 20_000, 0]
