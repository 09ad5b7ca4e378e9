"""The contract of a client shell: the same suite against the blocking and the asyncio one, over real sockets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from forebay.client import (
    Backlog,
    BlockOutcome,
    EvictScope,
    FetchResult,
    NamespaceSpec,
    PersistResult,
    PrefixHasher,
    SegmentTable,
    core,
)
from forebay.client.copier import CopyPlan, NumpyCopier
from forebay.client.options import Planning
from forebay.client.results import LookupResult, RemovalResult
from forebay.kvstore.errors import (
    BadRequest,
    Busy,
    Draining,
    LayoutError,
    PeerLost,
    QuotaExceeded,
    Timeout,
    UnknownNamespace,
)
from forebay.kvstore.outcome import StopReason
from forebay.transports.messages import PersistReply, Verb
from support.fake_daemon import SLOTS_PER_SLAB, FakeDaemon
from support.live import LiveDaemon, eventually
from support.shells import AsyncShell, SyncShell, commit, wait

SPEC = NamespaceSpec(model="m", revision="1", dtype="uint8", block_tokens=4, segment_bytes=(3000, 3000))
BLOCKS = 10
SHELLS = [pytest.param(SyncShell, id="sync"), pytest.param(AsyncShell, id="async")]
MakeShell = Callable[..., Any]


@pytest.fixture(params=SHELLS)
def make_shell(request: pytest.FixtureRequest) -> Iterator[MakeShell]:
    """Makes shells of one kind and closes them."""
    made = []

    def make(daemon: Any, **options: Any) -> Any:
        made.append(request.param(daemon.runtime_dir, **{"timeout_ms": 10_000.0, **options}))
        return made[-1]

    yield make
    for shell in made:
        shell.close()


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    with FakeDaemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def live() -> Iterator[LiveDaemon]:
    with LiveDaemon() as daemon:
        yield daemon


@pytest.fixture(params=["fake", "live"])
def daemon(request: pytest.FixtureRequest) -> Any:
    """What the happy paths run against: the fake, and the real daemon, emptied."""
    daemon = request.getfixturevalue(request.param)
    if request.param == "live":
        shell = SyncShell(daemon.runtime_dir, strict=True)
        shell.clear()
        shell.close()
    return daemon


def chain(blocks: int = BLOCKS, seed: int = 0) -> list[bytes]:
    return PrefixHasher(SPEC).hashes(range(seed, seed + 4 * blocks))


def paged(blocks: int = BLOCKS, seed: int | None = 0) -> np.ndarray[Any, Any]:
    """K and V apart: (2, blocks, 3000); zeros without a seed."""
    if seed is None:
        return np.zeros((2, blocks, 3000), np.uint8)
    return np.random.default_rng(seed).integers(1, 255, (2, blocks, 3000), dtype=np.uint8)


def table(memory: np.ndarray[Any, Any]) -> SegmentTable:
    return SegmentTable.of(memory, block_axis=1)


class TamperingCopier(NumpyCopier):
    """Copies, and does something to the daemon before the copy ends; fails the positions in `failing`."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] = lambda: None
        self.failing: Sequence[int] = ()
        self.copies = 0

    def gather(self, plan: CopyPlan) -> Sequence[int]:
        super().gather(plan)
        return self._after()

    def scatter(self, plan: CopyPlan) -> Sequence[int]:
        super().scatter(plan)
        return self._after()

    def _after(self) -> Sequence[int]:
        self.copies += 1
        self.meanwhile()
        return self.failing


# --- with a daemon that does its part ------------------------------------------------------------------------


def test_what_was_stored_is_fetched_byte_for_byte(make_shell: MakeShell, daemon: Any) -> None:
    shell, hashes, source, target = make_shell(daemon, strict=True), chain(), paged(), paged(seed=None)
    ns = shell.open_namespace(SPEC)
    stored = shell.store(ns, hashes, table(source))
    assert (stored.committed, stored.bytes, stored.rejected) == (BLOCKS, BLOCKS * 6000, 0)
    assert shell.lookup(ns, hashes).blocks == BLOCKS
    assert shell.fetch(ns, hashes, table(target)) == FetchResult(BLOCKS, BLOCKS * 6000, "")
    assert np.array_equal(source, target)


def test_blocks_go_where_their_ids_say(make_shell: MakeShell, daemon: Any) -> None:
    shell, hashes, source, target = make_shell(daemon, strict=True), chain(), paged(20), paged(30, seed=None)
    ns = shell.open_namespace(SPEC)
    from_ids, to_ids = [17, 3, 11, 0, 19, 5, 6, 7, 1, 2], [2, 29, 0, 4, 5, 6, 28, 12, 11, 10]
    shell.store(ns, hashes, table(source), from_ids)
    assert shell.fetch(ns, hashes, table(target), to_ids).blocks == BLOCKS
    assert np.array_equal(source[:, from_ids], target[:, to_ids])
    untouched = sorted(set(range(30)) - set(to_ids))
    assert not target[:, untouched].any()


def test_blocks_already_present_are_not_copied(make_shell: MakeShell, daemon: Any) -> None:
    copier = TamperingCopier()
    shell = make_shell(daemon, strict=True, copier=copier)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(6), table(paged(6)))
    again = shell.store(ns, chain(), table(paged()))
    assert again.outcomes == (BlockOutcome.PRESENT,) * 6 + (BlockOutcome.STORED,) * 4
    assert (again.committed, again.present, again.bytes) == (4, 6, 4 * 6000)
    copies = copier.copies
    assert shell.store(ns, chain(), table(paged())).present == BLOCKS
    assert copier.copies == copies


def test_fetch_of_a_longer_prompt_loads_the_stored_head(make_shell: MakeShell, daemon: Any) -> None:
    shell, target = make_shell(daemon, strict=True), paged(seed=None)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(3), table(paged(3)))
    assert shell.fetch(ns, chain(), table(target)) == FetchResult(3, 3 * 6000, "miss")
    assert np.array_equal(target[:, :3], paged(3))
    assert shell.fetch(ns, chain(seed=777), table(target)) == FetchResult(0, 0, "miss")


