"""The copier of device memory, over a device whose streams execute as late and oddly as they may."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import threading
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xxhash

from forebay.client import device_copier
from forebay.client.copier import CopyPlan, CopyTimeout, NumpyCopier
from forebay.client.device_copier import DeviceCopier, cuda_engine
from forebay.client.places import SlabMapping
from forebay.client.segments import SegmentTable
from forebay.transports.dma import DmaError
from support.device_arrays import CudaArray, CudaTensor, LateDevices
from support.late_device import LateDevice
from support.live import eventually

BLOCKS, SEGMENT, SLOTS = 12, 400, 8
BLOCK_BYTES = 2 * SEGMENT


def mapping(*, writable: bool = True, slot_bytes: int = BLOCK_BYTES) -> SlabMapping:
    """A slab whose slots hold random bytes."""
    data = np.random.default_rng(1).integers(0, 256, SLOTS * slot_bytes).astype(np.uint8)
    return SlabMapping.of(data, np.ones(SLOTS, np.uint64), slot_bytes, writable=writable)


class Rig:
    """A copier over late devices, two planes of paged memory on device 0, one slab."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.devices = LateDevices(3, timeout_s=timeout_s)
        self.copier = DeviceCopier(NumpyCopier(), self.devices, timeout_s=timeout_s)
        self.paged = np.random.default_rng(0).integers(0, 256, (2, BLOCKS, SEGMENT)).astype(np.uint8)
        self.table = SegmentTable.of([CudaTensor(plane) for plane in self.paged])
        self.slab = mapping()

    @property
    def device(self) -> LateDevice:
        return self.devices.devices[0]

    def plan(self, ids: list[int], slots: list[int], **fields: Any) -> CopyPlan:
        addresses = self.slab.address + np.array(slots, np.int64) * BLOCK_BYTES
        return CopyPlan(self.table, np.array(ids, np.int64), addresses, BLOCK_BYTES, (self.slab,), **fields)

    def block(self, number: int) -> bytes:
        return b"".join(bytes(plane[number]) for plane in self.paged)

    def slot(self, number: int) -> bytes:
        return bytes(self.slab.data[number * BLOCK_BYTES :][:BLOCK_BYTES])


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def quick() -> Rig:
    """Gives a transfer up soon."""
    return Rig(timeout_s=0.5)


def hashes(blocks: list[bytes]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(block) for block in blocks]


@pytest.mark.parametrize("stream", [0, None])
@pytest.mark.parametrize("asked", [False, True], ids=["plain", "with checksums"])
def test_blocks_move_both_ways_through_the_engine(rig: Rig, asked: bool, stream: int | None) -> None:
    sums = np.zeros(3, np.uint64) if asked else None
    before = [rig.block(number) for number in (4, 0, 9)]
    assert not rig.copier.gather(rig.plan([4, 0, 9], [2, 1, 7], sums=sums, stream=stream))
    assert [rig.slot(number) for number in (2, 1, 7)] == before
    assert sums is None or sums.tolist() == hashes(before)
    rig.paged[:] = 0
    assert not rig.copier.scatter(rig.plan([11, 3, 5], [2, 1, 7], sums=sums, stream=stream))
    assert [rig.block(number) for number in (11, 3, 5)] == before
    assert sums is None or sums.tolist() == hashes(before)
    assert rig.device.unpinned_copies == 0


def test_cupys_arrays_are_moved_as_torchs(rig: Rig) -> None:
    rig.table = SegmentTable.of([CudaArray(plane) for plane in rig.paged])
    assert not rig.copier.gather(rig.plan([1], [1]))
    assert rig.slot(1) == rig.block(1)


def test_plans_of_host_memory_make_no_engine(rig: Rig) -> None:
    rig.table = SegmentTable.of(list(rig.paged))
    assert not rig.copier.gather(rig.plan([1], [1]))
    assert rig.slot(1) == rig.block(1)
    rig.paged[:, 2] = 0
    assert not rig.copier.scatter(rig.plan([2], [1]))
    assert rig.block(2) == rig.slot(1)
    assert rig.copier.engines() == {}


def test_empty_plan_touches_no_device(rig: Rig) -> None:
    assert not rig.copier.gather(rig.plan([], []))
    assert rig.copier.engines() == {}


