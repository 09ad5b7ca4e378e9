"""The client core without any I/O: its generators, driven by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xxhash

from forebay.client import core
from forebay.client.copier import CopyTimeout
from forebay.client.loads import Progress
from forebay.client.namespaces import Namespace
from forebay.client.places import SlabMapping
from forebay.client.results import BlockOutcome, FetchResult, PersistResult
from forebay.kvstore.errors import Busy, Corrupt, ForebayError, Internal, NotLeased, PeerLost, TierFull
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Outcome
from forebay.kvstore.planner import NO_BACKLOG
from forebay.transports import messages as m
from forebay.transports.packets import Ready
from support.device_arrays import CudaTensor

SPEC = NamespaceSpec(model="m", revision="1", dtype="uint8", block_tokens=4, segment_bytes=(4096,))
NS = Namespace.of(SPEC)
HASHES = NS.hasher.hashes(range(4 * 6))
SLOTS = 4
LATE_S = float("inf")
LATE = core.Patience(LATE_S)


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
        self.told: list[Ready | Exception | str | None] = []
        """What each Await finds out; None: nothing in time; a word: the deadline has passed."""
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
        if isinstance(action, core.CopyAhead):
            replies = self.perform(core.Exchange(action.requests))
            return self.on_copy(action.copy), replies
        if isinstance(action, core.Map):
            return self.slabs[action.slab]
        if isinstance(action, core.Copy):
            return self.on_copy(action)
        if isinstance(action, core.Await):
            return self.await_(action)
        if isinstance(action, core.Compute):
            return action.call()
        if isinstance(action, core.Pause):
            return None
        if isinstance(action.request, m.ReleaseRequest):
            self.attachment.loads.end(action.request.lease)
        return self.standing

    def await_(self, action: core.Await) -> Progress | None:
        """Tell one notice after the other until one is news, as a link does."""
        loads = self.attachment.loads
        while (progress := loads.news(action.lease, action.ready)) is None:
            told = self.told.pop(0)
            if isinstance(told, Exception):
                raise told
            if told is None:
                return loads.progress(action.lease)
            if isinstance(told, str):
                return None
            self.attachment.take(told)
        return progress

    def sent(self) -> list[str]:
        """Names of what was sent, in order; what travelled together is joined by a plus."""
        names = []
        for action in self.actions:
            if isinstance(action, (core.Exchange, core.CopyAhead)):
                name = "+".join(type(request).__name__.removesuffix("Request") for request in action.requests)
                copied = f" beside copy {len(action.copy.plan.addresses)}" if isinstance(action, core.CopyAhead) else ""
                names.append(name + copied)
            elif isinstance(action, core.Post):
                names.append("post " + type(action.request).__name__.removesuffix("Request"))
            elif isinstance(action, core.Copy):
                names.append(f"copy {len(action.plan.addresses)}")
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


def lease(*numbers: int, ready: int | None = None, checksums: bytes = b"", soft_us: int = 0) -> m.AcquireReply:
    """Lease 7 over the slots, all of them ready if nothing else is said."""
    return m.AcquireReply(7, *slots(*numbers), len(numbers) if ready is None else ready, checksums, soft_us)


@pytest.fixture
def script() -> Script:
    return Script()


def test_a_fetch_asks_maps_copies_and_releases(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(1, 2, 9)
    result = script.run(core.fetch(script.attachment, work(HASHES[:3]), 0, LATE, strict=True))
    assert result == FetchResult(3, 3 * 4096, "")
    assert script.sent() == ["OpenNamespace", "Acquire", "map", "map", "copy 3", "post Release"]
    script.actions.clear()
    script.run(core.fetch(script.attachment, work(HASHES[:3]), 0, LATE, strict=True))
    assert script.sent() == ["Acquire", "copy 3", "post Release"]


def test_a_plan_names_the_slots_addresses(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(2, 9, 0)
    plans = []
    script.on_copy = lambda copy: plans.append(copy.plan) or ()
    transfer = core.transfer(NS, HASHES[:3], np.zeros((9, 4096), np.uint8), [8, 1, 5], writable=True)
    script.run(core.fetch(script.attachment, transfer, 0, LATE, strict=True))
    zero, two = script.slabs[0].address, script.slabs[2].address
    assert plans[0].addresses.tolist() == [zero + 2 * 4096, two + 4096, zero]
    assert plans[0].block_ids.tolist() == [8, 1, 5]


def test_a_generation_that_moved_during_the_copy_is_stale(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, 2)

    def tamper(copy: core.Copy) -> Any:
        script.slabs[0].generations[1] += 1
        return ()

    script.on_copy = tamper
    result = script.run(core.fetch(script.attachment, work(HASHES[:3]), 0, LATE, strict=True))
    assert result == FetchResult(1, 4096, "stale")
    assert script.sent()[-1] == "post Release"


def test_a_daemon_that_died_during_the_copy_makes_it_a_miss(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1)
    script.standing = False
    result = script.run(core.fetch(script.attachment, work(HASHES[:2]), 0, LATE, strict=False))
    assert result == FetchResult(0, 0, "peer_lost")


def test_the_lease_is_released_when_the_copy_raises(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0)

    def explode(copy: core.Copy) -> Any:
        raise MemoryError

    script.on_copy = explode
    with pytest.raises(MemoryError):
        script.run(core.fetch(script.attachment, work(HASHES[:1]), 0, LATE, strict=False))
    assert script.sent()[-1] == "post Release"


def test_a_slot_outside_its_slab_is_never_touched(script: Script) -> None:
    script.slabs[0] = SlabMapping.of(np.zeros(2 * 4096, np.uint8), np.ones(2, np.uint64), 4096, writable=True)
    script.replies[m.AcquireRequest] = lease(0, 3)
    with pytest.raises(Corrupt, match="outside"):
        script.run(core.fetch(script.attachment, work(HASHES[:2]), 0, LATE, strict=True))
    assert script.sent()[-1] == "post Release"
    assert "copy" not in [type(action).__name__.lower() for action in script.actions]


def test_replies_that_make_no_sense_are_errors_not_copies(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1)
    with pytest.raises(Internal, match="more blocks"):
        script.run(core.fetch(script.attachment, work(HASHES[:1]), 0, LATE, strict=True))
    assert script.sent()[-1] == "post Release"
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0]), *slots(0))
    with pytest.raises(Internal, match="does not fit"):
        script.run(core.store(script.attachment, work(HASHES[:2]), b"", strict=True))
    assert script.sent()[-1] == "post Abort"
    script.replies[m.LookupRequest] = m.PingReply()
    with pytest.raises(Internal, match="PingReply"):
        script.run(core.lookup(script.attachment, NS, b"".join(HASHES), NO_BACKLOG, "auto"))


def test_a_mapping_of_another_slot_size_is_not_used(script: Script) -> None:
    script.slabs[0] = mapping(slot_bytes=8192)
    script.replies[m.AcquireRequest] = lease(0)
    assert script.run(core.fetch(script.attachment, work(HASHES[:1]), 0, LATE, strict=True)) == FetchResult(
        0, 0, "stale"
    )
    assert "copy" not in [type(action).__name__.lower() for action in script.actions]


def test_only_blocks_to_write_are_copied(script: Script) -> None:
    codes = bytes([Outcome.PRESENT, Outcome.WRITE, Outcome.IN_FLIGHT, Outcome.WRITE])
    script.replies[m.ReserveRequest] = m.ReserveReply(8, codes, *slots(3, 5))
    script.replies[m.CommitRequest] = m.CommitReply(2)
    plans = []
    script.on_copy = lambda copy: plans.append(copy.plan) or ()
    result = script.run(core.store(script.attachment, work(HASHES[:4], writable=False), b"", strict=True))
    assert plans[0].block_ids.tolist() == [1, 3]
    assert (result.committed, result.present, result.bytes) == (2, 2, 2 * 4096)
    assert script.sent() == ["OpenNamespace", "Reserve", "map", "map", "copy 2", "Commit"]


def test_requests_travel_while_a_batch_is_copied(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit of the batch before, and the reserve of the one after."""
    monkeypatch.setattr(core, "BATCH_BLOCKS", 2)
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0]), *slots(0, 1))
    script.replies[m.CommitRequest] = m.CommitReply(2)
    result = script.run(core.store(script.attachment, work(HASHES), b"", strict=True))
    assert result.committed == 6
    assert script.sent() == [
        "OpenNamespace",
        "Reserve",
        "map",
        "Reserve beside copy 2",
        "Commit+Reserve beside copy 2",
        "Commit beside copy 2",
        "Commit",
    ]
    asking = [action for action in script.actions if isinstance(action, (core.Exchange, core.CopyAhead))]
    assert [r.parent for a in asking for r in a.requests if r.verb == 8] == [b"", HASHES[1], HASHES[3]]


