"""The worker's half with a stand-in for the client: what is told of loads, what becomes of stores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from forebay.client import Client
from forebay.client.copier import NumpyCopier
from forebay.client.device_copier import DeviceCopier
from forebay.client.hints import Hints
from forebay.client.results import BlockOutcome, FetchResult, RemovalResult
from forebay.client.segments import SegmentTable
from forebay.client.vllm_ledger import Notice
from forebay.client.vllm_work import Ending, Load, Part, StepWork, Store
from forebay.client.vllm_worker import STORE_PART_BLOCKS, VllmWorker, wait_for
from forebay.kvstore.errors import Timeout
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import StopReason
from forebay.transports.messages import EvictScope
from support.device_arrays import CudaTensor, LateDevices
from support.fake_daemon import FakeDaemon
from support.live import eventually

BLOCK_BYTES = 64
BLOCKS = 400


class FakeReservation:
    def __init__(self, client: FakeClient, hashes: Sequence[bytes], *, orphans: bool) -> None:
        self.client, self.hashes = client, hashes
        self.codes = bytes(BlockOutcome.ORPHAN if orphans else client.outcome(name) for name in hashes)
        self.granted = [name for name, code in zip(hashes, self.codes) if code == BlockOutcome.STORED]
        self.slots = [np.zeros(BLOCK_BYTES, np.uint8) for _ in self.granted]

    def __enter__(self) -> FakeReservation:
        return self

    def __exit__(self, *details: object) -> None:
        return None

    def abort(self) -> None:
        return None

    def gather(self, table: SegmentTable, ids: Sequence[int], *, stream: int | None) -> Sequence[int]:
        assert stream is None, "the worker has waited for the device itself"
        self.client.on_gather()
        for block, slot in zip(ids, self.slots, strict=True):
            slot[:] = table.owners[0][block]  # type: ignore[index]
        return self.client.failing

    def commit(self, failed: Sequence[int] = ()) -> int:
        written = [i for i in range(len(self.granted)) if i not in failed]
        for i in written:
            self.client.blocks[self.granted[i]] = self.slots[i]
        return len(written)


class FakeClient:
    def __init__(self) -> None:
        self.blocks: dict[bytes, NDArray[np.uint8]] = {}
        self.parents: list[bytes] = []
        self.priorities: list[int] = []
        self.absent: set[bytes] = set()
        self.missing = "miss"
        self.refused: set[bytes] = set()
        self.corrupt: set[bytes] = set()
        self.evicted: list[Sequence[bytes]] = []
        self.on_gather: Callable[[], None] = lambda: None
        self.broken = False
        self.failing: Sequence[int] = ()
        self.hinted: list[tuple[Any, int, int]] = []

    def done(self, ns: Any, hashes: Sequence[bytes], keep: int = 0) -> int:
        """Notes the namespace, how many of the blocks are there, and what is kept."""
        if self.broken:
            raise RuntimeError("a bug in a client")
        self.hinted.append((ns.group, sum(name in self.blocks for name in hashes), keep))
        return len(hashes)

    def stopped(self, ns: Any, hashes: Sequence[bytes], reason: StopReason) -> int:
        return len(hashes)

    def expect(self, ns: Any, hashes: Sequence[bytes], within_s: float) -> int:
        return len(hashes)

    def outcome(self, name: bytes) -> BlockOutcome:
        if name in self.refused:
            return BlockOutcome.FULL
        return BlockOutcome.PRESENT if name in self.blocks else BlockOutcome.STORED

    def fetch(
        self, ns: Any, hashes: Sequence[bytes], table: Any, block_ids: Sequence[int], *, stream: int | None
    ) -> FetchResult:
        assert stream is None
        if self.broken:
            raise RuntimeError("a bug in a client")
        for count, (name, block) in enumerate(zip(hashes, block_ids)):
            if name in self.corrupt:
                return FetchResult(count, count * BLOCK_BYTES, "corrupt")
            if name not in self.blocks:
                return FetchResult(count, count * BLOCK_BYTES, self.missing)
            table.owners[0][block] = self.blocks[name]
        return FetchResult(len(hashes), len(hashes) * BLOCK_BYTES)

    def reserve(self, ns: Any, hashes: Sequence[bytes], parent: bytes = b"", *, priority: int = 0) -> FakeReservation:
        self.parents.append(parent)
        self.priorities.append(priority)
        return FakeReservation(self, hashes, orphans=parent in self.absent)

    def evict(self, ns: Any, hashes: Sequence[bytes], scope: EvictScope) -> RemovalResult:
        self.evicted.append(hashes)
        for name in hashes:
            self.corrupt.discard(name)
            self.blocks.pop(name, None)
        return RemovalResult(len(hashes))


def names(first: int, last: int) -> tuple[bytes, ...]:
    return tuple(i.to_bytes(32, "little") for i in range(first, last))


class Rig:
    def __init__(self, groups: int = 1, *, tells: bool = True) -> None:
        self.client, self.groups = FakeClient(), groups
        self.opened: list[str] = []
        self.kv = np.random.default_rng(0).integers(0, 256, (BLOCKS, BLOCK_BYTES)).astype(np.uint8)
        self.worker = VllmWorker(self.client, self.namespaces, [BLOCK_BYTES] * groups, tells=tells)
        self.worker.register([SegmentTable.of(self.kv)] * groups)

    def namespaces(self, reset: str) -> list[Any]:
        self.opened.append(reset)
        return [SimpleNamespace(reset=reset, group=group) for group in range(self.groups)]

    def step(self, ready: Callable[[], object] = lambda: None, **work: Any) -> None:
        self.worker.begin(StepWork(**work))
        self.worker.start_loads(ready)
        self.worker.start_stores(ready)

    def settle(self) -> None:
        eventually(lambda: self.worker.open_stores == 0, "stores have ended")

    def loaded(self) -> set[str]:
        found: set[str] = set()
        eventually(lambda: bool(found.update(self.worker.take_loaded()) or found), "a load has ended")
        return found


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.worker.close()
    assert made.worker.open_stores == 0


def test_stored_bytes_come_back_into_other_blocks(rig: Rig) -> None:
    rig.step(stores=(Store("r", 0, b"", names(0, 3), (5, 2, 9)),))
    rig.settle()
    rig.step(loads=(Load("q", (Part(0, names(0, 3), (30, 31, 32)),)),))
    assert rig.loaded() == {"q"}
    assert rig.worker.take_failed_blocks() == set()
    assert (rig.kv[30:33] == rig.kv[[5, 2, 9]]).all()
    counts = rig.worker.take_counts()
    assert (counts["stored_blocks"], counts["loaded_blocks"]) == (3, 3)
    assert rig.worker.take_counts() == {}


def test_blocks_that_were_not_loaded_are_told_and_the_request_all_the_same(rig: Rig) -> None:
    rig.step(stores=(Store("r", 0, b"", names(0, 2), (0, 1)),))
    rig.settle()
    rig.step(loads=(Load("q", (Part(0, names(0, 4), (30, 31, 32, 33)),)),))
    assert rig.loaded() == {"q"}
    assert rig.worker.take_failed_blocks() == {32, 33}
    assert rig.worker.take_failed_blocks() == set()


def test_load_waits_for_the_device(rig: Rig) -> None:
    """What runs on the device may still read the blocks that the load will overwrite."""
    rig.step(stores=(Store("r", 0, b"", names(0, 1), (0,)),))
    rig.settle()
    gate, before = threading.Event(), rig.kv[30].copy()
    rig.step(lambda: gate.wait(10), loads=(Load("q", (Part(0, names(0, 1), (30,)),)),))
    assert rig.worker.take_loaded() == set()
    assert (rig.kv[30] == before).all()
    gate.set()
    assert rig.loaded() == {"q"}
    assert (rig.kv[30] == rig.kv[0]).all()


def test_error_in_a_load_fails_all_its_blocks(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.client.broken = True
    rig.step(loads=(Load("q", (Part(0, names(0, 2), (30, 31)),)),))
    assert rig.loaded() == {"q"}
    assert rig.worker.take_failed_blocks() == {30, 31}
    assert "nothing was loaded for a request" in caplog.text


def test_load_whose_bytes_may_still_come_is_told_before_its_blocks_are(rig: Rig) -> None:
    rig.step(loads=(Load("p", (Part(0, names(0, 1), (29,)),)),))
    assert rig.loaded() == {"p"}
    assert not rig.worker.take_late(), "a miss moves nothing"
    rig.client.missing = "copy_timeout"
    rig.step(loads=(Load("q", (Part(0, names(0, 2), (30, 31)),)),))
    assert rig.loaded() == {"q"}
    assert rig.worker.take_late()
    assert not rig.worker.take_late()
    assert rig.worker.take_failed_blocks() == {29, 30, 31}


def test_load_that_is_given_up_leaves_its_blocks_to_the_engine_and_is_counted(rig: Rig) -> None:
    """Nothing was found missing, so nobody is told that; and no bytes come late."""
    rig.step(stores=(Store("r", 0, b"", names(0, 1), (0,)),))
    rig.settle()
    rig.worker.take_notices()
    rig.client.missing = "late"
    rig.step(loads=(Load("q", (Part(0, names(0, 3), (30, 31, 32)),)),))
    assert rig.loaded() == {"q"}
    assert rig.worker.take_failed_blocks() == {31, 32}
    assert not rig.worker.take_late()
    assert rig.worker.take_notices() == []
    assert rig.worker.take_counts()["late_loads"] == 1


def test_load_of_several_groups_counts_only_as_a_whole() -> None:
    """vLLM cannot tell a block's group from its number, so it computes the request anew."""
    rig = Rig(groups=2)
    rig.step(stores=(Store("r", 0, b"", names(0, 2), (0, 1)), Store("r", 1, b"", names(9, 10), (2,))))
    rig.settle()
    rig.step(loads=(Load("q", (Part(0, names(0, 2), (30, 31)), Part(1, names(9, 10), (32,)))),))
    assert rig.loaded() == {"q"}
    assert (rig.worker.take_failed_requests(), rig.worker.take_failed_blocks()) == (set(), set())
    assert (rig.kv[30:33] == rig.kv[:3]).all()
    rig.step(loads=(Load("q", (Part(0, names(0, 2), (30, 31)), Part(1, names(8, 10), (32, 33)))),))
    assert rig.loaded() == {"q"}
    assert (rig.worker.take_failed_requests(), rig.worker.take_failed_blocks()) == ({"q"}, set())
    assert rig.worker.take_failed_requests() == set()
    assert rig.worker.take_counts()["failed_blocks"] == 4
    rig.worker.close()


