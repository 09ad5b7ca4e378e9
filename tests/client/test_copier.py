"""Copies arrive byte for byte, in every layout, and let other threads run."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.client import copier as copying
from forebay.client.copier import CopyPlan, NumpyCopier
from forebay.client.segments import SegmentTable


class Slots:
    """A slab stand-in: `count` slots of `slot_bytes`."""

    def __init__(self, count: int, slot_bytes: int, seed: int = 1) -> None:
        self.slot_bytes = slot_bytes
        self.data = np.random.default_rng(seed).integers(0, 255, (count, slot_bytes), dtype=np.uint8)
        self.address = int(self.data.__array_interface__["data"][0])

    def plan(self, table: SegmentTable, block_ids: list[int], slots: list[int]) -> CopyPlan:
        addresses = self.address + np.array(slots, np.int64) * self.slot_bytes
        return CopyPlan(table, np.array(block_ids, np.int64), addresses, self.slot_bytes, (self.data,))


def random_bytes(*shape: int, seed: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def check_both_ways(arrays: list[np.ndarray[Any, Any]], block_ids: list[int], slots: list[int], padding: int) -> None:
    """Gather, then scatter into other memory of the same layout; compare with plain indexing."""
    table = SegmentTable.of(arrays)
    slab = Slots(max(slots) + 1, table.block_bytes + padding)
    before, untouched = slab.data.copy(), sorted(set(range(len(slab.data))) - set(slots))
    expected = np.concatenate([array[block_ids].reshape(len(block_ids), -1) for array in arrays], axis=1)
    assert tuple(NumpyCopier().gather(slab.plan(table, block_ids, slots))) == ()
    assert np.array_equal(slab.data[slots, : table.block_bytes], expected)
    assert np.array_equal(slab.data[slots, table.block_bytes :], before[slots, table.block_bytes :])
    assert np.array_equal(slab.data[untouched], before[untouched])
    targets = [random_bytes(*array.shape, seed=9) for array in arrays]
    others = sorted(set(range(len(arrays[0]))) - set(block_ids))
    kept = [target[others].copy() for target in targets]
    assert tuple(NumpyCopier().scatter(slab.plan(SegmentTable.of(targets), block_ids, slots))) == ()
    for array, target, keep in zip(arrays, targets, kept, strict=True):
        assert np.array_equal(target[block_ids], array[block_ids])
        assert np.array_equal(target[others], keep)


LAYOUTS = {
    "contiguous": [(12, 4096)],
    "k_and_v_apart": [(12, 512)] * 8,
    "unequal": [(12, 512), (12, 64), (12, 513)],
    "tiny": [(12, 3)] * 5,
}
ORDERS = {
    "straight": (list(range(8)), list(range(8))),
    "shuffled_blocks": ([7, 2, 11, 0, 4, 5, 6, 1], list(range(8))),
    "shuffled_slots": (list(range(8)), [3, 4, 5, 9, 0, 1, 7, 8]),
    "both": ([7, 2, 11, 0, 4, 5, 6, 1], [9, 3, 4, 8, 0, 1, 2, 6]),
    "one": ([5], [3]),
}


@pytest.mark.parametrize("choppy_bytes", [0, 1 << 20], ids=["by_run", "by_piece"])
@pytest.mark.parametrize("padding", [0, 100])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_arrive_in_every_layout_and_order(
    layout: str, order: str, padding: int, choppy_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "RUN_BYTES_MIN", choppy_bytes)
    block_ids, slots = ORDERS[order]
    check_both_ways(
        [random_bytes(*shape, seed=n) for n, shape in enumerate(LAYOUTS[layout])], block_ids, slots, padding
    )


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_plan_equals_plain_indexing(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 12))
    sizes = data.draw(st.one_of(st.just([64]), st.just([32] * 4), st.lists(st.integers(1, 80), min_size=1, max_size=5)))
    count = data.draw(st.integers(1, blocks))
    block_ids = data.draw(st.permutations(range(blocks)))[:count]
    slots = data.draw(st.permutations(range(count + 3)))[:count]
    arrays = [random_bytes(blocks, size, seed=n) for n, size in enumerate(sizes)]
    check_both_ways(arrays, block_ids, slots, data.draw(st.sampled_from([0, 32])))


def test_slots_between_the_segments_in_memory_are_no_hindrance() -> None:
    """A window over the paged memory must not enclose the slots: numpy would copy them aside first."""
    arena = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
    below, middle, above = arena[: 64 << 10], arena[256 << 10 : 512 << 10], arena[512 << 10 : 576 << 10]
    arrays = [below[: 32 << 10].reshape(8, 4096), above[: 32 << 10].reshape(8, 4096)]
    source = random_bytes(8, 8192)
    middle[: 64 << 10] = source.reshape(-1)
    address = int(middle.__array_interface__["data"][0]) + np.arange(8, dtype=np.int64) * 8192
    plan = CopyPlan(SegmentTable.of(arrays), np.arange(8, dtype=np.int64)[::-1].copy(), address, 8192, ())
    NumpyCopier().scatter(plan)
    assert np.array_equal(arrays[0][::-1], source[:, :4096])
    assert np.array_equal(arrays[1][::-1], source[:, 4096:])


def test_a_layout_on_both_sides_of_the_slots_many_times_falls_back() -> None:
    arena = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
    middle = arena[512 << 10 : 768 << 10]
    sides = [arena[(n % 2) * (800 << 10) + n * 4096 :][:4096].reshape(4, 1024) for n in range(8)]
    slots = random_bytes(4, 8 * 1024)
    middle[: 32 << 10] = slots.reshape(-1)
    address = int(middle.__array_interface__["data"][0]) + np.arange(4, dtype=np.int64) * 8192
    NumpyCopier().scatter(CopyPlan(SegmentTable.of(sides), np.arange(4, dtype=np.int64), address, 8192, ()))
    assert np.array_equal(np.concatenate(sides, axis=1), slots)


def test_a_plan_of_no_blocks_does_nothing() -> None:
    slab = Slots(2, 64)
    plan = slab.plan(SegmentTable.of(random_bytes(2, 64)), [], [])
    assert (tuple(NumpyCopier().gather(plan)), tuple(NumpyCopier().scatter(plan))) == ((), ())


def test_the_same_block_may_be_gathered_twice() -> None:
    slab, array = Slots(4, 64), random_bytes(4, 64)
    NumpyCopier().gather(slab.plan(SegmentTable.of(array), [2, 2, 0], [0, 1, 3]))
    assert np.array_equal(slab.data[[0, 1, 3]], array[[2, 2, 0]])


@pytest.fixture
def short_turns() -> Iterator[None]:
    """Who waits for the GIL asks for it after 0.1 ms instead of 5."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("segments", [1, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_a_large_copy_lets_another_thread_run(segments: int, direction: str, short_turns: None) -> None:
    """A thread that needs the GIL gets turns while 64 MiB move: it is not held to the end."""
    blocks, block_bytes = 32, 2 << 20
    arrays = [np.ones((blocks, block_bytes // segments), np.uint8) for _ in range(segments)]
    slab = Slots(1, 1)
    slab.slot_bytes, slab.data = block_bytes, np.ones((blocks, block_bytes), np.uint8)
    slab.address = int(slab.data.__array_interface__["data"][0])
    plan = slab.plan(SegmentTable.of(arrays), list(range(blocks))[::-1], list(range(blocks)))
    copy = getattr(NumpyCopier(), direction)
    started, ended = threading.Event(), threading.Event()
    turns = 0

    def count() -> None:
        nonlocal turns
        started.set()
        while not ended.is_set():
            turns += 1

    counter = threading.Thread(target=count)
    counter.start()
    assert started.wait(5)
    during = 0
    for _ in range(20):  # a machine with no core to spare may not run the thread during one copy
        before = turns
        copy(plan)
        during = turns - before
        if during > 100:
            break
    ended.set()
    counter.join(5)
    assert during > 100