def test_a_lease_shows_the_blocks_in_place_and_ends(make_shell: MakeShell, daemon: Any) -> None:
    shell, source = make_shell(daemon, strict=True), paged()
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(source))
    with shell.acquire(ns, chain()) as lease:
        assert (len(lease), lease.valid()) == (BLOCKS, BLOCKS)
        for block, view in enumerate(lease.views()):
            assert bytes(view) == source[:, block].tobytes()
            assert not view.flags.writeable
        assert shell.evict(ns, scope=EvictScope.NAMESPACE, dry_run=True).removed in (0, BLOCKS)
    lease.release()
    assert not shell.acquire(ns, chain(seed=99))


def test_a_reservation_publishes_only_what_is_committed(make_shell: MakeShell, daemon: Any) -> None:
    shell = make_shell(daemon, strict=True)
    ns = shell.open_namespace(SPEC)
    hashes = chain(3)
    with shell.reserve(ns, hashes) as reservation:
        assert reservation.outcomes == (BlockOutcome.STORED,) * 3
        for number, view in enumerate(reservation.views()):
            view[:] = number + 1
        assert shell.lookup(ns, hashes).blocks == 0
        assert commit(shell, reservation, (2,)) == 2
    assert shell.lookup(ns, hashes).blocks == 2
    with shell.reserve(ns, hashes[2:], parent=hashes[1]):
        pass
    assert shell.lookup(ns, hashes).blocks == 2
    with shell.acquire(ns, hashes) as lease:
        assert [int(view[0]) for view in lease.views()] == [1, 2]


def test_hints_pins_and_removals_answer_counts(make_shell: MakeShell, daemon: Any) -> None:
    shell = make_shell(daemon, strict=True)
    ns = shell.open_namespace(SPEC)
    hashes = chain()
    shell.store(ns, hashes, table(paged()))
    assert shell.touch(ns, hashes) == BLOCKS
    for wrong in (-1, 4, True, 1.0):
        with pytest.raises(BadRequest, match="priority"):
            shell.store(ns, hashes, table(paged()), priority=wrong)
        with pytest.raises(BadRequest, match="priority"):
            shell.reserve(ns, hashes, priority=wrong)
    assert shell.stopped(ns, hashes, StopReason.TOOL_CALL) in (0, BLOCKS)
    with pytest.raises(BadRequest, match="9 is not a valid StopReason"):
        shell.stopped(ns, hashes, 9)
    assert shell.done(ns, hashes) == BLOCKS
    assert shell.done(ns, hashes, keep=2) == BLOCKS - 2
    for wrong in (-1, 1 << 31, 1.0):
        with pytest.raises(BadRequest, match="keep"):
            shell.done(ns, hashes, keep=wrong)
    assert 1 <= shell.expect(ns, hashes, 0.5) <= BLOCKS
    for wrong in (0, -1, 3601, float("nan")):
        with pytest.raises(BadRequest, match="within_s"):
            shell.expect(ns, hashes, wrong)
    assert shell.prefetch(ns, hashes).resident == BLOCKS
    assert shell.pin(ns, hashes[:2]) == 2
    assert shell.evict(ns, scope=EvictScope.NAMESPACE).removed == BLOCKS - 2
    assert shell.unpin(ns, hashes) == 2
    assert shell.evict(ns, hashes[:2]).removed == 2
    assert shell.lookup(ns, hashes).blocks == 0
    assert shell.clear(dry_run=True).removed == 0


def test_a_large_removal_takes_several_answers_and_is_told_in_one(make_shell: MakeShell, live: LiveDaemon) -> None:
    """Blocks of a namespace in use are removed a few hundred at a time; others are answered in between."""
    shell = make_shell(live, strict=True)
    shell.clear()
    spec, blocks = dataclasses.replace(SPEC, segment_bytes=(64,)), 2000
    ns, hashes = shell.open_namespace(spec), chain(blocks)

    def answers() -> int:
        return sum(each["requests"] for each in live.status()["verbs"] if each["verb"] in ("evict", "clear"))

    for remove in (
        lambda dry_run: shell.evict(ns, scope=EvictScope.NAMESPACE, dry_run=dry_run),
        lambda dry_run: shell.evict(ns, hashes[:1], EvictScope.PREFIX, dry_run=dry_run),
        lambda dry_run: shell.evict(ns, hashes, dry_run=dry_run),
        lambda dry_run: shell.clear(dry_run=dry_run),
    ):
        shell.store(ns, hashes, np.zeros((blocks, 64), np.uint8))
        assert shell.lookup(ns, hashes).blocks == blocks
        assert shell.pin(ns, hashes[:1]) == 1
        before = answers()
        assert remove(True) == remove(False) == RemovalResult(blocks - 1, 1)
        assert answers() >= before + 5
        assert shell.lookup(ns, hashes).blocks == 1
    shell.unpin(ns, hashes[:1])
    assert shell.check() == []


def test_tools_can_ask_the_daemon(make_shell: MakeShell, daemon: Any) -> None:
    shell = make_shell(daemon, strict=True)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(paged()))
    assert shell.ping()
    assert shell.status()["ready"] is True
    assert shell.check() == []
    found = shell.find_namespace(ns.group_fingerprint[:5])
    assert (found.block_bytes, found.hash_bytes, found.spec) == (6000, 32, None)
    assert shell.lookup(found, chain()).blocks == BLOCKS
    with pytest.raises(UnknownNamespace):
        shell.find_namespace(b"\xff" * 32)