def test_each_device_has_one_engine_and_threads_share_it(rig: Rig) -> None:
    other = SegmentTable.of([CudaTensor(plane, 1) for plane in rig.paged])
    plans = [rig.plan([number], [number]) for number in range(6)]
    plans[5] = replace(plans[5], table=other)
    threads = [threading.Thread(target=rig.copier.gather, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [rig.slot(number) for number in range(6)] == [rig.block(number) for number in range(6)]
    assert sorted(rig.copier.engines()) == [0, 1]


def test_a_store_comes_after_the_stream_that_writes_its_blocks_and_a_load_after_who_reads_them(rig: Rig) -> None:
    rig.copier.prepare(0)
    stream = rig.device.stream(urgent=False)
    rig.device.enqueue(stream, lambda: rig.paged.fill(7))
    assert not rig.copier.gather(rig.plan([4], [2], stream=stream))
    assert rig.slot(2) == bytes([7]) * BLOCK_BYTES
    seen: list[bytes] = []
    rig.device.enqueue(stream, lambda: seen.append(rig.block(4)))
    assert not rig.copier.scatter(rig.plan([4], [3], stream=stream))
    assert (seen, rig.block(4)) == ([bytes([7]) * BLOCK_BYTES], rig.slot(3))


def test_blocks_too_small_for_the_gpus_checksum_are_hashed_in_their_slots(rig: Rig) -> None:
    small = np.random.default_rng(5).integers(0, 256, (BLOCKS, 240)).astype(np.uint8)
    table, slab = SegmentTable.of(CudaTensor(small)), mapping(slot_bytes=240)
    sums = np.zeros(2, np.uint64)
    addresses = slab.address + np.array([0, 3], np.int64) * 240
    plan = CopyPlan(table, np.array([5, 6], np.int64), addresses, 240, (slab,), sums=sums)
    assert not rig.copier.gather(plan)
    assert sums.tolist() == hashes([bytes(small[5]), bytes(small[6])])
    sums[:] = 0
    assert not rig.copier.scatter(replace(plan, block_ids=np.array([1, 2], np.int64)))
    assert sums.tolist() == hashes([bytes(small[1]), bytes(small[2])])


# --- pinning -------------------------------------------------------------------------------------------------------


def test_a_slab_is_pinned_once_and_let_go_of_with_its_mapping(rig: Rig) -> None:
    """The daemon took the slab back and the session forgot it: nothing refers to it any more."""
    for _ in range(3):
        rig.copier.gather(rig.plan([1], [1]))
    pinned = rig.devices.made[0].pinned
    assert pinned.wait(5)
    assert pinned.status().pinned == rig.slab.data.nbytes
    data = weakref.ref(rig.slab.data)
    rig.slab = mapping()
    gc.collect()
    eventually(lambda: pinned.status().pinned == 0, "the slab is unpinned")
    eventually(lambda: data() is None, "its memory is let go of")
    rig.copier.gather(rig.plan([2], [2]))
    assert pinned.wait(5)
    assert (pinned.status().pinned, rig.slot(2)) == (rig.slab.data.nbytes, rig.block(2))


def test_a_slab_stays_pinned_while_a_plan_holds_it(rig: Rig) -> None:
    plan = rig.plan([1], [1])
    rig.copier.gather(plan)
    pinned = rig.devices.made[0].pinned
    assert pinned.wait(5)
    rig.slab = mapping()
    gc.collect()
    rig.copier.gather(rig.plan([1], [1]))  # whatever was queued before has been seen to by the time the next one is
    rig.slab = mapping()
    gc.collect()
    eventually(lambda: pinned.status().pinned == plan.owners[0].data.nbytes, "only the plan's slab is pinned")  # type: ignore[attr-defined]
    assert not rig.copier.scatter(plan)


def test_a_slab_that_cannot_be_pinned_is_bounced_and_asked_for_once() -> None:
    rig = Rig()
    tries: list[int] = []

    def refuse(device: LateDevice) -> None:
        device.refuse = "memlock limit"
        register = device.register
        device.register = lambda *a, **k: tries.append(1) or register(*a, **k)  # type: ignore[method-assign]

    rig.devices.on_made = refuse
    for number in range(4):
        assert not rig.copier.gather(rig.plan([number], [number]))
        assert rig.devices.made[0].pinned.wait(5)
    assert [rig.slot(number) for number in range(4)] == [rig.block(number) for number in range(4)]
    assert (len(tries), rig.device.unpinned_copies) == (1, 0)


def test_a_slab_that_was_never_pinned_is_not_taken_for_the_next_one_at_its_address() -> None:
    """It stays mapped until the thread that unpins has seen it, which may be busy with others."""
    rig = Rig()
    rig.copier.gather(rig.plan([1], [1]))
    pinned = rig.devices.made[0].pinned
    assert pinned.wait(5)
    unregister, busy, go_on = rig.device.unregister, threading.Event(), threading.Event()

    def slow(address: int) -> None:
        busy.set()
        assert go_on.wait(5)
        unregister(address)

    rig.device.unregister = slow  # type: ignore[method-assign]
    rig.device.refuse = "read-only memory"
    other = rig.slab = mapping()
    rig.copier.gather(rig.plan([1], [1]))
    assert pinned.wait(5)
    data = weakref.ref(other.data)
    rig.slab = mapping()
    gc.collect()
    assert busy.wait(5), "the first slab is being unpinned"
    del other
    gc.collect()
    assert data() is not None
    go_on.set()
    eventually(lambda: data() is None, "the memory of a slab that was retired is let go of")


def test_memory_that_is_no_slab_is_bounced(rig: Rig) -> None:
    assert not rig.copier.gather(replace(rig.plan([1], [1]), owners=(rig.slab.data,)))
    assert rig.slot(1) == rig.block(1)
    assert rig.devices.made[0].pinned.status().pinned == 0


def test_a_read_only_slab_is_pinned_as_such() -> None:
    rig = Rig()
    kinds: list[bool] = []

    def watch(device: LateDevice) -> None:
        register = device.register
        device.register = lambda *a, writable: kinds.append(writable) or register(*a, writable=writable)  # type: ignore[method-assign]

    rig.devices.on_made = watch
    rig.slab = mapping(writable=False)
    rig.copier.scatter(rig.plan([1], [1]))
    assert rig.devices.made[0].pinned.wait(5)
    assert kinds == [False]


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_a_gpu_that_hangs_is_a_timeout_and_not_asked_again_for_a_while(quick: Rig, direction: str) -> None:
    quick.copier.prepare(0)
    quick.device.hung = True
    slab, data = weakref.ref(quick.slab), weakref.ref(quick.slab.data)
    with pytest.raises(CopyTimeout, match="CUDA device 0"):
        getattr(quick.copier, direction)(quick.plan([1, 2], [1, 2]))
    assert list(quick.copier.gather(quick.plan([3], [3]))) == [0], "nothing is begun while it rests"
    quick.slab = mapping()
    gc.collect()
    assert slab() is not None, "the memory of what may be moving stays"
    assert data() is not None
    quick.device.hung = False
    quick.copier._sides[0].resting_until = 0.0  # type: ignore[union-attr]
    assert not quick.copier.gather(quick.plan([3], [3]))
    assert quick.slot(3) == quick.block(3)


@pytest.mark.parametrize("named", [True, False], ids=["named", "legacy"])
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "bounced"])
def test_who_computes_after_a_load_that_hung_comes_after_its_late_bytes(quick: Rig, pinned: bool, named: bool) -> None:
    """The engine is told that the load failed and computes the blocks; late bytes must not overwrite what it makes."""
    quick.copier.prepare(0)
    stream = quick.device.stream(urgent=False) if named else 0
    quick.device.refuse = "" if pinned else "memlock limit"
    quick.copier.gather(quick.plan([0], [0]))
    assert quick.devices.made[0].pinned.wait(5)
    quick.device.hung = True
    with pytest.raises(CopyTimeout):
        quick.copier.scatter(quick.plan([1], [1], stream=stream if named else None))
    quick.device.enqueue(stream, lambda: quick.paged[:, 1].fill(9))
    quick.device.hung = False
    quick.device.settle()
    assert quick.block(1) == bytes([9]) * BLOCK_BYTES


