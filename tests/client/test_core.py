"""The client core without any I/O: its generators, driven by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from forebay.client import core
from forebay.client.namespaces import Namespace
from forebay.client.places import SlabMapping
from forebay.client.results import BlockOutcome, FetchResult
from forebay.kvstore.errors import Busy, Corrupt, Internal, NotLeased, PeerLost
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Outcome
from forebay.transports import messages as m

SPEC = NamespaceSpec(model="m", revision="1", dtype="uint8", block_tokens=4, segment_bytes=(4096,))
NS = Namespace.of(SPEC)
HASHES = NS.hasher.hashes(range(4 * 6))
SLOTS = 4


class Script:
    """Executes actions as told; records them."""

    def __init__(self) -> None:
        self.attachment = core.Attachment(m.MESSAGE_BYTES_MAX, m.HASHES_MAX)
        self.replies: dict[type[m.Request], Any] = {
            m.OpenNamespaceRequest: m.OpenNamespaceReply(1, bytes(32), 4096, 4096, SLOTS, 32, 4)
        }
        self.slabs = {serial: mapping() for serial in range(3)}
        self.actions: list[core.Action] = []
        self.on_copy: Callable[[core.Copy], Any] = lambda copy: ()
        self.standing = True

    def run(self, steps: core.Steps[Any]) -> Any:
        send, value = steps.send, None
        while True:
            try:
                action = send(value)
            except StopIteration as stop:
                return stop.value
            self.actions.append(action)
            try:
                value, send = self.perform(action), steps.send
            except BaseException as error:  # noqa: BLE001  # thrown into the operation, as the shells do
                value, send = error, steps.throw

    def perform(self, action: core.Action) -> Any:
        if isinstance(action, core.Exchange):
            if PeerLost in [type(self.replies.get(type(request))) for request in action.requests]:
                raise PeerLost("gone")
            return [self.replies[type(request)] for request in action.requests]
        if isinstance(action, core.Map):
            return self.slabs[action.slab]
        if isinstance(action, core.Copy):
            return self.on_copy(action)
        return self.standing

    def sent(self) -> list[str]:
        """Names of what was sent, in order; what travelled together is joined by a plus."""
        names = []
        for action in self.actions:
            if isinstance(action, core.Exchange):
                names.append("+".join(type(request).__name__.removesuffix("Request") for request in action.requests))
            elif isinstance(action, core.Post):
                names.append("post " + type(action.request).__name__.removesuffix("Request"))
            else:
                names.append(type(action).__name__.lower())
        return names


def mapping(*, writable: bool = True, slot_bytes: int = 4096) -> SlabMapping:
    data = np.zeros(SLOTS * slot_bytes, np.uint8)
    return SlabMapping.of(data, np.ones(SLOTS, np.uint64), slot_bytes, writable=writable)


def work(hashes: list[bytes], *, writable: bool = True) -> core.Transfer:
    return core.transfer(NS, hashes, np.zeros((len(hashes), 4096), np.uint8), None, writable=writable)


def slots(*numbers: int) -> tuple[bytes, bytes]:
    return m.join_u64(numbers), m.join_u64([1] * len(numbers))


@pytest.fixture
def script() -> Script:
    return Script()


def test_a_fetch_asks_maps_copies_and_releases(script: Script) -> None:
    script.replies[m.AcquireRequest] = m.AcquireReply(7, *slots(1, 2, 9))
    result = script.run(core.fetch(script.attachment, work(HASHES[:3]), 0, strict=True))
    assert result == FetchResult(3, 3 * 4096, "")
    assert script.sent() == ["OpenNamespace", "Acquire", "map", "map", "copy", "post Release"]
    script.actions.clear()
    script.run(core.fetch(script.attachment, work(HASHES[:3]), 0, strict=True))
    assert script.sent() == ["Acquire", "copy", "post Release"]


def test_a_plan_names_the_slots_addresses(script: Script) -> None:
    script.replies[m.AcquireRequest] = m.AcquireReply(7, *slots(2, 9, 0))
    plans = []
    script.on_copy = lambda copy: plans.append(copy.plan) or ()
    transfer = core.transfer(NS, HASHES[:3], np.zeros((9, 4096), np.uint8), [8, 1, 5], writable=True)
    script.run(core.fetch(script.attachment, transfer, 0, strict=True))
    zero, two = script.slabs[0].address, script.slabs[2].address
    assert plans[0].addresses.tolist() == [zero + 2 * 4096, two + 4096, zero]
    assert plans[0].block_ids.tolist() == [8, 1, 5]


def test_a_generation_that_moved_during_the_copy_is_stale(script: Script) -> None:
    script.replies[m.AcquireRequest] = m.AcquireReply(7, *slots(0, 1, 2))

    def tamper(copy: core.Copy) -> Any:
        script.slabs[0].generations[1] += 1
        return ()

    script.on_copy = tamper
    result = script.run(core.fetch(script.attachment, work(HASHES[:3]), 0, strict=True))
    assert result == FetchResult(1, 4096, "stale")
    assert script.sent()[-1] == "post Release"


def test_a_daemon_that_died_during_the_copy_makes_it_a_miss(script: Script) -> None:
    script.replies[m.AcquireRequest] = m.AcquireReply(7, *slots(0, 1))
    script.standing = False
    result = script.run(core.fetch(script.attachment, work(HASHES[:2]), 0, strict=False))
    assert result == FetchResult(0, 0, "peer_lost")


def test_the_lease_is_released_when_the_copy_raises(script: Script) -> None:
    script.replies[m.AcquireRequest] = m.AcquireReply(7, *slots(0))

    def explode(copy: core.Copy) -> Any:
        raise MemoryError

    script.on_copy = explode
    with pytest.raises(MemoryError):
        script.run(core.fetch(script.attachment, work(HASHES[:1]), 0, strict=False))
    assert script.sent()[-1] == "post Release"


def test_a_slot_outside_its_slab_is_never_touched(script: Script) -> None:
    script.slabs[0] = SlabMapping.of(np.zeros(2 * 4096, np.uint8), np.ones(2, np.uint64), 4096, writable=True)
    script.replies[m.AcquireRequest] = m.AcquireReply(7, *slots(0, 3))
    with pytest.raises(Corrupt, match="outside"):
        script.run(core.fetch(script.attachment, work(HASHES[:2]), 0, strict=True))
    assert script.sent()[-1] == "post Release"
    assert "copy" not in script.sent()


def test_replies_that_make_no_sense_are_errors_not_copies(script: Script) -> None:
    script.replies[m.AcquireRequest] = m.AcquireReply(7, *slots(0, 1))
    with pytest.raises(Internal, match="more blocks"):
        script.run(core.fetch(script.attachment, work(HASHES[:1]), 0, strict=True))
    assert script.sent()[-1] == "post Release"
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0]), *slots(0))
    with pytest.raises(Internal, match="does not fit"):
        script.run(core.store(script.attachment, work(HASHES[:2]), b"", strict=True))
    assert script.sent()[-1] == "post Abort"
    script.replies[m.LookupRequest] = m.PingReply()
    with pytest.raises(Internal, match="PingReply"):
        script.run(core.lookup(script.attachment, NS, HASHES))


def test_a_mapping_of_another_slot_size_is_not_used(script: Script) -> None:
    script.slabs[0] = mapping(slot_bytes=8192)
    script.replies[m.AcquireRequest] = m.AcquireReply(7, *slots(0))
    assert script.run(core.fetch(script.attachment, work(HASHES[:1]), 0, strict=True)) == FetchResult(0, 0, "stale")
    assert "copy" not in script.sent()


def test_only_blocks_to_write_are_copied(script: Script) -> None:
    codes = bytes([Outcome.PRESENT, Outcome.WRITE, Outcome.IN_FLIGHT, Outcome.WRITE])
    script.replies[m.ReserveRequest] = m.ReserveReply(8, codes, *slots(3, 5))
    script.replies[m.CommitRequest] = m.CommitReply(2)
    plans = []
    script.on_copy = lambda copy: plans.append(copy.plan) or ()
    result = script.run(core.store(script.attachment, work(HASHES[:4], writable=False), b"", strict=True))
    assert plans[0].block_ids.tolist() == [1, 3]
    assert (result.committed, result.present, result.bytes) == (2, 2, 2 * 4096)
    assert script.sent() == ["OpenNamespace", "Reserve", "map", "map", "copy", "Commit"]


def test_a_commit_travels_with_the_next_reserve(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "BATCH_BLOCKS", 2)
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0]), *slots(0, 1))
    script.replies[m.CommitRequest] = m.CommitReply(2)
    result = script.run(core.store(script.attachment, work(HASHES), b"", strict=True))
    assert result.committed == 6
    assert script.sent() == [
        "OpenNamespace",
        "Reserve",
        "map",
        "copy",
        "Commit+Reserve",
        "copy",
        "Commit+Reserve",
        "copy",
        "Commit",
    ]
    parents = [r.parent for a in script.actions if isinstance(a, core.Exchange) for r in a.requests if r.verb == 8]
    assert parents == [b"", HASHES[1], HASHES[3]]


def test_a_count_that_differs_makes_the_whole_batch_failed(script: Script) -> None:
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0]), *slots(0, 1))
    script.replies[m.CommitRequest] = m.CommitReply(1)
    result = script.run(core.store(script.attachment, work(HASHES[:2]), b"", strict=True))
    assert result.outcomes == (BlockOutcome.FAILED,) * 2
    assert result.committed == 0


def test_a_refused_commit_is_not_counted(script: Script) -> None:
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0]), *slots(0))
    script.replies[m.CommitRequest] = NotLeased("too late")
    result = script.run(core.store(script.attachment, work(HASHES[:1]), b"", strict=True))
    assert result.outcomes == (BlockOutcome.FAILED,)


def test_a_daemon_lost_between_batches_leaves_honest_outcomes(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch's commit was lost with the daemon: its blocks are not claimed, the rest was never asked."""
    monkeypatch.setattr(core, "BATCH_BLOCKS", 2)
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0]), *slots(0, 1))
    script.replies[m.CommitRequest] = PeerLost("gone")
    result = script.run(core.store(script.attachment, work(HASHES), b"", strict=False))
    assert result.outcomes == (BlockOutcome.FAILED,) * 2 + (BlockOutcome.UNAVAILABLE,) * 4
    assert (result.committed, result.reason) == (0, "peer_lost")