def test_a_lease_can_be_resolved_by_another_session_of_the_group(make_shell: MakeShell, daemon: Any) -> None:
    scheduler = make_shell(daemon, strict=True, client_group=b"engine")
    worker = make_shell(daemon, strict=True, client_group=b"engine")
    ns = scheduler.open_namespace(SPEC)
    scheduler.store(ns, chain(), table(paged()))
    with scheduler.acquire(ns, chain()) as lease, worker.resolve(ns, lease.lease_id) as resolved:
        assert len(resolved) == BLOCKS
        assert bytes(resolved.views()[4]) == paged()[:, 4].tobytes()


def test_the_empty_chain_is_answered(make_shell: MakeShell, daemon: Any) -> None:
    shell = make_shell(daemon, strict=True)
    ns = shell.open_namespace(SPEC)
    assert shell.lookup(ns, []).blocks == 0
    assert shell.store(ns, [], table(paged())).codes == b""
    assert shell.fetch(ns, [], table(paged())) == FetchResult()
    assert not shell.acquire(ns, [])
    assert shell.reserve(ns, []).outcomes == ()


# --- the caller's own mistakes --------------------------------------------------------------------------------


def test_memory_that_does_not_fit_raises_in_every_mode(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    frozen = paged()
    frozen.flags.writeable = False
    with pytest.raises(LayoutError, match="6002"):
        shell.store(ns, chain(), SegmentTable.of(np.zeros((2, 10, 3001), np.uint8), block_axis=1))
    with pytest.raises(LayoutError, match="cut at other places"):
        shell.store(ns, chain(), SegmentTable.of([np.zeros((10, 2000), np.uint8), np.zeros((10, 4000), np.uint8)]))
    with pytest.raises(LayoutError, match="read-only"):
        shell.fetch(ns, chain(), table(frozen))
    with pytest.raises(LayoutError, match="from 0 to 9"):
        shell.fetch(ns, chain(2), table(paged()), [0, 10])
    with pytest.raises(BadRequest, match="into one block"):
        shell.fetch(ns, chain(2), table(paged()), [1, 1])
    with pytest.raises(BadRequest, match="32 bytes"):
        shell.lookup(ns, [b"short"])
    with pytest.raises(BadRequest, match="block_tokens"):
        shell.open_namespace(NamespaceSpec("m", "1", "uint8", 0, (1,)))


def test_mistakes_raise_without_a_daemon_too(make_shell: MakeShell, fake: FakeDaemon) -> None:
    fake.stop()
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    with pytest.raises(LayoutError):
        shell.store(ns, chain(1), SegmentTable.of(np.zeros((1, 5), np.uint8)))


def test_a_namespace_the_daemon_refuses_raises_at_set_up(make_shell: MakeShell, fake: FakeDaemon) -> None:
    fake.fail[Verb.OPEN_NAMESPACE] = LayoutError("a block fits no slab")
    shell = make_shell(fake)
    with pytest.raises(LayoutError, match="fits no slab"):
        shell.open_namespace(SPEC)


# --- store and fetch, step by step ------------------------------------------------------------------------------


def test_a_late_reader_gets_nothing(make_shell: MakeShell, fake: FakeDaemon) -> None:
    """The generation moves on while the bytes are copied: they must not count."""
    copier = TamperingCopier()
    shell = make_shell(fake, copier=copier)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(paged()))
    copier.meanwhile = lambda: fake.run(lambda: fake.namespace().bump(0))
    assert shell.fetch(ns, chain(), table(paged(seed=None))) == FetchResult(0, 0, "stale")
    copier.meanwhile = lambda: fake.run(lambda: fake.namespace().bump(4))
    assert shell.fetch(ns, chain(), table(paged(seed=None))) == FetchResult(4, 4 * 6000, "stale")
    assert shell.stats().stale_fetches == 2
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_a_lease_tells_that_it_is_stale(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(paged()))
    with shell.acquire(ns, chain()) as lease:
        fake.run(lambda: fake.namespace().bump(6))
        assert lease.valid() == 6


def test_a_failed_copy_ends_the_leading_run(make_shell: MakeShell, fake: FakeDaemon) -> None:
    copier = TamperingCopier()
    shell = make_shell(fake, copier=copier)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(paged()))
    copier.failing = (3, 7)
    assert shell.fetch(ns, chain(), table(paged(seed=None))) == FetchResult(3, 3 * 6000, "failed")
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


@pytest.mark.parametrize("blocks_in_batch", [1, 3])
def test_a_store_in_batches_is_the_same_store(
    make_shell: MakeShell, daemon: Any, monkeypatch: pytest.MonkeyPatch, blocks_in_batch: int
) -> None:
    """Each batch is reserved while the one before is copied."""
    monkeypatch.setattr("forebay.client.core.BATCH_BLOCKS", blocks_in_batch)
    shell, source, target = make_shell(daemon, strict=True), paged(), paged(seed=None)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain()[:4], table(source[:, :4].copy()))
    stored = shell.store(ns, chain(), table(source))
    assert (stored.present, stored.committed, stored.rejected) == (4, BLOCKS - 4, 0)
    assert shell.fetch(ns, chain(), table(target)).blocks == BLOCKS
    assert np.array_equal(source, target)