def test_next_batch_is_given_back_when_this_one_has_a_gap(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was reserved ahead, and nobody could find what follows a gap."""
    monkeypatch.setattr(core, "BATCH_BLOCKS", 2)
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0]), *slots(0, 1))
    script.replies[m.CommitRequest] = m.CommitReply(1)
    script.on_copy = lambda copy: (1,)
    result = script.run(core.store(script.attachment, work(HASHES), b"", strict=True))
    assert result.outcomes == (BlockOutcome.STORED, BlockOutcome.FAILED) + (BlockOutcome.ORPHAN,) * 4
    assert script.sent()[3:] == ["Reserve beside copy 2", "post Abort", "Commit"]


def test_nothing_is_reserved_ahead_of_a_batch_that_was_cut_short(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "BATCH_BLOCKS", 2)
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, BlockOutcome.FULL]), *slots(0))
    script.replies[m.CommitRequest] = m.CommitReply(1)
    script.run(core.store(script.attachment, work(HASHES), b"", strict=True))
    assert script.sent()[3:] == ["copy 1", "Commit"]


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
    """The first batch's commit was lost with the daemon, beside the second's copy: neither is claimed."""
    monkeypatch.setattr(core, "BATCH_BLOCKS", 2)
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0]), *slots(0, 1))
    script.replies[m.CommitRequest] = PeerLost("gone")
    result = script.run(core.store(script.attachment, work(HASHES), b"", strict=False))
    assert result.outcomes == (BlockOutcome.FAILED,) * 4 + (BlockOutcome.UNAVAILABLE,) * 2
    assert (result.committed, result.reason) == (0, "peer_lost")


class Batches(Script):
    """Reservations 10, 11, ... of two blocks each, until `then` is what another reserve finds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, then: ForebayError | m.ReserveReply, granted: int = 1) -> None:
        super().__init__()
        monkeypatch.setattr(core, "BATCH_BLOCKS", 2)
        self._then = then
        self._granted = granted
        self._reserves = 0
        self.replies[m.CommitRequest] = m.CommitReply(2)

    def perform(self, action: core.Action) -> Any:
        requests = action.requests if isinstance(action, core.Exchange) else ()  # what travels ahead comes here too
        if any(isinstance(request, m.ReserveRequest) for request in requests):
            at = 4 * self._reserves  # each in a slab of its own
            grant = m.ReserveReply(10 + self._reserves, bytes([0, 0]), *slots(at, at + 1))
            self.replies[m.ReserveRequest] = grant if self._reserves < self._granted else self._then
            self._reserves += 1
        return super().perform(action)


