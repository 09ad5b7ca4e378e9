"""Hints come from the outside: right ones are told, wrong ones counted and logged once."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from forebay.client.hints import NO_HINTS, STOPPED_NAMES, HintReader, Hints, tell
from forebay.kvstore.errors import BadRequest, PeerLost
from forebay.kvstore.outcome import StopReason


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