def test_what_was_reserved_ahead_of_a_copy_that_raises_is_given_back(
    make_shell: MakeShell, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.client.core.BATCH_BLOCKS", 3)
    copier = TamperingCopier()
    shell = make_shell(fake, copier=copier)
    ns = shell.open_namespace(SPEC)

    def fail() -> None:
        raise MemoryError("no more")

    copier.meanwhile = fail
    with pytest.raises(MemoryError):
        shell.store(ns, chain(), table(paged()))
    copier.meanwhile = lambda: None
    assert shell.ping()  # the reply to the reserve has come by now
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_a_block_whose_copy_failed_is_given_back_with_what_follows(make_shell: MakeShell, fake: FakeDaemon) -> None:
    copier = TamperingCopier()
    shell = make_shell(fake, copier=copier)
    ns = shell.open_namespace(SPEC)
    copier.failing = (4, 6)
    result = shell.store(ns, chain(), table(paged()))
    assert result.outcomes == (
        *(BlockOutcome.STORED,) * 4,
        BlockOutcome.FAILED,
        *(BlockOutcome.ORPHAN,) * 5,
    )
    assert (result.committed, result.bytes) == (4, 4 * 6000)
    assert shell.lookup(ns, chain()).blocks == 4
    eventually(lambda: fake.run(lambda: fake.namespace().writing) == {}, "no slot is being written")
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_a_copier_that_raises_leaves_no_slot_and_no_lease(make_shell: MakeShell, fake: FakeDaemon) -> None:
    copier = TamperingCopier()
    shell = make_shell(fake, copier=copier)
    ns = shell.open_namespace(SPEC)

    def explode() -> None:
        raise MemoryError("no room")

    copier.meanwhile = explode
    with pytest.raises(MemoryError):
        shell.store(ns, chain(), table(paged()))
    assert shell.lookup(ns, chain()).blocks == 0
    copier.meanwhile = lambda: None
    shell.store(ns, chain(), table(paged()))
    copier.meanwhile = explode
    with pytest.raises(MemoryError):
        shell.fetch(ns, chain(), table(paged(seed=None)))
    assert shell.ping()
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_a_commit_that_is_refused_stores_nothing(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    fake.fail[Verb.COMMIT] = Draining("going down")
    result = shell.store(ns, chain(), table(paged()))
    assert result.outcomes == (BlockOutcome.FAILED,) * BLOCKS
    assert (result.committed, result.bytes) == (0, 0)


def test_a_full_tier_is_told_block_by_block(make_shell: MakeShell, fake: FakeDaemon) -> None:
    fake.capacity = 6
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    result = shell.store(ns, chain(), table(paged()))
    assert result.outcomes == (BlockOutcome.STORED,) * 6 + (BlockOutcome.FULL,) * 4
    assert (result.committed, result.rejected) == (6, 4)


def test_a_long_store_goes_in_batches(make_shell: MakeShell, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch's commit travels with the next one's reserve, and the chain stays whole."""
    monkeypatch.setattr("forebay.client.core.BATCH_BLOCKS", 4)
    shell, target = make_shell(fake), paged(seed=None)
    ns = shell.open_namespace(SPEC)
    assert shell.store(ns, chain(), table(paged())).committed == BLOCKS
    assert (fake.sent(Verb.RESERVE), fake.sent(Verb.COMMIT)) == (3, 3)
    assert shell.fetch(ns, chain(), table(target)).blocks == BLOCKS
    assert np.array_equal(target, paged())
    fake.capacity = fake.run(lambda: fake.namespace().next_slot) + 2
    rejected = shell.store(ns, chain(12, seed=500), table(paged(12)))
    assert rejected.outcomes == (
        *(BlockOutcome.STORED,) * 2,
        *(BlockOutcome.FULL,) * 2,
        *(BlockOutcome.ORPHAN,) * 8,
    )


def test_requests_respect_the_daemons_limit_on_hashes(make_shell: MakeShell) -> None:
    with FakeDaemon(max_hashes=4) as fake:
        shell, target = make_shell(fake, strict=True), paged(seed=None)
        ns = shell.open_namespace(SPEC)
        assert shell.store(ns, chain(), table(paged())).committed == BLOCKS
        assert shell.fetch(ns, chain(), table(target)).blocks == BLOCKS
        assert np.array_equal(target, paged())
        assert shell.lookup(ns, chain()).blocks == 4
        assert (shell.touch(ns, chain()), shell.pin(ns, chain()), shell.unpin(ns, chain())) == (BLOCKS,) * 3
        assert shell.evict(ns, chain()).removed == BLOCKS


def test_slabs_are_mapped_once_and_dropped_when_retired(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(paged()))
    slabs = shell.client._link.attachment.slabs
    assert sorted(serial for _, serial in slabs) == [0, 1, 2]
    fake.retire(1)
    assert shell.lookup(ns, chain()).blocks == SLOTS_PER_SLAB
    assert shell.ping()
    assert sorted(serial for _, serial in slabs) == [0, 2]
    assert shell.fetch(ns, chain(), table(paged(seed=None))).blocks == SLOTS_PER_SLAB


def test_a_slab_that_cannot_be_mapped_ends_the_run(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    fake.unmappable.add(1)
    stored = shell.store(ns, chain(), table(paged()))
    assert stored.committed == SLOTS_PER_SLAB
    fake.unmappable.clear()
    assert shell.store(ns, chain(), table(paged())).committed == BLOCKS - SLOTS_PER_SLAB
    other = make_shell(fake)
    fake.unmappable.add(2)
    assert other.fetch(other.open_namespace(SPEC), chain(), table(paged(seed=None))).reason == "stale"
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_slabs_mapped_read_only_take_no_stores(make_shell: MakeShell, fake: FakeDaemon) -> None:
    fake.writable = False
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    assert shell.store(ns, chain(2), table(paged(2))).outcomes == (BlockOutcome.FAILED, BlockOutcome.ORPHAN)
    eventually(lambda: fake.run(lambda: fake.namespace().writing) == {}, "no slot is being written")


# --- blocks that are still being read into memory ---------------------------------------------------------------


def held_back(make_shell: MakeShell, fake: FakeDaemon, ready: int, **options: Any) -> Any:
    """A shell, its namespace, and a daemon that has all blocks stored but only some in memory."""
    shell = make_shell(fake, **options)
    ns = shell.open_namespace(SPEC)
    assert shell.store(ns, chain(), table(paged())).committed == BLOCKS
    fake.ready_max = ready
    return shell, ns


def test_the_first_blocks_are_copied_before_the_others_are_read(make_shell: MakeShell, fake: FakeDaemon) -> None:
    """What follows is read only once the copy of what went before has been made, so each copy must be of a part."""
    copier, target = TamperingCopier(), paged(seed=None)
    shell, ns = held_back(make_shell, fake, 4, strict=True, copier=copier)
    steps = iter([(7, None), (BLOCKS, None)])
    copied: list[int] = []

    def meanwhile() -> None:
        copied.append(int(target[0, :, 0].astype(bool).sum()))
        step = next(steps, None)
        if step is not None:
            fake.land(*step)

    copier.meanwhile = meanwhile
    assert shell.fetch(ns, chain(), table(target)) == FetchResult(BLOCKS, BLOCKS * 6000, "")
    assert copied == [4, 7, BLOCKS]
    assert np.array_equal(target, paged())
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_a_notice_may_come_before_the_reply(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell, ns = held_back(make_shell, fake, 4, strict=True)
    fake.early, target = (BLOCKS, BLOCKS), paged(seed=None)
    for _ in range(10):
        target[:] = 0
        assert shell.fetch(ns, chain(), table(target)).blocks == BLOCKS
        assert np.array_equal(target, paged())


def test_blocks_whose_load_failed_are_a_miss(make_shell: MakeShell, fake: FakeDaemon) -> None:
    copier, target = TamperingCopier(), paged(seed=None)
    shell, ns = held_back(make_shell, fake, 4, copier=copier)
    steps = iter([(4, 6), (6, 6)])
    copier.meanwhile = lambda: [fake.land(*step) for step in steps]
    assert shell.fetch(ns, chain(), table(target)) == FetchResult(6, 6 * 6000, "miss")
    assert np.array_equal(target[:, :6], paged()[:, :6])
    fake.early = (0, 0)
    fake.ready_max = 0
    assert shell.fetch(ns, chain(), table(target)) == FetchResult(0, 0, "miss")
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_a_load_that_stalls_ends_the_fetch_with_what_was_verified(make_shell: MakeShell, fake: FakeDaemon) -> None:
    """A slow disk is no hung daemon: the session goes on, and the lease is given back."""
    target = paged(seed=None)
    shell, ns = held_back(make_shell, fake, 4, strict=True, timeout_ms=150.0)
    assert shell.fetch(ns, chain(), table(target)) == FetchResult(4, 4 * 6000, "timeout")
    assert np.array_equal(target[:, :4], paged()[:, :4])
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")
    assert fake.loading() == []
    stats = shell.stats()
    assert (stats.breaker, stats.attachments, stats.attached, stats.errors["timeout"]) == ("closed", 1, True, 1)
    fake.ready_max = BLOCKS
    assert shell.lookup(ns, chain()).blocks == BLOCKS


def test_a_fetch_ends_at_its_deadline_with_what_was_verified(make_shell: MakeShell, fake: FakeDaemon) -> None:
    """Long before `timeout_ms` without a block have passed."""
    shell, ns = held_back(make_shell, fake, 4, strict=True, timeout_ms=60_000.0)
    target = paged(seed=None)
    assert shell.fetch(ns, chain(), table(target), deadline_ms=100.0) == FetchResult(4, 4 * 6000, "deadline")
    assert np.array_equal(target[:, :4], paged()[:, :4])
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")
    stats = shell.stats()
    assert (stats.breaker, stats.attached, stats.unavailable, stats.errors["deadline"]) == ("closed", True, 0, 1)


def test_a_fetch_that_follows_the_plan_gives_up_at_the_soft_deadline(make_shell: MakeShell, fake: FakeDaemon) -> None:
    """With what came; the lease is given back, and the daemon hears of it."""
    shell, ns = held_back(make_shell, fake, 4, strict=True, timeout_ms=60_000.0)
    fake.soft_us, target = 100_000, paged(seed=None)
    assert shell.fetch(ns, chain(), table(target)) == FetchResult(4, 4 * 6000, "late")
    assert np.array_equal(target[:, :4], paged()[:, :4])
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")
    shell.ping()
    assert [report.late_loads for report in fake.reports] == [1]
    stats = shell.stats()
    assert (stats.late_fetches, stats.attached, stats.unavailable, stats.errors) == (1, True, 0, {})


def test_a_fetch_that_loads_always_waits_for_its_own_deadline(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell, ns = held_back(make_shell, fake, 4, strict=True, timeout_ms=60_000.0, plan="always")
    fake.soft_us = 1
    assert shell.fetch(ns, chain(), table(paged(seed=None)), deadline_ms=100.0).reason == "deadline"
    assert shell.stats().late_fetches == 0


def test_a_load_that_trickles_does_not_make_a_fetch_longer_than_its_deadline(
    make_shell: MakeShell, fake: FakeDaemon
) -> None:
    """Each wait finds something new, so none of them times out."""
    copier = TamperingCopier()
    shell, ns = held_back(make_shell, fake, 4, strict=True, copier=copier)
    landed = iter(range(5, BLOCKS + 1))
    copier.meanwhile = lambda: fake.land(next(landed), None)
    assert shell.fetch(ns, chain(), table(paged(seed=None)), deadline_ms=0) == FetchResult(4, 4 * 6000, "deadline")
    assert copier.copies == 2  # the store was one
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_a_daemon_that_dies_during_a_load_ends_the_fetch_at_once(make_shell: MakeShell, fake: FakeDaemon) -> None:
    copier = TamperingCopier()
    shell, ns = held_back(make_shell, fake, 4, timeout_ms=60_000.0, copier=copier)

    def die() -> None:
        copier.meanwhile = lambda: None
        fake.land(5)
        fake.restart()

    copier.meanwhile = die
    assert shell.fetch(ns, chain(), table(paged(seed=None))) == FetchResult(0, 0, "peer_lost")
    fake.ready_max = BLOCKS
    assert shell.store(ns, chain(), table(paged())).committed == BLOCKS


def test_a_generation_that_moves_during_a_load_is_stale(make_shell: MakeShell, fake: FakeDaemon) -> None:
    copier = TamperingCopier()
    shell, ns = held_back(make_shell, fake, 4, copier=copier)

    def reuse() -> None:
        copier.meanwhile = lambda: None
        fake.run(lambda: fake.namespace().bump(5))
        fake.land(BLOCKS)

    copier.meanwhile = reuse
    assert shell.fetch(ns, chain(), table(paged(seed=None))) == FetchResult(5, 5 * 6000, "stale")
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_a_lease_tells_how_much_of_it_may_be_read(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell, ns = held_back(make_shell, fake, 4, strict=True)
    with shell.acquire(ns, chain()) as lease:
        assert (len(lease), lease.ready(), lease.valid()) == (BLOCKS, 4, 4)
        assert wait(shell, lease, 4) == 4
        assert wait(shell, lease, 5, 20.0) == 4
        fake.land(6)
        assert wait(shell, lease, 5) == 6
        assert lease.valid() == 6
        fake.land(8)
        eventually(lambda: lease.ready() == 8, "the notice is taken without waiting")
        fake.land(9, 9)
        assert wait(shell, lease) == 9
        assert wait(shell, lease, BLOCKS) == 9
        views = lease.views()
        assert [bytes(views[block]) for block in range(9)] == [paged()[:, block].tobytes() for block in range(9)]
    assert (lease.ready(), wait(shell, lease)) == (9, 9)
    assert len(shell.client._link.attachment.loads) == 0
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_a_lease_of_a_dead_daemon_is_not_waited_for(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell, ns = held_back(make_shell, fake, 4, timeout_ms=60_000.0)
    lease = shell.acquire(ns, chain())
    fake.stop()
    assert wait(shell, lease) == 0
    assert lease.ready() == 0
    lease.release()


def test_a_resolved_lease_is_told_of_too(make_shell: MakeShell, fake: FakeDaemon) -> None:
    scheduler, ns = held_back(make_shell, fake, 4, strict=True, client_group=b"engine")
    worker = make_shell(fake, strict=True, client_group=b"engine")
    worker.open_namespace(SPEC)
    with scheduler.acquire(ns, chain()) as lease:
        with worker.resolve(ns, lease.lease_id) as resolved:
            assert resolved.ready() == 4
            fake.land(BLOCKS)
            assert wait(worker, resolved) == wait(scheduler, lease) == BLOCKS
            assert bytes(resolved.views()[9]) == paged()[:, 9].tobytes()
        assert len(worker.client._link.attachment.loads) == 0
        assert fake.held() == (1, 0)


# --- checksums and durability -----------------------------------------------------------------------------------


def test_stored_checksums_are_verified_when_loaded(make_shell: MakeShell, fake: FakeDaemon) -> None:
    writer, reader = make_shell(fake, checksum_stores=True), make_shell(fake, verify="load")
    ns, target = writer.open_namespace(SPEC), paged(seed=None)
    reader.open_namespace(SPEC)
    writer.store(ns, chain(), table(paged()))
    assert len(fake.checksums) == BLOCKS
    assert reader.fetch(ns, chain(), table(target)) == FetchResult(BLOCKS, BLOCKS * 6000, "")
    fake.run(lambda: fake.namespace().write(6, b"\xff"))  # its bytes change, its generation does not
    assert reader.fetch(ns, chain(), table(target)) == FetchResult(6, 6 * 6000, "corrupt")
    assert writer.fetch(ns, chain(), table(target)).blocks == BLOCKS
    fake.run(lambda: fake.checksums.pop(chain()[6]))
    assert reader.fetch(ns, chain(), table(target)).blocks == BLOCKS
    assert (reader.stats().corrupt_fetches, writer.stats().corrupt_fetches) == (1, 0)
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_what_is_written_in_place_has_checksums_too(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake, strict=True, checksum_stores=True, verify="load")
    ns, target = shell.open_namespace(SPEC), paged(2, seed=None)
    with shell.reserve(ns, chain(3)) as reservation:
        for view in reservation.views():
            view[:] = 5
        assert commit(shell, reservation, (2,)) == 2
    assert len(fake.checksums) == 2
    assert shell.fetch(ns, chain(2), table(target)).blocks == 2
    assert (target == 5).all()


def test_without_the_option_no_checksum_is_sent(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    shell.store(shell.open_namespace(SPEC), chain(), table(paged()))
    assert fake.checksums == {}


def test_reports_reach_the_daemon_in_microseconds(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    assert shell.report_prefill(512, 1024, 0.25)
    assert shell.report_copy(1 << 20, 0.001)
    assert [report.to_fields() for report in fake.reports] == [
        [512, 1024, 250_000, 0, 0, 0],
        [0, 0, 0, 1 << 20, 1000, 0],
    ]
    fake.stop()
    assert not shell.report_prefill(512, 1024, 0.25)


def test_a_lookup_carries_the_advice(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    assert shell.lookup(ns, chain()).worth_loading == 0
    assert LookupResult(9).worth_loading == 9
    assert LookupResult(9, advice="load", load_blocks=4).worth_loading == 4


@pytest.mark.parametrize(("plan", "worth"), [("auto", 2), ("always", 4), ("never", 0)])
def test_the_option_plan_overrules_the_advice(
    make_shell: MakeShell, fake: FakeDaemon, plan: Planning, worth: int
) -> None:
    shell = make_shell(fake, plan=plan)
    ns, fake.worth = shell.open_namespace(SPEC), 2
    shell.store(ns, chain(4), table(paged(4)))
    found = shell.lookup(ns, chain(4))
    assert (found.blocks, found.worth_loading) == (4, worth)
    assert shell.lookup(ns, chain(4)[::-1]).worth_loading == min(worth, shell.lookup(ns, chain(4)[::-1]).blocks)


def test_a_lookup_tells_what_waits_for_the_engine(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    shell.lookup(ns, chain(), Backlog(3, 4096))
    shell.lookup(ns, chain())
    assert fake.backlogs == [(3, 4096), (0, 0)]


def test_what_fetches_copied_is_reported_where_there_was_enough(
    make_shell: MakeShell, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = make_shell(fake, strict=True)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(4), table(paged(4)))
    assert shell.fetch(ns, chain(4), table(paged(4))).blocks == 4
    assert fake.reports == [], "little is told of nothing"
    monkeypatch.setattr(core, "COPIED_BYTES_MIN", 4 * SPEC.block_bytes)
    assert shell.fetch(ns, chain(4), table(paged(4))).blocks == 4
    shell.ping()
    (report,) = fake.reports
    assert (report.copied_bytes, report.computed_tokens) == (4 * SPEC.block_bytes, 0)
    assert report.copy_us > 0
    assert shell.fetch(ns, chain(4), table(paged(4))).blocks == 4
    shell.ping()
    assert len(fake.reports) == 1, "not more often than now and then"


def test_persist_asks_until_all_is_durable(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake, strict=True)
    ns = shell.open_namespace(SPEC)
    fake.persists = [PersistReply(0, 10), PersistReply(4, 6), PersistReply(10, 0)]
    assert shell.persist(ns, chain()) == PersistResult(10, 0)
    assert fake.sent(Verb.PERSIST) == 3


def test_persist_tells_what_is_still_pending_when_time_is_up(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    fake.persists = [PersistReply(4, 6)]
    assert shell.persist(ns, chain(), timeout_ms=0) == PersistResult(4, 6)
    assert fake.sent(Verb.PERSIST) == 1
    assert shell.persist(ns, chain(), timeout_ms=20.0) == PersistResult(4, 6)
    assert fake.sent(Verb.PERSIST) in range(4, 12)
    fake.stop()
    assert shell.persist(ns, chain()) == PersistResult(0, 0)


def test_the_daemon_without_a_slower_tier_has_all_ready_and_nothing_durable(
    make_shell: MakeShell, live: LiveDaemon
) -> None:
    shell = make_shell(live, strict=True, verify="load", checksum_stores=True)
    ns, target = shell.open_namespace(SPEC), paged(seed=None)
    shell.store(ns, chain(), table(paged()))
    assert shell.fetch(ns, chain(), table(target)).blocks == BLOCKS
    with shell.acquire(ns, chain()) as lease:
        assert lease.ready() == wait(shell, lease) == BLOCKS
    assert shell.persist(ns, chain()) == PersistResult(0, 0)


# --- errors: a miss for engines, typed for tools ---------------------------------------------------------------


def test_an_error_of_the_daemon_is_a_miss_with_its_name(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(paged()))
    for verb in (Verb.LOOKUP, Verb.ACQUIRE, Verb.RESERVE, Verb.TOUCH):
        fake.fail[verb] = Busy("too much at once")
    fake.fail[Verb.PIN] = QuotaExceeded("enough")
    assert shell.lookup(ns, chain()).blocks == 0
    assert shell.fetch(ns, chain(), table(paged(seed=None))) == FetchResult(0, 0, "busy")
    assert not shell.acquire(ns, chain())
    result = shell.store(ns, chain(), table(paged()))
    assert (result.rejected, result.reason) == (BLOCKS, "busy")
    assert (shell.touch(ns, chain()), shell.pin(ns, chain())) == (0, 0)
    assert shell.stats().errors["quota_exceeded"] == 1
    assert (shell.stats().breaker, shell.stats().attachments) == ("closed", 1)


def test_strict_raises_what_the_daemon_answered(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake, strict=True)
    ns = shell.open_namespace(SPEC)
    for verb in (Verb.LOOKUP, Verb.ACQUIRE, Verb.RESERVE):
        fake.fail[verb] = Busy("too much at once")
    for call in (
        lambda: shell.lookup(ns, chain()),
        lambda: shell.fetch(ns, chain(), table(paged(seed=None))),
        lambda: shell.store(ns, chain(), table(paged())),
        lambda: shell.acquire(ns, chain()),
        lambda: shell.reserve(ns, chain()),
    ):
        with pytest.raises(Busy, match="too much"):
            call()


def everything_misses(shell: Any, ns: Any) -> None:
    """Every operation answers nothing, and raises nothing."""
    hashes = chain()
    assert shell.lookup(ns, hashes).blocks == 0
    assert shell.fetch(ns, hashes, table(paged(seed=None))).blocks == 0
    result = shell.store(ns, hashes, table(paged()))
    assert result.outcomes == (BlockOutcome.UNAVAILABLE,) * BLOCKS
    assert result.committed == 0
    with shell.acquire(ns, hashes) as lease:
        assert (len(lease), lease.views(), lease.lease_id) == (0, [], 0)
    with shell.reserve(ns, hashes) as reservation:
        assert reservation.outcomes == (BlockOutcome.UNAVAILABLE,) * BLOCKS
        assert commit(shell, reservation) == 0
    assert shell.prefetch(ns, hashes).resident == 0
    assert shell.persist(ns, hashes) == PersistResult(0, 0)
    assert (shell.pin(ns, hashes), shell.unpin(ns, hashes)) == (0, 0)
    assert (shell.touch(ns, hashes), shell.done(ns, hashes), shell.expect(ns, hashes, 1.0)) == (0, 0, 0)
    assert shell.stopped(ns, hashes, StopReason.STOP) == 0
    assert shell.evict(ns, hashes).removed == 0
    assert shell.clear().removed == 0
    assert not shell.ping()
    assert shell.status() == {}


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_daemon_every_call_is_a_miss(make_shell: MakeShell, fake: FakeDaemon) -> None:
    fake.stop()
    shell = make_shell(fake, clock=Clock())
    everything_misses(shell, shell.open_namespace(SPEC))
    stats = shell.stats()
    assert (stats.breaker, stats.attachments, stats.attached) == ("open", 0, False)
    assert stats.unavailable == stats.calls
    assert shell.fetch(shell.open_namespace(SPEC), chain(), table(paged(seed=None))).reason == "peer_lost"


def test_without_a_daemon_strict_says_so(make_shell: MakeShell, fake: FakeDaemon) -> None:
    fake.stop()
    shell = make_shell(fake, strict=True)
    with pytest.raises(PeerLost, match="no daemon"):
        shell.ping()
    with pytest.raises(PeerLost, match="no daemon"):
        shell.open_namespace(SPEC)


def test_a_daemon_that_comes_later_is_found(make_shell: MakeShell, fake: FakeDaemon) -> None:
    fake.stop()
    clock = Clock()
    shell = make_shell(fake, clock=clock, budget_ms=900.0)
    ns = shell.open_namespace(SPEC)
    assert not shell.ping()
    fake.start()
    assert not shell.ping()
    clock.now += 0.11
    assert shell.ping()
    assert shell.store(ns, chain(), table(paged())).committed == BLOCKS
    assert shell.stats().breaker == "closed"


def test_a_hung_daemon_costs_one_time_out(make_shell: MakeShell, fake: FakeDaemon) -> None:
    clock = Clock()
    shell = make_shell(fake, clock=clock, timeout_ms=300.0, budget_ms=300.0)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(paged()))
    fake.run(lambda: setattr(fake, "hanging", True))
    assert shell.fetch(ns, chain(), table(paged(seed=None))) == FetchResult(0, 0, "timeout")
    assert shell.stats().breaker == "open"
    everything_misses(shell, ns)
    clock.now += 0.11
    assert not shell.ping()
    assert shell.stats().errors["timeout"] == 2
    fake.run(lambda: setattr(fake, "hanging", False))
    clock.now += 0.21
    assert shell.lookup(ns, chain()).blocks == BLOCKS
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_a_hung_daemon_times_out_typed_when_strict(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake, strict=True, timeout_ms=300.0)
    shell.ping()
    fake.run(lambda: setattr(fake, "hanging", True))
    with pytest.raises(Timeout):
        shell.ping()


# --- a daemon that comes back -------------------------------------------------------------------------------


def test_a_restart_between_calls_is_not_even_noticed(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell, target = make_shell(fake, strict=True), paged(seed=None)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(paged()))
    fake.restart()
    if shell.kind == "async":
        shell.wait(until_noticed(shell.client))
    assert shell.lookup(ns, chain()).blocks == 0
    assert shell.store(ns, chain(), table(paged())).committed == BLOCKS
    assert shell.fetch(ns, chain(), table(target)).blocks == BLOCKS
    assert np.array_equal(target, paged())
    assert shell.stats().attachments == 2


async def until_noticed(client: Any) -> None:
    """Let the loop turn until it has seen the session's end."""
    import asyncio

    async with asyncio.timeout(5):
        while client._link.fault is None:
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)


def test_a_restart_during_a_fetch_makes_it_a_miss(make_shell: MakeShell, fake: FakeDaemon) -> None:
    """The generations of a dead daemon do not move on: nobody can vouch for what was copied."""
    copier = TamperingCopier()
    shell = make_shell(fake, copier=copier)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(paged()))

    def restart() -> None:
        copier.meanwhile = lambda: None
        fake.restart()

    copier.meanwhile = restart
    assert shell.fetch(ns, chain(), table(paged(seed=None))) == FetchResult(0, 0, "peer_lost")
    assert shell.lookup(ns, chain()).blocks == 0
    assert shell.store(ns, chain(), table(paged())).committed == BLOCKS


def test_a_restart_during_a_store_publishes_nothing(make_shell: MakeShell, fake: FakeDaemon) -> None:
    copier = TamperingCopier()
    shell = make_shell(fake, copier=copier)
    ns = shell.open_namespace(SPEC)
    copier.meanwhile = fake.restart
    result = shell.store(ns, chain(), table(paged()))
    copier.meanwhile = lambda: None
    assert result.outcomes == (BlockOutcome.FAILED,) * BLOCKS
    assert result.reason in ("peer_lost", "unknown_session")
    assert shell.store(ns, chain(), table(paged())).committed == BLOCKS


def test_another_boot_id_ends_the_session(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    fake.run(lambda: setattr(fake, "_boot_id", b"another boot id!"))
    assert shell.fetch(ns, chain(), table(paged(seed=None))) == FetchResult(0, 0, "unknown_session")
    assert shell.store(ns, chain(), table(paged())).committed == BLOCKS
    assert shell.stats().attachments == 2


def test_a_forgotten_namespace_is_opened_again(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    fake.run(fake._namespaces.clear)
    assert shell.lookup(ns, chain()).blocks == 0
    assert shell.store(ns, chain(), table(paged())).committed == BLOCKS


def test_leases_of_a_dead_daemon_release_without_a_word(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    shell.store(ns, chain(), table(paged()))
    lease = shell.acquire(ns, chain())
    reservation = shell.reserve(ns, chain(2, seed=50))
    fake.restart()
    lease.release()
    assert commit(shell, reservation) == 0
    assert bytes(lease.views()[0]) == paged()[:, 0].tobytes()
    assert shell.open_namespace(SPEC) == ns


def test_an_open_reservation_keeps_its_session(make_shell: MakeShell, fake: FakeDaemon) -> None:
    """Closing it would let the daemon hand out slots that the caller is still writing."""
    shell = make_shell(fake, clock=Clock(), timeout_ms=300.0)
    ns = shell.open_namespace(SPEC)
    reservation = shell.reserve(ns, chain(2))
    fake.run(lambda: setattr(fake, "hanging", True))
    assert not shell.ping()
    fake.run(lambda: setattr(fake, "hanging", False))
    assert fake.held() == (0, 1)
    reservation.abort()
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_after_close_calls_are_misses(make_shell: MakeShell, fake: FakeDaemon) -> None:
    shell = make_shell(fake)
    ns = shell.open_namespace(SPEC)
    shell.client.close() if shell.kind == "sync" else shell.wait(shell.client.close())
    everything_misses(shell, ns)