def test_an_error_during_a_store_is_raised_when_strict(script: Script) -> None:
    script.replies[m.ReserveRequest] = Busy("later")
    with pytest.raises(Busy):
        script.run(core.store(script.attachment, work(HASHES), b"", strict=True))


def test_an_outcome_of_a_newer_daemon_is_a_rejection(script: Script) -> None:
    script.replies[m.ReserveRequest] = m.ReserveReply(0, bytes([99, 99]), b"", b"")
    result = script.run(core.store(script.attachment, work(HASHES[:2]), b"", strict=True))
    assert (result.outcomes, result.rejected) == ((BlockOutcome.REJECTED,) * 2, 2)


def test_outcomes_are_the_daemons_own_numbers() -> None:
    for outcome in Outcome:
        ours = {"WRITE": "STORED"}.get(outcome.name, outcome.name)
        assert BlockOutcome[ours] == outcome


def test_a_late_grant_is_undone() -> None:
    assert core.undo(m.AcquireReply(3, b"", b"")) == m.ReleaseRequest(3)
    assert core.undo(m.ReserveReply(4, b"", b"", b"")) == m.AbortRequest(4)
    for reply in (m.AcquireReply(0, b"", b""), m.ReserveReply(0, b"", b"", b""), m.PingReply(), Busy("")):
        assert core.undo(reply) is None
