"""Several threads copy what one would have: the same bytes, the same failures, and nobody waits for a late helper."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.client import copy_threads
from forebay.client.copier import CopyPlan
from forebay.client.copy_threads import PLAN_BYTES_MIN, ParallelCopier, auto_threads
from forebay.client.segments import SegmentTable

MIB = 1 << 20
TIMEOUT_S = 20


def plan_of(blocks: int, block_bytes: int, segments: int = 1, seed: int = 1) -> CopyPlan:
    """Blocks in no order on the engine's side, slots one after the other."""
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(0, 255, (blocks, block_bytes // segments), np.uint8) for _ in range(segments)]
    slots = np.zeros((blocks, block_bytes), np.uint8)
    addresses = int(slots.__array_interface__["data"][0]) + np.arange(blocks, dtype=np.int64) * block_bytes
    ids = rng.permutation(blocks).astype(np.int64)
    return CopyPlan(SegmentTable.of(arrays), ids, addresses, block_bytes, (slots, arrays))


class Recorder:
    """An inner copier that moves nothing and tells who was asked for which blocks."""

    def __init__(self, act: Callable[[CopyPlan], Sequence[int]] = lambda plan: ()) -> None:
        self.by_thread: dict[str, list[int]] = {}
        self._act = act

    def gather(self, plan: CopyPlan) -> Sequence[int]:
        self.by_thread.setdefault(threading.current_thread().name, []).extend(plan.block_ids.tolist())
        return self._act(plan)

    scatter = gather


def ids_of(recorder: Recorder) -> list[int]:
    return sorted(block for blocks in recorder.by_thread.values() for block in blocks)


@pytest.mark.parametrize(
    ("blocks", "block_bytes", "segments"), [(13, 2 * MIB, 1), (13, 2 * MIB, 4), (400, MIB // 16, 1)]
)
def test_bytes_are_those_of_plain_indexing(blocks: int, block_bytes: int, segments: int) -> None:
    plan = plan_of(blocks, block_bytes, segments)
    slots, arrays = plan.owners
    expected = np.concatenate([array[plan.block_ids] for array in arrays], axis=1)  # type: ignore[attr-defined]
    copier = ParallelCopier(3)
    assert list(copier.gather(plan)) == []
    assert np.array_equal(slots, expected)
    targets = [np.zeros_like(array) for array in arrays]  # type: ignore[attr-defined]
    back = CopyPlan(SegmentTable.of(targets), plan.block_ids, plan.addresses, plan.slot_bytes, (slots,))
    assert list(copier.scatter(back)) == []
    assert all(np.array_equal(target, array) for target, array in zip(targets, arrays, strict=True))  # type: ignore[call-overload]


def test_late_helper_costs_nothing() -> None:
    """The caller copies every part but the one that a helper is slow with."""
    caller = threading.current_thread().name
    helper_began, others_done = threading.Event(), threading.Event()

    def act(part: CopyPlan) -> Sequence[int]:
        if threading.current_thread().name != caller:
            helper_began.set()
            assert others_done.wait(TIMEOUT_S)
        else:
            assert helper_began.wait(TIMEOUT_S)
            if len(ids_of(recorder)) == 16:
                others_done.set()
        return ()

    recorder = Recorder(act)
    assert list(ParallelCopier(2, inner=recorder).gather(plan_of(16, MIB))) == []
    assert ids_of(recorder) == list(range(16))
    assert len(recorder.by_thread[caller]) > len(recorder.by_thread["forebay-copy-0"])


def test_short_and_choppy_plans_stay_on_the_calling_thread() -> None:
    small = plan_of(7, MIB)
    assert 7 * MIB < PLAN_BYTES_MIN
    choppy = plan_of(300, MIB // 16, 64)  # pieces of 1 KiB are moved with the GIL held
    for plan in (small, choppy):
        recorder = Recorder()
        ParallelCopier(4, inner=recorder).scatter(plan)
        assert list(recorder.by_thread) == [threading.current_thread().name]


def test_one_thread_means_the_calling_one() -> None:
    recorder = Recorder()
    ParallelCopier(1, inner=recorder).gather(plan_of(16, MIB))
    assert list(recorder.by_thread) == [threading.current_thread().name]


def test_failed_positions_are_those_of_the_whole_plan() -> None:
    plan = plan_of(24, MIB)
    wanted = sorted(int(np.flatnonzero(plan.block_ids == block)[0]) for block in (3, 11, 23))
    recorder = Recorder(lambda part: np.flatnonzero(np.isin(part.block_ids, (3, 11, 23))).tolist())
    assert list(ParallelCopier(3, inner=recorder).gather(plan)) == wanted


def test_error_of_any_part_is_the_callers() -> None:
    def act(part: CopyPlan) -> Sequence[int]:
        if 5 in part.block_ids:
            raise MemoryError("no more")
        return ()

    with pytest.raises(MemoryError, match="no more"):
        ParallelCopier(3, inner=Recorder(act)).gather(plan_of(24, MIB))


class Stop(Exception):
    """What a signal handler raises."""


def test_interrupted_caller_waits_for_its_helpers() -> None:
    """What it does next is to give the slots back, and a helper may still be writing to them."""
    helper_began, helper_ended = threading.Event(), threading.Event()

    def act(part: CopyPlan) -> Sequence[int]:
        if threading.current_thread() is threading.main_thread():
            assert helper_began.wait(TIMEOUT_S)
        else:
            helper_began.set()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            helper_ended.wait(0.3)
            helper_ended.set()
        return ()

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(Stop):
            ParallelCopier(2, inner=Recorder(act)).gather(plan_of(16, MIB))
        assert helper_ended.is_set()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_where_no_thread_can_be_had_the_caller_copies_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    copier = ParallelCopier(3, inner=(recorder := Recorder()))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        copier.gather(plan_of(16, MIB))
    copier.gather(plan_of(16, MIB))
    assert list(recorder.by_thread) == [threading.current_thread().name]
    assert ids_of(recorder) == sorted([*range(16)] * 2)
    assert copier._jobs.empty()


def test_job_that_is_over_keeps_no_memory() -> None:
    """A helper that never wakes leaves its word of the job in the queue."""
    copier = ParallelCopier(2, inner=Recorder())
    copier._helpers = 1
    copier.gather(plan := plan_of(16, MIB))
    assert not copier._jobs.empty()
    kept = weakref.ref(plan.table.owners[0])
    del plan
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("cpu", [-1, 1 << 20, 1 << 70])
def test_core_that_cannot_be_had_is_no_harm(cpu: int) -> None:
    copier = ParallelCopier(2, [cpu], inner=(recorder := Recorder()))
    copier.gather(plan_of(16, MIB))
    assert ids_of(recorder) == [*range(16)]


def test_several_callers_share_the_helpers() -> None:
    copier = ParallelCopier(2)
    plans = [plan_of(12, MIB, seed=seed) for seed in range(3)]
    threads = [threading.Thread(target=copier.gather, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    for plan in plans:
        slots, (array,) = plan.owners  # type: ignore[misc]
        assert np.array_equal(slots, array[plan.block_ids])


def test_helpers_end_with_their_copier() -> None:
    before = set(threading.enumerate())
    copier = ParallelCopier(3, inner=Recorder())
    copier.gather(plan_of(16, MIB))
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 2
    del copier
    gc.collect()
    for helper in helpers:
        helper.join(TIMEOUT_S)
    assert not any(helper.is_alive() for helper in helpers)


def test_copier_without_its_helpers_begins_new_ones() -> None:
    """What a forked child has: the state of the parent's copier, and none of its threads."""
    copier = ParallelCopier(2, inner=(recorder := Recorder()))
    copier.gather(plan_of(16, MIB))
    copier._renew()
    copier.gather(plan_of(16, MIB))
    assert ids_of(recorder) == sorted([*range(16)] * 2)


@given(blocks=st.integers(1, 5000), least=st.integers(1, 64), share=st.integers(2, 16))
def test_parts_cover_every_block_once_and_get_no_longer(blocks: int, least: int, share: int) -> None:
    parts = copy_threads._guided(blocks, least, share)
    assert [block for part in parts for block in range(part.start, part.stop)] == list(range(blocks))
    sizes = [part.stop - part.start for part in parts]
    assert sizes == sorted(sizes, reverse=True)


def test_auto_is_bounded_by_the_cores_of_the_process() -> None:
    assert 1 <= auto_threads() <= copy_threads.THREADS_AUTO_MAX