def test_an_error_of_the_next_reserve_does_not_lose_what_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Batches(monkeypatch, TierFull("no memory for a slab"))
    result = script.run(core.store(script.attachment, work(HASHES), b"", strict=False))
    assert result.outcomes == (BlockOutcome.STORED,) * 2 + (BlockOutcome.UNAVAILABLE,) * 4
    assert (result.committed, result.reason) == (2, "tier_full")
    assert script.sent()[1:] == ["Reserve", "map", "Reserve beside copy 2", "Commit"]


def test_a_reservation_that_makes_no_sense_does_not_lose_what_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Batches(monkeypatch, m.ReserveReply(9, bytes([0, 0]), *slots(7)))
    with pytest.raises(Internal):
        script.run(core.store(script.attachment, work(HASHES), b"", strict=True))
    assert script.sent()[3:] == ["Reserve beside copy 2", "post Abort", "Commit"]


def test_a_store_cancelled_between_batches_keeps_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Batches(monkeypatch, Busy("later"), granted=2)
    del script.slabs[1]
    with pytest.raises(KeyError):  # as a cancellation would, while the second batch's slab is mapped
        script.run(core.store(script.attachment, work(HASHES), b"", strict=False))
    assert script.sent()[3:] == ["Reserve beside copy 2", "map", "post Abort", "post Commit"]