def interrupt(rig: Rig, *, hang: bool) -> None:
    """The first wait for a transfer that was begun is interrupted by a signal; the GPU hangs from then on, or not."""
    rig.copier.gather(rig.plan([0], [0]))
    engine, passed, begun = rig.devices.made[0], rig.device.passed, []
    assert engine.pinned.wait(5)
    enqueue = engine._enqueue

    def enqueued(*arguments: Any) -> Any:
        begun.append(enqueue(*arguments))
        return begun[-1]

    def interrupted(event: Any) -> bool:
        if begun:
            begun.clear()
            rig.device.hung = hang
            raise KeyboardInterrupt
        return passed(event)

    engine._enqueue = enqueued  # type: ignore[method-assign]
    rig.device.passed = interrupted  # type: ignore[method-assign]


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_a_signal_comes_through_when_the_bytes_have_moved(rig: Rig, direction: str) -> None:
    """Who is interrupted aborts the reservation or releases the lease: the slots are another's at once."""
    interrupt(rig, hang=False)
    expected = rig.block(1) if direction == "gather" else rig.slot(1)
    with pytest.raises(KeyboardInterrupt):
        getattr(rig.copier, direction)(rig.plan([1], [1]))
    assert (rig.block(1), rig.slot(1)) == (expected, expected)