@pytest.mark.parametrize(("orphans", "parents"), [(True, [b"p" * 32, b""]), (False, [b"p" * 32])])
def test_windows_blocks_are_stored_without_the_one_before(rig: Rig, orphans: bool, parents: list[bytes]) -> None:
    rig.client.absent = {b"p" * 32}
    rig.step(stores=(Store("r", 0, b"p" * 32, names(0, 2), (0, 1), orphans),))
    rig.settle()
    assert rig.client.parents == parents
    assert set(rig.client.blocks) == (set(names(0, 2)) if orphans else set())


def test_block_taken_back_before_its_copy_is_not_published(rig: Rig) -> None:
    gate = threading.Event()
    rig.step(lambda: gate.wait(10), stores=(Store("r", 0, b"", names(0, 2), (5, 6)),))
    rig.step(fresh=frozenset({6}))
    rig.kv[6] = 0
    gate.set()
    rig.settle()
    assert rig.client.blocks == {}
    assert rig.worker.take_counts()["revoked_blocks"] == 2


def test_block_taken_back_during_its_copy_is_not_published(rig: Rig) -> None:
    rig.client.on_gather = lambda: rig.worker.begin(StepWork(fresh=frozenset({6})))
    rig.step(stores=(Store("r", 0, b"", names(0, 2), (5, 6)),))
    rig.settle()
    assert rig.client.blocks == {}


