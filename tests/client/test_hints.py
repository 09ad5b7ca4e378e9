"""Hints come from the outside: right ones are told, wrong ones counted and logged once; what a daemon makes of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from forebay.client import AsyncClient, Client, NamespaceSpec, PrefixHasher
from forebay.client.hints import NO_HINTS, STOPPED_NAMES, HintReader, Hints, tell
from forebay.kvstore.errors import BadRequest, PeerLost
from forebay.kvstore.outcome import StopReason
from support.live import LiveDaemon, eventually

SPEC = NamespaceSpec(model="m", revision="1", dtype="uint8", block_tokens=16, segment_bytes=(1 << 16,))
SLAB_BYTES = 4 << 20
BLOCKS = 128


class FakeClient:
    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.error = error

    def stopped(self, ns: Any, hashes: Any, reason: StopReason) -> int:
        self.told.append(("stopped", ns, hashes, reason))
        return len(hashes)

    def done(self, ns: Any, hashes: Any, keep: int = 0) -> int:
        if self.error is not None:
            raise self.error
        self.told.append(("done", ns, hashes, keep))
        return len(hashes)

    def expect(self, ns: Any, hashes: Any, within_s: float) -> int:
        self.told.append(("expect", ns, hashes, within_s))
        return len(hashes)


@pytest.mark.parametrize(
    ("params", "hints"),
    [
        (None, NO_HINTS),
        ("text", NO_HINTS),
        ({"do_remote_decode": True}, NO_HINTS),
        ({"forebay": {}}, NO_HINTS),
        ({"forebay": {"done": True, "keep_tokens": 700}, "other": 1}, Hints(done=True, keep_tokens=700)),
        ({"forebay": {"expect_s": 30, "priority": 1}}, Hints(expect_s=30, priority=1)),
    ],
)
def test_hints_are_read_from_whatever_comes_with_a_request(params: object, hints: Hints) -> None:
    reader = HintReader()
    assert reader.read(params) == hints
    assert reader.ignored == 0
    assert hints.has_ending == (hints != NO_HINTS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "mapping"),
        ({"finished": True}, "unknown hint finished"),
        ({1: True}, "unknown hint 1"),
        ({"done": 1}, "done is true or false"),
        ({"keep_tokens": -1}, "keep"),
        ({"keep_tokens": "many"}, "keep"),
        ({"stop_reason": "bored"}, "stop_reason is one of stop, tool_call, length, abort"),
        ({"stop_reason": []}, "stop_reason is one of"),
        ({"priority": 4}, "priority must be from 0 to 3"),
        ({"priority": True}, "priority must be from 0 to 3"),
        ({"expect_s": True}, "expect_s is a number"),
        ({"expect_s": "soon"}, "expect_s is a number"),
        ({"expect_s": float("nan")}, "within_s"),
        ({"expect_s": 4000}, "within_s"),
        ({"done": True, "expect_s": 3}, "nobody will continue it"),
    ],
)
def test_wrong_hints_are_counted_and_logged_once(given: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    reader = HintReader()
    with caplog.at_level(logging.WARNING, "forebay.client"):
        assert reader.read({"forebay": given}) == NO_HINTS
        assert reader.read({"forebay": given}) == NO_HINTS
    assert reader.ignored == 2
    (record,) = caplog.records
    assert words in record.getMessage()


def test_a_caller_in_python_gets_the_error_itself() -> None:
    with pytest.raises(BadRequest, match="within_s"):
        Hints(expect_s=float("inf"), done=True)


def test_each_hint_is_told_by_its_verb() -> None:
    client = FakeClient()
    assert tell(client, "ns", [b"a", b"b"], Hints(done=True, keep_tokens=16), 1)
    assert tell(client, "ns", [b"a"], Hints(expect_s=2.5), 0)
    assert tell(client, "ns", [b"a"] * 20, Hints(stop_reason="tool_call"), 0)
    assert tell(client, "ns", [b"a"], NO_HINTS, 0)
    assert client.told == [
        ("done", "ns", [b"a", b"b"], 1),
        ("expect", "ns", [b"a"], 2.5),
        ("stopped", "ns", [b"a"] * STOPPED_NAMES, StopReason.TOOL_CALL),
    ]


def test_a_daemon_that_does_not_answer_is_no_error() -> None:
    assert not tell(FakeClient(PeerLost("gone")), "ns", [b"a"], Hints(done=True), 0)


@pytest.fixture(params=["lru", "hazard"])
def daemon(request: pytest.FixtureRequest) -> Iterator[LiveDaemon]:
    """Room for 128 blocks."""
    settings: dict[str, object] = {"host.slab_bytes": SLAB_BYTES, "host.eviction": request.param}
    with LiveDaemon(settings, host_bytes=str(2 * SLAB_BYTES)) as live:
        yield live
        assert live.problems() == ()


def chain(label: int, blocks: int) -> list[bytes]:
    return PrefixHasher(SPEC).hashes(range(label * 1_000_000, label * 1_000_000 + 16 * blocks))


def counters(client: Client) -> dict[str, int]:
    found: dict[str, int] = client.status()["store"]["counters"]
    return found


def test_a_daemon_keeps_and_lets_go_by_what_it_is_told(daemon: LiveDaemon) -> None:
    """Of 40 old blocks, 20 of a priority, 20 expected and 48 that are over, room for 56 more is made of the last."""
    memory = np.zeros((BLOCKS, 1 << 16), np.uint8)
    old, preferred, expected, over, new = chain(1, 40), chain(2, 20), chain(3, 20), chain(4, 48), chain(5, 56)
    with Client(daemon.runtime_dir, strict=True) as client:
        ns = client.open_namespace(SPEC)
        assert client.store(ns, preferred, memory, priority=2).committed == 20
        for names in (old, expected, over):
            assert client.store(ns, names, memory).committed == len(names)
        assert client.done(ns, over, keep=8) == 40
        assert client.expect(ns, expected, 60.0) == 20
        assert client.store(ns, new, memory).committed == 56
        found = [client.lookup(ns, names).blocks for names in (preferred, old, expected, over, new)]
        assert found == [20, 24, 20, 8, 56], "40 of what is over, then the oldest that nothing is known of"
        seen = counters(client)
        assert (seen["done_hints"], seen["done_blocks"], seen["expected_blocks"]) == (1, 40, 20)
        assert (seen["preferred_blocks"], seen["unpreferred_blocks"]) == (20, 0)


def test_what_a_client_expected_is_not_kept_when_it_has_gone(daemon: LiveDaemon) -> None:
    memory = np.zeros((BLOCKS, 1 << 16), np.uint8)
    with Client(daemon.runtime_dir, strict=True) as client:
        ns = client.open_namespace(SPEC)
        client.store(ns, chain(1, 20), memory)
        with Client(daemon.runtime_dir, strict=True) as other:
            assert other.expect(other.open_namespace(SPEC), chain(1, 20), 3600.0) == 5
        eventually(lambda: client.status()["store"]["sessions"] == 1, "the other session has ended")
        assert client.store(ns, chain(2, BLOCKS), memory).committed == BLOCKS
        assert client.lookup(ns, chain(1, 20)).blocks == 0


def test_an_asynchronous_client_tells_the_same(daemon: LiveDaemon) -> None:
    async def talk() -> list[int]:
        memory = np.zeros((BLOCKS, 1 << 16), np.uint8)
        async with AsyncClient(daemon.runtime_dir, strict=True) as client:
            ns = await client.open_namespace(SPEC)
            stored = await client.store(ns, chain(1, 20), memory, priority=1)
            told = await client.stopped(ns, chain(1, 20), StopReason.TOOL_CALL)
            expected = await client.expect(ns, chain(1, 20), 5.0)
            return [stored.committed, told, expected, await client.done(ns, chain(1, 20), 4)]

    found = asyncio.run(talk())
    with Client(daemon.runtime_dir, strict=True) as client:
        seen = counters(client)
    assert found == [20, 20 if daemon.settings["host.eviction"] == "hazard" else 0, 5, 16]
    assert (seen["stopped_hints"], seen["preferred_blocks"], seen["expect_hints"], seen["done_hints"]) == (1, 20, 1, 1)