def test_a_signal_during_a_transfer_that_hangs_is_a_timeout(quick: Rig) -> None:
    interrupt(quick, hang=True)
    with pytest.raises(CopyTimeout):
        quick.copier.gather(quick.plan([2], [2]))


def test_an_error_of_the_gpu_fails_the_blocks_and_says_so(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.copier.prepare(0)

    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("launch failed")

    kernels = rig.device.kernels
    kernels.gather = kernels.scatter = broken  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "forebay.client"):
        assert list(rig.copier.gather(rig.plan([1, 2], [1, 2]))) == [0, 1]
    assert "2 blocks could not be copied: CUDA device 0: store failed: RuntimeError: launch failed" in caplog.text


def test_a_device_that_is_lost_while_it_is_waited_for_fails_the_blocks(rig: Rig) -> None:
    """The driver's own error, as an illegal address makes every later call of the context raise."""
    rig.copier.prepare(0)

    def lost(event: Any) -> bool:
        raise RuntimeError("an illegal memory access was encountered")

    rig.device.passed = lost  # type: ignore[method-assign]
    assert list(rig.copier.scatter(rig.plan([1], [1]))) == [0]


@pytest.mark.parametrize("kind", [DmaError, RuntimeError], ids=["ours", "the driver's"])
def test_a_gpu_that_cannot_be_used_fails_blocks_and_is_tried_once(kind: type[Exception]) -> None:
    rig, tries = Rig(), []

    def refuse(index: int) -> Any:
        tries.append(index)
        raise kind("no driver")

    copier = DeviceCopier(NumpyCopier(), refuse)
    for _ in range(2):
        with pytest.raises(DmaError, match="no driver"):
            copier.prepare(0)
        assert list(copier.gather(rig.plan([1, 2], [1, 2]))) == [0, 1]
    assert (tries, copier.engines()) == ([0], {})


def test_without_cupy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cupy" else find(name))
    with pytest.raises(DmaError, match=r"pip install 'forebay\[cuda13\]'"):
        cuda_engine(0)


# --- life ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copier, "CLOSE_S", 0.05)


@pytest.mark.usefixtures("closing")
@pytest.mark.parametrize("hung", [False, True])
def test_a_copier_that_is_gone_closes_its_engines_unless_they_hang(
    rig: Rig, hung: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rig.copier.gather(rig.plan([1], [1]))
    pinned = rig.devices.made[0].pinned
    assert pinned.wait(5)
    rig.device.hung = hung
    unpinner = rig.copier._unpinner
    assert unpinner is not None
    del rig.copier
    gc.collect()
    unpinner.join(10)
    assert not unpinner.is_alive()
    assert pinned.status().pinned == (rig.slab.data.nbytes if hung else 0)
    engine = weakref.ref(rig.devices.made.pop(0))
    del pinned, unpinner
    caplog.clear()  # its records hold the error, and that its frames
    gc.collect()
    assert (engine() is not None) == hung, "what a GPU may still use stays"


def test_a_forked_child_leaves_its_parents_engines_alone(rig: Rig) -> None:
    rig.copier.gather(rig.plan([1], [1]))
    child = os.fork()
    if child == 0:
        alone = rig.copier.engines() == {} and not rig.copier._lock.locked()
        os._exit(0 if alone else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(rig.copier.engines()) == [0]