@pytest.mark.parametrize("reply", [m.ReserveReply(0, b"", b"", b""), m.ReserveReply(0, bytes([0, 0]), *slots(0, 1))])
def test_no_reservation_that_makes_no_sense_is_an_error(script: Script, reply: m.ReserveReply) -> None:
    script.replies[m.ReserveRequest] = reply
    result = script.run(core.store(script.attachment, work(HASHES[:2]), b"", strict=False))
    assert (result.outcomes, result.reason) == ((BlockOutcome.UNAVAILABLE,) * 2, "internal")


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
    assert core.undo(m.AcquireReply(3, b"", b"", 0, b"")) == m.ReleaseRequest(3)
    assert core.undo(m.ReserveReply(4, b"", b"", b"")) == m.AbortRequest(4)
    for reply in (m.AcquireReply(0, b"", b"", 0, b""), m.ReserveReply(0, b"", b"", b""), m.PingReply(), Busy("")):
        assert core.undo(reply) is None


# --- blocks that are still being read -------------------------------------------------------------------------


def test_what_is_ready_is_copied_while_the_rest_is_read(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, 4, 5, ready=2)
    script.told = [Ready(7, 3, 6), Ready(7, 6, 6)]
    result = script.run(core.fetch(script.attachment, work(HASHES), 0, LATE, strict=True))
    assert result == FetchResult(6, 6 * 4096, "")
    ranges = ["copy 2", "await", "copy 1", "await", "copy 3"]
    assert script.sent() == ["OpenNamespace", "Acquire", "map", "map", *ranges, "post Release"]
    assert len(script.attachment.loads) == 0


def test_ranges_go_to_the_blocks_and_come_from_the_slots_of_their_own(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(3, 4, 9, ready=1)
    script.told = [Ready(7, 3, 3)]
    plans: list[Any] = []
    script.on_copy = lambda copy: plans.append(copy.plan) or ()
    transfer = core.transfer(NS, HASHES[:3], np.zeros((9, 4096), np.uint8), [8, 1, 5], writable=True)
    script.run(core.fetch(script.attachment, transfer, 0, LATE, strict=True))
    zero, one, two = (script.slabs[serial].address for serial in range(3))
    assert [plan.block_ids.tolist() for plan in plans] == [[8], [1, 5]]
    assert [plan.addresses.tolist() for plan in plans] == [[zero + 3 * 4096], [one, two + 4096]]


def test_nothing_is_copied_before_something_is_ready(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, ready=0)
    script.told = [Ready(7, 2, 2)]
    assert script.run(core.fetch(script.attachment, work(HASHES[:2]), 0, LATE, strict=True)).blocks == 2
    assert script.sent() == ["OpenNamespace", "Acquire", "map", "await", "copy 2", "post Release"]


def test_a_notice_that_came_before_the_reply_counts(script: Script) -> None:
    script.attachment.take(Ready(7, 2, 2))
    script.replies[m.AcquireRequest] = lease(0, 1, ready=0)
    assert script.run(core.fetch(script.attachment, work(HASHES[:2]), 0, LATE, strict=True)).blocks == 2
    assert "await" not in script.sent()


def test_blocks_that_will_not_come_are_a_miss(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, ready=1)
    script.told = [Ready(7, 2, 4), Ready(7, 3, 3)]
    result = script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, LATE, strict=True))
    assert result == FetchResult(3, 3 * 4096, "miss")
    assert script.sent()[-1] == "post Release"


def test_a_total_that_shrinks_ends_nothing_that_still_comes(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, ready=1)
    script.told = [Ready(7, 1, 3), Ready(7, 3, 3)]
    assert script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, LATE, strict=True)).blocks == 3
    assert script.sent().count("await") == 1


def test_when_no_block_comes_in_time_what_was_verified_counts(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, ready=1)
    script.told = [Ready(7, 3, 4), None]
    result = script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, LATE, strict=True))
    assert result == FetchResult(3, 3 * 4096, "timeout")
    assert script.sent()[-1] == "post Release"


