"""The DMA engine on a GPU: right bytes by every strategy, and the order of late producers and consumers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xxhash

from forebay.kernels.layout import Layout
from forebay.transports.dma import Direction, DmaEngine, DmaOptions, Strategy, tuning
from forebay.transports.dma.cuda_device import CudaDevice

try:
    import cupy
except ImportError:  # conftest.py skips all that is here, with the reason
    cupy = None

POISON = 0xA5
OPTIONS = DmaOptions(chunk_bytes=1 << 20, mapped_chunk_bytes=1 << 20, stages=3, inflight_bytes=4 << 20)
SPIN_CYCLES = 50_000_000  # about 30 ms

LATE = r"""
extern "C" __global__ void late_fill(unsigned char* to, const unsigned char* from, size_t n, long long cycles) {
  const long long begin = clock64();
  while (clock64() - begin < cycles) {}
  for (size_t i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
}
"""


class Rig:
    """Paged memory on the GPU in one allocation with room between the segments, and slots in pinned or plain memory."""

    def __init__(self, device: CudaDevice, seed: int, *, uniform: bool = True, pinned: bool = True) -> None:
        self.random = np.random.default_rng(seed)
        self.engine = DmaEngine(device, OPTIONS)
        self.blocks = 40
        sizes = np.full(12, 16 << 10) if uniform else self.random.integers(1, 40_000, 17)
        gap = 0 if uniform else 3
        starts = np.concatenate(([0], np.cumsum((sizes + gap) * self.blocks)))
        self.host = self.random.integers(0, 256, int(starts[-1]), np.uint8)
        self.paged = cupy.asarray(self.host)
        self.layout = Layout.of(self.paged.data.ptr + starts[:-1], sizes + gap, sizes)
        self.starts, self.sizes, self.gap = starts[:-1], sizes, gap
        self.pitch = self.layout.block_bytes + (0 if uniform else 5)
        self.memory = np.full(self.blocks * self.pitch, POISON, np.uint8)
        if pinned:
            self.engine.pinned.add(self.memory.ctypes.data, self.memory.nbytes, writable=True, owner=self.memory)
            assert self.engine.pinned.wait(30)
            assert not self.engine.pinned.status().refused

    def slot(self, index: int) -> Any:
        return self.memory[index * self.pitch :][: self.layout.block_bytes]

    def addresses(self, order: Any) -> Any:
        return self.memory.ctypes.data + np.asarray(order, np.int64) * self.pitch

    def payload(self, paged: Any, block: int) -> bytes:
        places = self.starts + block * (self.sizes + self.gap)
        return b"".join(bytes(paged[place : place + size]) for place, size in zip(places, self.sizes, strict=True))


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice(0)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "bounced"])
@pytest.mark.parametrize("uniform", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize("checksums", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("strategy", list(Strategy))
def test_every_byte_arrives_and_no_other_is_touched(
    device: CudaDevice, strategy: Strategy, checksums: bool, uniform: bool, pinned: bool
) -> None:
    """Store some blocks, load them into others: those must be equal, and all else as it was."""
    r = Rig(device, 3, uniform=uniform, pinned=pinned)
    order = r.random.permutation(r.blocks)
    source, target = order[:15].astype(np.int64), order[15:30].astype(np.int64)
    slots = r.random.permutation(r.blocks)[:15]
    store = r.engine.store(r.layout, source, r.addresses(slots), strategy=strategy, checksums=checksums)
    store.wait(10)
    expected = [r.payload(r.host, int(block)) for block in source]
    assert [bytes(r.slot(int(slot))) for slot in slots] == expected
    untouched = np.delete(r.memory.reshape(r.blocks, r.pitch), slots, axis=0)
    assert (untouched == POISON).all()
    load = r.engine.load(r.layout, target, r.addresses(slots), strategy=strategy, checksums=checksums)
    load.wait(10)
    now = cupy.asnumpy(r.paged)
    assert [r.payload(now, int(block)) for block in target] == expected
    for block in target:
        for place, size in zip(r.starts + block * (r.sizes + r.gap), r.sizes, strict=True):
            now[place : place + size] = r.host[place : place + size]
    assert np.array_equal(now, r.host)
    if checksums:
        sums = [xxhash.xxh3_64_intdigest(block) for block in expected]
        assert store.checksums.tolist() == load.checksums.tolist() == sums
    r.engine.close(10)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_store_waits_for_a_late_producer(device: CudaDevice, strategy: Strategy) -> None:
    r = Rig(device, 4)
    fresh = r.random.integers(0, 256, len(r.host), np.uint8)
    there, late = cupy.asarray(fresh), cupy.RawKernel(LATE, "late_fill")
    stream = cupy.cuda.Stream(non_blocking=True)
    ids = np.arange(16, dtype=np.int64)  # no more than may be in flight, so the call returns
    r.engine.store(r.layout, ids, r.addresses(ids), strategy=strategy).wait(10)  # memory is allocated, which may wait
    late((1,), (1024,), (r.paged, there, np.uint64(len(fresh)), np.int64(SPIN_CYCLES)), stream=stream)
    transfer = r.engine.store(r.layout, ids, r.addresses(ids), strategy=strategy, after=stream.ptr)
    assert not transfer.done(), "the producer was not late, so this shows nothing"
    transfer.wait(10)
    assert [bytes(r.slot(block)) for block in range(len(ids))] == [r.payload(fresh, b) for b in range(len(ids))]


@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_load_overtakes_no_late_reader_and_is_overtaken_by_none(device: CudaDevice, strategy: Strategy) -> None:
    """One stream reads the blocks late, before the load; and again after it, told to wait."""
    r = Rig(device, 5)
    late, stream = cupy.RawKernel(LATE, "late_fill"), cupy.cuda.Stream(non_blocking=True)
    seen = [cupy.zeros_like(r.paged) for _ in range(2)]
    r.memory[:] = r.random.integers(0, 256, len(r.memory), np.uint8)
    cupy.cuda.Device().synchronize()
    ids = np.arange(r.blocks, dtype=np.int64)
    late((1,), (1024,), (seen[0], r.paged, np.uint64(len(r.host)), np.int64(SPIN_CYCLES)), stream=stream)
    transfer = r.engine.load(r.layout, ids, r.addresses(ids), strategy=strategy, after=stream.ptr)
    transfer.before(stream.ptr)
    late((1,), (1024,), (seen[1], r.paged, np.uint64(len(r.host)), np.int64(0)), stream=stream)
    stream.synchronize()
    assert np.array_equal(cupy.asnumpy(seen[0]), r.host)
    after = cupy.asnumpy(seen[1])
    assert [r.payload(after, block) for block in range(r.blocks)] == [bytes(r.slot(b)) for b in range(r.blocks)]


def test_parts_arrive_in_order_each_with_an_event_of_its_own(device: CudaDevice) -> None:
    r = Rig(device, 6)
    r.memory[:] = r.random.integers(0, 256, len(r.memory), np.uint8)
    ids = np.arange(r.blocks, dtype=np.int64)
    for transfer in r.engine.load_parts(r.layout, ids, r.addresses(ids), [0, 4, 5, 12]):
        transfer.wait(10)
    now = cupy.asnumpy(r.paged)
    assert [r.payload(now, block) for block in range(r.blocks)] == [bytes(r.slot(b)) for b in range(r.blocks)]


def test_both_directions_at_once_from_two_threads(device: CudaDevice) -> None:
    """Stores of one half beside loads of the other, many times, all strategies mixed."""
    import threading

    r = Rig(device, 7)
    stored, loaded = np.arange(0, 20, dtype=np.int64), np.arange(20, 40, dtype=np.int64)
    r.memory[20 * r.pitch :] = r.random.integers(0, 256, 20 * r.pitch, np.uint8)
    errors: list[BaseException] = []

    def work(direction: Direction, ids: Any) -> None:
        try:
            for turn in range(30):
                strategy = list(Strategy)[turn % 3]
                move = r.engine.load if direction is Direction.LOAD else r.engine.store
                move(r.layout, ids, r.addresses(ids), strategy=strategy, checksums=turn % 2 == 0).wait(20)
        except BaseException as error:  # noqa: BLE001  # told by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=case) for case in zip(Direction, (loaded, stored), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    now = cupy.asnumpy(r.paged)
    assert [bytes(r.slot(int(b))) for b in stored] == [r.payload(r.host, int(b)) for b in stored]
    assert [r.payload(now, int(b)) for b in loaded] == [bytes(r.slot(int(b))) for b in loaded]


def test_tuning_measures_every_strategy_and_is_found_again(device: CudaDevice, tmp_path: Any) -> None:
    engine = DmaEngine(device)
    rows = tuning.measure(engine, device, device.key, segment_bytes=(16 << 10,), moved_bytes=(8 << 20,))
    assert [set(row.rates) for row in rows.rows] == [{strategy.value for strategy in Strategy}] * 2
    assert all(rate > 1e8 for row in rows.rows for rate in row.rates.values())
    tuning.save(rows, tmp_path)
    found = tuning.load(tmp_path, device.key)
    assert found is not None
    assert found.document() == rows.document()
    engine.close(10)