def test_other_blocks_taken_back_do_no_harm(rig: Rig) -> None:
    gate = threading.Event()
    rig.step(lambda: gate.wait(10), stores=(Store("r", 0, b"", names(0, 2), (5, 6)),))
    rig.step(fresh=frozenset({7}))
    gate.set()
    rig.settle()
    assert set(rig.client.blocks) == set(names(0, 2))


def test_long_stores_go_in_parts_each_after_its_parent(rig: Rig) -> None:
    count = 2 * STORE_PART_BLOCKS + 3
    rig.step(stores=(Store("r", 0, b"p" * 32, names(0, count), tuple(range(count))),))
    rig.settle()
    part = STORE_PART_BLOCKS
    assert rig.client.parents == [b"p" * 32, names(part - 1, part)[0], names(2 * part - 1, 2 * part)[0]]
    assert all((rig.client.blocks[name] == rig.kv[i]).all() for i, name in enumerate(names(0, count)))


def test_refused_block_ends_its_chain(rig: Rig) -> None:
    rig.client.refused = set(names(3, 4))
    count = STORE_PART_BLOCKS + 3
    rig.step(stores=(Store("r", 0, b"", names(0, count), tuple(range(count))),))
    rig.settle()
    assert len(rig.client.parents) == 1


def test_error_in_a_store_does_not_end_the_stores_to_come(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """As the device's own, which have no common type."""

    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    rig.step(broken, stores=(Store("r", 0, b"", names(0, 1), (0,)),))
    rig.settle()
    rig.step(stores=(Store("q", 0, b"", names(1, 2), (1,)),))
    rig.settle()
    assert set(rig.client.blocks) == set(names(1, 2))
    assert rig.worker.take_counts()["store_errors"] == 1
    assert "1 blocks were not stored: RuntimeError: an illegal memory access" in caplog.text


def test_what_follows_a_block_whose_copy_failed_is_not_stored(rig: Rig) -> None:
    rig.client.failing = (2,)
    count = STORE_PART_BLOCKS + 3
    rig.step(stores=(Store("r", 0, b"", names(0, count), tuple(range(count))),))
    rig.settle()
    assert set(rig.client.blocks) == set(names(0, 2))
    assert len(rig.client.parents) == 1
    assert rig.worker.take_counts()["rejected_blocks"] == STORE_PART_BLOCKS - 2


def test_events_are_asked_until_they_have_passed_or_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter((False, False, True))
    wait_for(lambda: next(answers))
    assert next(answers, None) is None
    monkeypatch.setattr("forebay.client.vllm_worker.DEVICE_S", 0.01)
    with pytest.raises(Timeout, match="device"):
        wait_for(lambda: False)


def test_present_blocks_cost_no_copy(rig: Rig) -> None:
    for _ in range(2):
        rig.step(stores=(Store("r", 0, b"", names(0, 4), (0, 1, 2, 3)),))
        rig.settle()
    counts = rig.worker.take_counts()
    assert (counts["stored_blocks"], counts["present_blocks"]) == (4, 4)


def test_corrupt_block_is_removed_before_its_right_bytes_are_offered(rig: Rig) -> None:
    rig.step(stores=(Store("r", 0, b"", names(0, 3), (0, 1, 2)),))
    rig.settle()
    rig.client.corrupt = set(names(1, 2))
    rig.step(loads=(Load("q", (Part(0, names(0, 3), (30, 31, 32)),)),))
    assert rig.loaded() == {"q"}
    assert rig.worker.take_failed_blocks() == {31, 32}
    rig.step(stores=(Store("q", 0, b"", names(0, 3), (0, 1, 2)),))
    rig.settle()
    assert rig.client.evicted == [[names(1, 2)[0]]]
    assert (rig.client.blocks[names(1, 2)[0]] == rig.kv[1]).all()


def test_reset_opens_the_namespace_of_that_name_once(rig: Rig) -> None:
    rig.step(reset="x")
    rig.step(reset="x")
    assert rig.opened == ["", "x"]


def test_same_work_told_twice_is_begun_once(rig: Rig) -> None:
    work = StepWork(reset="x")
    rig.worker.begin(work)
    rig.worker.begin(work)
    assert rig.opened == ["", "x"]


def test_nothing_touches_memory_that_the_engine_gives_away(rig: Rig) -> None:
    """Copies under way end first, and what waits its turn is not begun."""
    gate, copying = threading.Event(), threading.Event()

    def gathering() -> None:
        copying.set()
        assert gate.wait(10)

    rig.client.on_gather = gathering
    rig.step(stores=(Store("r", 0, b"", names(0, 1), (0,)), Store("r", 0, b"", names(1, 2), (1,))))
    assert copying.wait(10)
    sleeping = threading.Thread(target=rig.worker.unregister)
    sleeping.start()
    sleeping.join(0.05)
    assert sleeping.is_alive()
    gate.set()
    sleeping.join(10)
    assert not sleeping.is_alive()
    rig.kv[:] = 0
    rig.settle()
    assert rig.client.blocks == {}
    assert rig.worker.take_counts()["revoked_blocks"] == 2
    rig.worker.unregister()


def test_copy_that_does_not_end_keeps_the_engine_awake(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.client.vllm_worker.SLEEP_S", 0.01)
    gate = threading.Event()
    rig.step(lambda: gate.wait(10), loads=(Load("q", (Part(0, names(0, 1), (30,)),)),))
    with pytest.raises(Timeout):
        rig.worker.unregister()
    gate.set()
    assert rig.loaded() == {"q"}
    rig.worker.unregister()


def test_what_is_stored_and_what_is_missing_is_told(rig: Rig) -> None:
    """A refused block ends the chain; what others had stored is there too; a daemon's silence says nothing."""
    rig.client.refused = set(names(2, 3))
    for _ in range(2):
        rig.step(stores=(Store("r", 0, b"p" * 32, names(0, 4), (0, 1, 2, 3)),))
        rig.settle()
        assert rig.worker.take_notices() == [Notice(0, 0, True, b"p" * 32, names(0, 2))]
    rig.step(loads=(Load("q", (Part(0, names(0, 4), (30, 31, 32, 33)),)),))
    rig.loaded()
    assert rig.worker.take_notices() == [Notice(0, 0, False, b"", names(2, 4))]
    rig.client.missing = "timeout"
    rig.step(loads=(Load("q", (Part(0, names(7, 9), (30, 31)),)),))
    rig.loaded()
    assert rig.worker.take_notices() == []


def ending(group: int = 0) -> Ending:
    return Ending(group, names(0, 3), Hints(done=True), 1)


def test_hints_are_told_when_what_came_before_is_stored() -> None:
    rig = Rig(groups=2)
    release = threading.Event()
    rig.step(lambda: release.wait(5.0), stores=(Store("r", 1, b"", names(0, 3), (0, 1, 2)),))
    rig.step(endings=(ending(1),))
    assert rig.client.hinted == []
    release.set()
    eventually(lambda: bool(rig.client.hinted), "the hint is told")
    assert rig.client.hinted == [(1, 3, 1)]
    rig.worker.close()
    assert rig.worker.take_counts()["told_hints"] == 1


def test_blocks_are_reserved_with_the_priority_of_their_store(rig: Rig) -> None:
    rig.client.absent = {b"parent"}
    rig.step(stores=(Store("r", 0, b"parent", names(0, 2), (0, 1), orphans=True, priority=2),))
    rig.settle()
    assert rig.client.priorities == [2, 2]


def test_stage_without_layers_of_a_group_tells_nothing_of_it() -> None:
    rig = Rig()
    rig.worker._namespaces = [None]
    rig.step(endings=(ending(),))
    rig.worker.close()
    assert rig.client.hinted == []


def test_one_rank_tells_hints_for_all() -> None:
    rig = Rig(tells=False)
    rig.step(endings=(ending(),))
    rig.worker.close()
    assert rig.client.hinted == []


def test_a_bug_in_telling_does_not_end_the_stores_to_come(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.client.broken = True
    rig.step(endings=(ending(),))
    rig.step(stores=(Store("r", 0, b"", names(0, 1), (0,)),))
    rig.settle()
    assert "a hint was not told: RuntimeError" in caplog.text
    assert names(0, 1)[0] in rig.client.blocks


def test_close_stores_what_was_given(rig: Rig) -> None:
    rig.step(stores=(Store("r", 0, b"", names(0, 3), (0, 1, 2)),))
    rig.worker.close()
    assert set(rig.client.blocks) == set(names(0, 3))
    rig.step(stores=(Store("r", 0, b"", names(3, 4), (3,)),))
    assert rig.worker.open_stores == 0


def test_blocks_of_a_gpu_go_through_a_daemon_and_come_back_into_other_blocks() -> None:
    """With a real client, over a device whose streams run late; the worker itself never touches the memory."""
    spec = NamespaceSpec("m", "1", "uint8", 4, (BLOCK_BYTES,))
    kv = np.random.default_rng(0).integers(0, 256, (BLOCKS, BLOCK_BYTES)).astype(np.uint8)
    with FakeDaemon() as daemon:
        copier = DeviceCopier(NumpyCopier(), LateDevices())
        client = Client(daemon.runtime_dir, timeout_ms=10_000.0, copier=copier)
        worker = VllmWorker(client, lambda reset: [client.open_namespace(spec)], [BLOCK_BYTES])
        worker.register([SegmentTable.of(CudaTensor(kv))])
        worker.begin(StepWork(stores=(Store("r", 0, b"", names(0, 3), (5, 2, 9)),)))
        worker.start_stores(lambda: None)
        eventually(lambda: worker.open_stores == 0, "stores have ended")
        worker.begin(StepWork(loads=(Load("q", (Part(0, names(0, 4), (30, 31, 32, 33)),)),)))
        worker.start_loads(lambda: None)
        eventually(lambda: worker.take_loaded() == {"q"}, "a load has ended")
        assert worker.take_failed_blocks() == {33}
        assert (kv[30:33] == kv[[5, 2, 9]]).all()
        worker.close()
        client.close()