def test_at_the_deadline_of_a_fetch_what_was_verified_counts(script: Script) -> None:
    """However steadily the blocks came until then."""
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, ready=1)
    script.told = [Ready(7, 2, 4), Ready(7, 3, 4), "passed"]
    result = script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, core.Patience(77.0), strict=True))
    assert result == FetchResult(3, 3 * 4096, "deadline")
    assert {action.until_s for action in script.actions if isinstance(action, core.Await)} == {77.0}
    assert script.sent()[-1] == "post Release"


SOON = core.Patience(LATE_S, plans=True)


def awaited_until(script: Script) -> set[float | None]:
    return {action.until_s for action in script.actions if isinstance(action, core.Await)}


def test_at_the_soft_deadline_what_came_by_then_is_copied_and_the_daemon_is_told(script: Script) -> None:
    """That the last wait ended without news does not say that nothing had come."""
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, ready=1, soft_us=50_000)
    script.told = [Ready(7, 2, 4), "passed"]
    wait, last = script.await_, Ready(7, 3, 4)

    def with_one_more(action: core.Await) -> Any:
        told = wait(action)
        if told is None:
            script.attachment.take(last)
        return told

    script.await_ = with_one_more  # type: ignore[method-assign]
    result = script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, SOON, strict=True))
    assert result == FetchResult(3, 3 * 4096, "late")
    assert [name for name in script.sent() if name.startswith("copy")] == ["copy 1", "copy 1", "copy 1"]
    assert script.sent()[-2:] == ["post Release", "post Report"]
    (told,) = [action.request for action in script.actions if isinstance(action, core.Post)][-1:]
    assert told == m.ReportRequest(0, 0, 0, 0, 0, late_loads=1)
    (until_s,) = awaited_until(script)
    assert until_s is not None
    assert 0 < until_s < LATE_S


def test_all_that_came_by_the_soft_deadline_is_no_late_fetch(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, ready=1, soft_us=50_000)
    script.told = ["passed"]
    wait = script.await_

    def with_the_rest(action: core.Await) -> Any:
        told = wait(action)
        script.attachment.take(Ready(7, 4, 4))
        return told

    script.await_ = with_the_rest  # type: ignore[method-assign]
    assert script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, SOON, strict=True)).reason == ""


@pytest.mark.parametrize(
    ("patience", "soft_us", "reason"),
    [(core.Patience(5.0, plans=True), 50_000, "deadline"), (core.Patience(77.0), 50_000, "deadline"), (SOON, 0, "")],
    ids=["the deadline comes before", "plans are not followed", "there is none"],
)
def test_the_soft_deadline_counts_only_where_it_is_followed_and_comes_first(
    script: Script, patience: core.Patience, soft_us: int, reason: str
) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, ready=1, soft_us=soft_us)
    script.told = ["passed"] if reason else [Ready(7, 4, 4)]
    result = script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, patience, strict=True))
    assert result.reason == reason
    assert awaited_until(script) == {patience.until_s}
    assert "post Report" not in script.sent()


def test_a_daemon_lost_while_blocks_are_read_makes_all_of_them_a_miss(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, ready=3)
    script.told = [PeerLost("gone")]
    script.standing = False
    result = script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, LATE, strict=False))
    assert result == FetchResult(0, 0, "peer_lost")
    assert script.sent()[-1] == "post Release"


def test_every_range_is_checked_after_its_own_copy(script: Script) -> None:
    """A generation that moves after its range was checked does no harm; one of the next range does."""
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, ready=2)
    script.told = [Ready(7, 4, 4)]
    copies: list[core.Copy] = []

    def tamper(copy: core.Copy) -> Any:
        copies.append(copy)
        if len(copies) == 2:
            script.slabs[0].generations[[0, 3]] += 1
        return ()

    script.on_copy = tamper
    result = script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, LATE, strict=True))
    assert result == FetchResult(3, 3 * 4096, "stale")


def test_a_slab_that_cannot_be_mapped_ends_the_wait(script: Script) -> None:
    script.slabs[1] = mapping(slot_bytes=8192)
    script.replies[m.AcquireRequest] = lease(2, 3, 4, 5, ready=1)
    script.told = [Ready(7, 2, 4)]
    result = script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, LATE, strict=True))
    assert result == FetchResult(2, 2 * 4096, "stale")


