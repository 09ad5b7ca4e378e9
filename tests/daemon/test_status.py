"""The status document is plain JSON of bounded length that says why the daemon is not ready."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from forebay.daemon import status
from forebay.daemon.status import DaemonSnapshot
from forebay.transports.messages import STATUS_CHARS_MAX

MakeSnapshot = Callable[..., DaemonSnapshot]


def test_the_document_is_the_snapshot_as_json(make_snapshot: MakeSnapshot) -> None:
    found = json.loads(status.to_json(make_snapshot()))
    assert found["ready"] is True
    assert found["store"]["counters"]["lookups"] == 1000
    assert found["tiers"][0]["populated_bytes"] == 1 << 29
    assert found["verbs"][0]["verb"] == "lookup"


def test_the_document_stays_within_the_protocols_bound(make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot(namespaces=3000)
    hostile = tuple(dataclasses.replace(each, model="\U0001f600" * 1024) for each in snapshot.store.namespaces)
    snapshot = dataclasses.replace(snapshot, store=dataclasses.replace(snapshot.store, namespaces=hostile))
    text = status.to_json(snapshot)
    assert len(text) < STATUS_CHARS_MAX
    found = json.loads(text)
    assert len(found["store"]["namespaces"]) + found["namespaces_omitted"] == 3000
    assert found["store"]["namespaces"][0]["resident_bytes"] == 204800 + 2999


def test_a_draining_daemon_and_a_tier_that_is_down_are_not_ready(make_snapshot: MakeSnapshot, make_tier: Any) -> None:
    snapshot = make_snapshot(state="draining", tiers=(make_tier(up=False, reason="no huge pages"),))
    assert status.not_ready(snapshot) == ["draining: the daemon is shutting down", "tier host is down: no huge pages"]
    assert status.summary(snapshot)["ready"] is False


def test_the_process_is_measured() -> None:
    found = status.measure_process()
    assert found.rss_bytes > 1 << 20
    assert 0 < found.open_fds <= found.fds_max
    assert found.threads >= 1
    assert os.getpid()