def test_a_lease_that_could_not_be_used_is_not_followed(script: Script) -> None:
    script.slabs[0] = SlabMapping.of(np.zeros(2 * 4096, np.uint8), np.ones(2, np.uint64), 4096, writable=True)
    for request, reply in (
        (m.AcquireRequest, lease(3, 0, ready=0)),
        (m.ResolveRequest, m.ResolveReply(*slots(3, 0), 0, b"")),
    ):
        script.replies[request] = reply
        operation = core.acquire(script.attachment, NS, HASHES[:2], 0)
        with pytest.raises(Corrupt, match="outside"):
            script.run(operation if request is m.AcquireRequest else core.resolve(script.attachment, NS, 7))
        assert len(script.attachment.loads) == 0


# --- checksums ------------------------------------------------------------------------------------------------


def sums(*blocks: bytes) -> bytes:
    return m.join_u64(xxhash.xxh3_64_intdigest(block) or 1 for block in blocks)


@pytest.mark.parametrize(
    ("told", "blocks", "reason"),
    [
        (sums(bytes(4096), bytes(4096), bytes(4096)), 3, ""),
        (sums(bytes(4096), b"else", bytes(4096)), 1, "corrupt"),
        (m.join_u64([0, 0, 1]), 2, "corrupt"),
        (m.join_u64([0, 0, 0]), 3, ""),
        (b"", 3, ""),
    ],
)
def test_a_block_of_another_checksum_is_corrupt(script: Script, told: bytes, blocks: int, reason: str) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, 2, checksums=told)
    result = script.run(core.fetch(script.attachment, work(HASHES[:3]), 0, LATE, strict=True, verify=True))
    assert result == FetchResult(blocks, blocks * 4096, reason)
    script.run(core.fetch(script.attachment, work(HASHES[:3]), 0, LATE, strict=True))
    assert script.sent()[-1] == "post Release"
    assert sum(isinstance(action, core.Compute) for action in script.actions) == any(told)


def test_checksums_belong_to_the_blocks_of_their_range(script: Script) -> None:
    good = bytes(4096)
    script.replies[m.AcquireRequest] = lease(0, 1, 2, 3, ready=2, checksums=sums(good, good, good, b"else"))
    script.told = [Ready(7, 4, 4)]
    result = script.run(core.fetch(script.attachment, work(HASHES[:4]), 0, LATE, strict=True, verify=True))
    assert result == FetchResult(3, 3 * 4096, "corrupt")


def test_a_stale_block_is_not_called_corrupt(script: Script) -> None:
    """Its bytes are another block's, which is nobody's fault."""
    script.replies[m.AcquireRequest] = lease(0, 1, checksums=m.join_u64([1, 1]))
    script.slabs[0].generations[0] += 1
    result = script.run(core.fetch(script.attachment, work(HASHES[:2]), 0, LATE, strict=True, verify=True))
    assert result == FetchResult(0, 0, "stale")


def test_a_store_sends_the_checksums_of_what_lies_in_the_slots(script: Script) -> None:
    codes = bytes([Outcome.WRITE, Outcome.PRESENT, Outcome.WRITE])
    script.replies[m.ReserveRequest] = m.ReserveReply(8, codes, *slots(3, 5))
    script.replies[m.CommitRequest] = m.CommitReply(1)
    script.slabs[0].data[3 * 4096 :] = 7
    script.on_copy = lambda copy: (1,)
    transfer = work(HASHES[:3], writable=False)
    script.run(core.store(script.attachment, transfer, b"", strict=True, with_checksums=True))
    commits = [action.requests[0] for action in script.actions if isinstance(action, core.Exchange)][-1]
    assert commits == m.CommitRequest(8, m.join_u32([1]), sums(b"\x07" * 4096) + bytes(8))


def test_a_commit_in_place_has_no_checksum_for_what_failed(script: Script) -> None:
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0, 0]), *slots(0, 1, 2))
    script.replies[m.CommitRequest] = m.CommitReply(2)
    grant = script.run(core.reserve(script.attachment, NS, b"", HASHES[:3]))
    assert script.run(core.commit(grant, [1], with_checksums=True)) == 2
    zeros = sums(bytes(4096))
    assert script.actions[-1] == core.Exchange((m.CommitRequest(8, m.join_u32([1]), zeros + bytes(8) + zeros),))


def test_a_commit_in_place_that_cannot_be_sent_gives_the_slots_back(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled(*_: object) -> Any:
        raise KeyboardInterrupt

    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0]), *slots(0))
    grant = script.run(core.reserve(script.attachment, NS, b"", HASHES[:1]))
    monkeypatch.setattr("forebay.client.checksums.of_slots", cancelled)
    with pytest.raises(KeyboardInterrupt):
        script.run(core.commit(grant, [], with_checksums=True))
    assert script.actions[-1] == core.Post(m.AbortRequest(8))


def on_gpu(hashes: list[bytes], *, writable: bool = True) -> core.Transfer:
    """As `work`, with blocks in a GPU's memory, which nothing here may touch."""
    memory = CudaTensor(np.zeros((len(hashes), 4096), np.uint8))
    return core.transfer(NS, hashes, memory, None, writable=writable, stream=5)


@pytest.mark.parametrize("verify", [True, False])
def test_blocks_on_a_gpu_are_verified_by_the_checksums_of_their_copy(script: Script, verify: bool) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, 2, checksums=m.join_u64([11, 0, 13]))
    asked: list[bool] = []

    def copied(copy: core.Copy) -> Any:
        assert copy.plan.stream == 5
        asked.append(copy.plan.sums is not None)
        if copy.plan.sums is not None:
            copy.plan.sums[:] = [11, 12, 14]
        return ()

    script.on_copy = copied
    result = script.run(core.fetch(script.attachment, on_gpu(HASHES[:3]), 0, LATE, strict=True, verify=verify))
    assert result == (FetchResult(2, 2 * 4096, "corrupt") if verify else FetchResult(3, 3 * 4096, ""))
    assert asked == [verify]
    assert not any(isinstance(action, core.Compute) for action in script.actions)


def test_a_copy_hashes_nothing_where_no_checksum_is_known(script: Script) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1, checksums=m.join_u64([0, 0]))
    plans = []
    script.on_copy = lambda copy: plans.append(copy.plan) or ()
    assert script.run(core.fetch(script.attachment, on_gpu(HASHES[:2]), 0, LATE, strict=True, verify=True)).blocks == 2
    assert plans[0].sums is None


def test_a_store_sends_the_checksums_that_were_made_by_the_copy(script: Script) -> None:
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0, 0]), *slots(0, 1, 2))
    script.replies[m.CommitRequest] = m.CommitReply(2)

    def copied(copy: core.Copy) -> Any:
        copy.plan.sums[:] = [21, 22, 23]  # type: ignore[index]
        return (2,)

    script.on_copy = copied
    steps = core.store(script.attachment, on_gpu(HASHES[:3], writable=False), b"", strict=True, with_checksums=True)
    assert script.run(steps).committed == 2
    commits = [action.requests[0] for action in script.actions if isinstance(action, core.Exchange)][-1]
    assert commits == m.CommitRequest(8, m.join_u32([2]), m.join_u64([21, 22, 0]))
    assert not any(isinstance(action, core.Compute) for action in script.actions)


# --- copies that may still be moving ------------------------------------------------------------------------------


def hang(copy: core.Copy) -> Any:
    raise CopyTimeout("the GPU has not ended a transfer in time")


@pytest.mark.parametrize("strict", [True, False])
def test_a_fetch_whose_copy_may_still_move_keeps_its_lease(script: Script, strict: bool) -> None:
    script.replies[m.AcquireRequest] = lease(0, 1)
    script.on_copy = hang
    steps = core.fetch(script.attachment, on_gpu(HASHES[:2]), 0, LATE, strict=strict)
    if strict:
        with pytest.raises(CopyTimeout):
            script.run(steps)
    else:
        assert script.run(steps) == FetchResult(0, 0, "copy_timeout")
    assert script.sent()[-1] == "copy 2"


@pytest.mark.parametrize("strict", [True, False])
def test_a_store_whose_copy_may_still_move_neither_commits_nor_aborts(script: Script, strict: bool) -> None:
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0]), *slots(0, 1))
    script.on_copy = hang
    steps = core.store(script.attachment, on_gpu(HASHES[:2], writable=False), b"", strict=strict)
    if strict:
        with pytest.raises(CopyTimeout):
            script.run(steps)
    else:
        result = script.run(steps)
        assert (result.outcomes, result.reason) == ((BlockOutcome.FAILED,) * 2, "copy_timeout")
    assert script.sent()[-1] == "copy 2"


def test_slots_that_may_still_be_written_to_are_told(script: Script) -> None:
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0]), *slots(0, 1))
    grant = script.run(core.reserve(script.attachment, NS, b"", HASHES[:2]))
    script.on_copy = hang
    transfer = on_gpu(HASHES[:2])
    filled = script.run(core.fill(grant, transfer.table, transfer.block_ids, None, with_checksums=True))
    assert (list(filled.failed), filled.moving) == ([0, 1], True)


def test_slots_without_a_mapping_count_as_failed(script: Script) -> None:
    script.slabs[1] = mapping(slot_bytes=8192)
    script.replies[m.ReserveRequest] = m.ReserveReply(8, bytes([0, 0, 0]), *slots(2, 3, 4))
    grant = script.run(core.reserve(script.attachment, NS, b"", HASHES[:3]))
    script.on_copy = lambda copy: (1,)
    transfer = on_gpu(HASHES[:3])
    filled = script.run(core.fill(grant, transfer.table, transfer.block_ids, None, with_checksums=False))
    assert (list(filled.failed), filled.moving, len(filled.sums)) == ([1, 2], False, 2)


def test_a_lookup_never_tells_of_more_than_was_asked(script: Script) -> None:
    script.replies[m.LookupRequest] = m.LookupReply(9, (), 0, "", 9)
    assert script.run(core.lookup(script.attachment, NS, NS.blob(HASHES[:2]), NO_BACKLOG, "auto")).blocks == 2


# --- persist ----------------------------------------------------------------------------------------------------


class Durability(Script):
    """Answers PERSIST with one reply after the other."""

    def __init__(self, *replies: m.PersistReply) -> None:
        super().__init__()
        self._coming = list(replies)

    def perform(self, action: core.Action) -> Any:
        if isinstance(action, core.Exchange) and isinstance(action.requests[0], m.PersistRequest):
            return [self._coming.pop(0)]
        return super().perform(action)

    def pauses(self) -> list[float]:
        return [action.seconds for action in self.actions if isinstance(action, core.Pause)]


def test_persist_asks_until_nothing_is_pending_at_growing_intervals() -> None:
    script = Durability(m.PersistReply(1, 5), m.PersistReply(2, 4), m.PersistReply(3, 3), m.PersistReply(6, 0))
    assert script.run(core.persist(script.attachment, NS, HASHES, 10.0)) == PersistResult(6, 0)
    pauses = script.pauses()
    assert pauses == [core.PERSIST_PAUSE_S * factor for factor in (1, 2, 4)]


def test_persist_stops_asking_when_its_time_is_up() -> None:
    script = Durability(*[m.PersistReply(0, 6)] * 50)
    assert script.run(core.persist(script.attachment, NS, HASHES, 2.0)) == PersistResult(0, 6)
    assert sum(script.pauses()) == pytest.approx(2.0)
    assert max(script.pauses()) == core.PERSIST_PAUSE_MAX_S


def test_persist_with_no_time_asks_once() -> None:
    script = Durability(m.PersistReply(2, 4))
    assert script.run(core.persist(script.attachment, NS, HASHES, 0.0)) == PersistResult(2, 4)
    assert script.pauses() == []


def test_persist_of_more_hashes_than_fit_a_request_counts_leading_blocks() -> None:
    """A later request begins its writes at once; what it has durable counts only when all before it is."""
    script = Durability(m.PersistReply(1, 1), m.PersistReply(2, 0), m.PersistReply(0, 1))
    script.attachment.max_hashes = 2
    assert script.run(core.persist(script.attachment, NS, HASHES, 0.0)) == PersistResult(1, 2)
    script = Durability(m.PersistReply(2, 0), m.PersistReply(1, 0))
    script.attachment.max_hashes = 2
    assert script.run(core.persist(script.attachment, NS, HASHES, 0.0)) == PersistResult(3, 0)
