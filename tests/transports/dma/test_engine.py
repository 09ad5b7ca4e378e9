"""The DMA engine over a device whose streams execute as late and oddly as they may: right bytes in any order."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from forebay.kernels.layout import Layout
from forebay.transports.dma import Direction, DmaEngine, DmaError, DmaOptions, DmaTimeout, Strategy
from support.late_device import POISON, LateDevice

BLOCKS = 24
SIZES = (640, 1024, 16, 2048)
BLOCK_BYTES = sum(SIZES)
CHUNK = 3 * BLOCK_BYTES
OPTIONS = DmaOptions(CHUNK, CHUNK, stages=2, inflight_bytes=9 * BLOCK_BYTES, timeout_s=5)


@dataclass
class Rig:
    """An engine, paged memory of BLOCKS blocks, and slots for as many."""

    device: LateDevice
    engine: DmaEngine
    layout: Layout
    paged: NDArray[np.uint8]
    slots: NDArray[np.uint8]
    random: np.random.Generator

    def addresses(self, order: Any) -> NDArray[np.int64]:
        return np.array([self.slots[index].ctypes.data for index in order], np.int64)

    def payload(self, block: int) -> bytes:
        return b"".join(bytes(self.paged[segment][block * max(SIZES) :][:size]) for segment, size in enumerate(SIZES))


def rig(seed: int, *, pinned: bool = True, options: DmaOptions = OPTIONS) -> Rig:
    random = np.random.default_rng(seed)
    paged = random.integers(0, 256, (len(SIZES), BLOCKS * max(SIZES)), np.uint8)
    slots = random.integers(0, 256, (BLOCKS, BLOCK_BYTES), np.uint8)
    bases = np.array([row.ctypes.data for row in paged], np.int64)
    layout = Layout.of(bases, np.full(len(SIZES), max(SIZES), np.int64), np.array(SIZES, np.int64))
    device = LateDevice(seed)
    engine = DmaEngine(device, options)
    if pinned:
        half = slots.nbytes // 2
        for address in (slots.ctypes.data, slots.ctypes.data + half):
            engine.pinned.add(address, half, writable=True, owner=slots)
        assert engine.pinned.wait(5)
    return Rig(device, engine, layout, paged, slots, random)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "bounced"])
@pytest.mark.parametrize("checksums", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("seed", range(12))
def test_blocks_arrive_whole_in_whatever_order_the_streams_run(
    strategy: Strategy, checksums: bool, pinned: bool, seed: int
) -> None:
    """Loads and stores of many small chunks through a ring of two, both directions at once."""
    r = rig(seed, pinned=pinned)
    order = r.random.permutation(BLOCKS)
    loaded, stored = order[:11], order[11:]
    expected = [bytes(r.slots[index]) for index in loaded]
    source = [r.payload(int(block)) for block in stored]
    load = r.engine.load(r.layout, np.sort(loaded)[::-1], r.addresses(loaded), strategy=strategy, checksums=checksums)
    store = r.engine.store(r.layout, stored, r.addresses(stored), strategy=strategy, checksums=checksums)
    store.wait(5)
    load.wait(5)
    assert [r.payload(int(block)) for block in np.sort(loaded)[::-1]] == expected
    assert [bytes(r.slots[index]) for index in stored] == source
    if checksums:
        assert load.checksums.tolist() == [xxhash.xxh3_64_intdigest(block) for block in expected]
        assert store.checksums.tolist() == [xxhash.xxh3_64_intdigest(block) for block in source]
    assert r.device.unpinned_copies == 0
    r.engine.close(5)


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("seed", range(4))
def test_a_store_waits_for_the_stream_that_writes_its_blocks(strategy: Strategy, seed: int) -> None:
    r = rig(seed)
    producer = r.device.stream(urgent=False)
    fresh = r.random.integers(0, 256, r.paged.shape, np.uint8)
    for row in range(len(SIZES)):
        r.device.enqueue(producer, lambda row=row: np.copyto(r.paged[row], fresh[row]))
    transfer = r.engine.store(
        r.layout, np.arange(8), r.addresses(range(8)), strategy=strategy, after=producer, checksums=True
    )
    transfer.wait(5)
    assert (r.paged == fresh).all()
    assert [bytes(r.slots[block]) for block in range(8)] == [r.payload(block) for block in range(8)]
    assert transfer.checksums.tolist() == [xxhash.xxh3_64_intdigest(r.payload(block)) for block in range(8)]


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("seed", range(4))
def test_a_consumer_reads_only_what_has_arrived(strategy: Strategy, seed: int) -> None:
    """Its stream is told to wait; it must not overtake the load, nor the load whoever used the blocks before."""
    r = rig(seed)
    consumer = r.device.stream(urgent=False)
    before = [r.payload(block) for block in range(8)]
    seen: list[list[bytes]] = []
    r.device.enqueue(consumer, lambda: seen.append([r.payload(block) for block in range(8)]))
    transfer = r.engine.load(r.layout, np.arange(8), r.addresses(range(8)), strategy=strategy, after=consumer)
    transfer.before(consumer)
    r.device.enqueue(consumer, lambda: seen.append([r.payload(block) for block in range(8)]))
    r.device.settle()
    assert seen == [before, [bytes(r.slots[block]) for block in range(8)]]


@pytest.mark.parametrize("seed", range(4))
def test_parts_arrive_layer_by_layer(seed: int) -> None:
    r = rig(seed)
    consumer = r.device.stream(urgent=False)
    parts = r.engine.load_parts(r.layout, np.arange(6), r.addresses(range(6)), [0, 1, 3, 4])
    seen: list[tuple[bytes, ...]] = []
    expected = []
    for transfer, (first, last) in zip(parts, [(0, 1), (1, 3), (3, 4)], strict=True):
        transfer.before(consumer)
        inside = slice(int(r.layout.offsets[first]), int(r.layout.offsets[last]))
        look = lambda inside=inside: seen.append(tuple(r.payload(block)[inside] for block in range(6)))  # noqa: E731
        r.device.enqueue(consumer, look)
        expected.append(tuple(bytes(r.slots[block][inside]) for block in range(6)))
    r.device.settle()
    assert seen == expected


def test_memory_of_a_transfer_lives_until_its_end_though_nobody_keeps_it() -> None:
    """The caller drops the transfer at once; ids, ring and sums must not be let go of, nor poisoned, before the end."""
    r = rig(3)
    expected = [bytes(r.slots[block]) for block in range(BLOCKS)]
    for first in range(0, BLOCKS, 4):
        r.engine.load(r.layout, np.arange(first, first + 4), r.addresses(range(first, first + 4)), checksums=True)
        gc.collect()
    r.device.settle()
    assert [r.payload(block) for block in range(BLOCKS)] == expected


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("seed", range(12))
def test_stages_that_grow_for_other_blocks_are_used_up_first(strategy: Strategy, seed: int) -> None:
    """The second transfer needs more sums a chunk; those of the first may still be wanted."""
    r = rig(seed)
    part = r.layout.part(0, 1)
    ids = np.arange(12)
    source = [r.payload(block) for block in range(24)]
    first = r.engine.store(r.layout, ids, r.addresses(range(12)), strategy=strategy, checksums=True)
    second = r.engine.store(part, ids + 12, r.addresses(range(12, 24)), strategy=strategy, checksums=True)
    second.wait(5)
    first.wait(5)
    assert first.checksums.tolist() == [xxhash.xxh3_64_intdigest(block) for block in source[:12]]
    assert second.checksums.tolist() == [xxhash.xxh3_64_intdigest(block[: SIZES[0]]) for block in source[12:]]


@pytest.mark.parametrize("between", [None, Strategy.DMA, Strategy.MAPPED])
@pytest.mark.parametrize("direction", ["load", "store"])
@pytest.mark.parametrize("seed", range(12))
def test_a_ring_is_used_up_before_its_next_use_whatever_came_between(
    direction: str, between: Strategy | None, seed: int
) -> None:
    """The first transfer is still in the ring, held back by the engine's stream, when the third one comes."""
    r = rig(seed)
    move = r.engine.load if direction == "load" else r.engine.store
    busy = r.device.stream(urgent=False)
    for _ in range(200):
        r.device.enqueue(busy, lambda: None)
    source = [r.payload(block) for block in range(BLOCKS)] if direction == "store" else [bytes(x) for x in r.slots]
    move(r.layout, np.arange(6), r.addresses(range(6)), strategy=Strategy.STAGED, after=busy)
    if between is not None:
        move(r.layout, np.arange(6, 12), r.addresses(range(6, 12)), strategy=between)
    move(r.layout, np.arange(12, 24), r.addresses(range(12, 24)), strategy=Strategy.STAGED)
    r.device.settle()
    moved = [number for number in range(BLOCKS) if between is not None or not 6 <= number < 12]
    assert [r.payload(block) for block in moved] == [source[block] for block in moved]
    assert [bytes(r.slots[slot]) for slot in moved] == [source[slot] for slot in moved]


def test_a_gpu_that_hangs_is_an_error_in_time_and_its_memory_stays() -> None:
    r = rig(4)
    transfer = r.engine.load(r.layout, np.arange(4), r.addresses(range(4)))
    r.device.hung = True
    with pytest.raises(DmaTimeout):
        transfer.wait(0.05)
    with pytest.raises(DmaTimeout):
        r.engine.close(0.05)
    r.device.hung = False
    transfer.wait(5)
    assert r.payload(2) == bytes(r.slots[2])
    r.engine.close(5)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_bounced_transfer_that_hangs_keeps_what_it_uses_and_the_next_one_uses_other_memory(
    strategy: Strategy,
) -> None:
    """What runs late still finds its ids, and no bytes of its own in the next one's buffer."""
    quick = replace(OPTIONS, timeout_s=0.5)
    r = rig(13, pinned=False, options=quick)
    for move in (r.engine.load, r.engine.store):  # the stages have their memory by then
        move(r.layout, np.arange(2), r.addresses(range(2)), strategy=strategy, checksums=True).wait(5)
    r.slots[:2] = r.random.integers(0, 256, (2, BLOCK_BYTES), np.uint8)
    loads = [bytes(r.slots[block]) for block in range(2)]
    r.device.hung = True
    with pytest.raises(DmaTimeout):
        r.engine.load(r.layout, np.arange(2), r.addresses(range(2)), strategy=strategy, checksums=True)
    with pytest.raises(DmaTimeout):
        r.engine.store(r.layout, np.arange(4, 6), r.addresses(range(4, 6)), strategy=strategy, checksums=True)
    gc.collect()
    r.device.hung = False
    r.engine.store(r.layout, np.arange(6, 8), r.addresses(range(6, 8))).wait(5)
    r.device.settle()
    assert [r.payload(block) for block in range(2)] == loads
    assert [bytes(r.slots[block]) for block in range(6, 8)] == [r.payload(block) for block in range(6, 8)]


def test_who_waits_behind_a_transfer_that_hangs_does_not_wait_for_each_of_the_others_in_turn() -> None:
    r = rig(14, pinned=False, options=replace(OPTIONS, timeout_s=0.3))
    r.device.hung = True
    errors: list[DmaError] = []

    def load(block: int) -> None:
        try:
            r.engine.load(r.layout, np.array([block]), r.addresses([block]))
        except DmaError as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(block,)) for block in range(8)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 1.5
    assert len(errors) == 8
    refused = [error for error in errors if not isinstance(error, DmaTimeout)]
    assert refused, "those whose turn has not come have begun nothing"
    assert {str(error) for error in refused} == {"other transfers wait for the GPU"}


def test_a_direction_that_is_not_let_go_of_is_not_closed() -> None:
    r = rig(15)
    with r.engine._lanes[Direction.STORE].lock, pytest.raises(DmaError, match="other transfers"):
        r.engine.close(0.05)
    r.engine.close(5)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "bounced"])
@pytest.mark.parametrize("seed", range(4))
def test_a_signal_ends_a_transfer_only_when_nothing_moves_any_more(pinned: bool, seed: int) -> None:
    """Its caller gives slots and pages away."""
    r = rig(seed, pinned=pinned)
    gather, calls = r.device.kernels.gather, []

    def interrupted(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        gather(*arguments, **options)

    r.device.kernels.gather = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        r.engine.store(r.layout, np.arange(BLOCKS), r.addresses(range(BLOCKS)), strategy=Strategy.STAGED)
    assert r.device.run(1) == 0


def test_a_load_that_fails_and_then_hangs_keeps_its_buffers_and_who_computes_comes_after_it() -> None:
    r = rig(16, pinned=False, options=replace(OPTIONS, timeout_s=0.3))
    r.engine.load(r.layout, np.arange(2), r.addresses(range(2)), strategy=Strategy.STAGED).wait(5)
    scatter, engine_stream = r.device.kernels.scatter, r.device.stream(urgent=False)
    loaded = [bytes(r.slots[block]) for block in range(4)]
    calls: list[int] = []

    def failing(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            r.device.hung = True
            raise RuntimeError("launch failed")
        scatter(*arguments, **options)

    r.device.kernels.scatter = failing  # type: ignore[method-assign]
    with pytest.raises(DmaTimeout):
        r.engine.load(r.layout, np.arange(4), r.addresses(range(4)), strategy=Strategy.STAGED, after=engine_stream)
    seen: list[list[bytes]] = []
    r.device.enqueue(engine_stream, lambda: seen.append([r.payload(block) for block in range(3)]))
    r.device.kernels.scatter = scatter  # type: ignore[method-assign]
    r.device.hung = False
    r.engine.load(r.layout, np.arange(8, 10), r.addresses(range(8, 10))).wait(5)
    r.device.settle()
    assert seen == [loaded[:3]], "its first chunk had been enqueued"
    assert [r.payload(block) for block in range(3)] == loaded[:3]


def test_a_stream_that_waits_for_a_transfer_is_one_of_its_device() -> None:
    """Handles of default streams are the same on each device: the calling thread's current one says which is meant."""
    r = rig(17)
    transfer = r.engine.load(r.layout, np.arange(2), r.addresses(range(2)))
    inside: list[bool] = []
    current = False
    wait = r.device.wait

    @contextmanager
    def used() -> Iterator[None]:
        nonlocal current
        current = True
        yield
        current = False

    def waited(stream: int, event: Any) -> None:
        inside.append(current)
        wait(stream, event)

    r.device.used, r.device.wait = used, waited  # type: ignore[method-assign]
    transfer.before(0)
    assert inside == [True]


def test_no_more_is_enqueued_than_may_be_in_flight() -> None:
    quick = DmaOptions(chunk_bytes=BLOCK_BYTES, inflight_bytes=4 * BLOCK_BYTES, timeout_s=0.05)
    r = rig(5, options=quick)
    r.device.hung = True
    with pytest.raises(DmaTimeout):
        r.engine.load(r.layout, np.arange(BLOCKS), r.addresses(range(BLOCKS)), strategy=Strategy.STAGED)
    r.device.hung = False
    assert r.device.run(10_000) < 100, "a few chunks' operations, not all of them"


def test_a_failure_half_way_stops_and_says_so() -> None:
    r = rig(6)
    scatter, calls = r.device.kernels.scatter, []

    def failing(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("launch failed")
        scatter(*arguments, **options)

    r.device.kernels.scatter = failing  # type: ignore[method-assign]
    with pytest.raises(DmaError, match="launch failed"):
        r.engine.load(r.layout, np.arange(BLOCKS), r.addresses(range(BLOCKS)), strategy=Strategy.STAGED)
    assert r.device.run(1) == 0, "nothing moves any more"
    r.device.kernels.scatter = scatter  # type: ignore[method-assign]
    r.engine.load(r.layout, np.arange(4), r.addresses(range(4))).wait(5)
    assert r.payload(1) == bytes(r.slots[1])


def test_memory_that_cannot_be_pinned_is_said_and_bounced() -> None:
    r = rig(7, pinned=False)
    r.device.refuse = "memlock limit"
    r.engine.pinned.add(r.slots.ctypes.data, r.slots.nbytes, writable=True, owner=r.slots)
    assert r.engine.pinned.wait(5)
    assert r.engine.pinned.status().refused == "memlock limit"
    r.engine.load(r.layout, np.arange(BLOCKS), r.addresses(range(BLOCKS))).wait(5)
    assert [r.payload(block) for block in range(BLOCKS)] == [bytes(slot) for slot in r.slots]
    assert r.device.unpinned_copies == 0


def test_slots_of_two_regions_are_never_one_piece() -> None:
    """The driver refuses a copy across two registrations; blocks 11 and 12 are neighbours in different ones."""
    r = rig(8)
    r.engine.load(r.layout, np.arange(10, 14), r.addresses(range(10, 14)), strategy=Strategy.STAGED).wait(5)
    assert r.device.unpinned_copies == 0
    assert [r.payload(block) for block in range(10, 14)] == [bytes(r.slots[block]) for block in range(10, 14)]


def test_a_region_that_was_removed_is_bounced_again_and_let_go_of() -> None:
    r = rig(9)
    owner = np.full(2 * BLOCK_BYTES, POISON, np.uint8)
    r.engine.pinned.add(owner.ctypes.data, owner.nbytes, writable=True, owner=owner)
    assert r.engine.pinned.wait(5)
    pinned = r.engine.pinned.status().pinned
    r.engine.pinned.remove(owner.ctypes.data)
    assert r.engine.pinned.status().pinned == pinned - owner.nbytes
    places = owner.ctypes.data + np.arange(2, dtype=np.int64) * BLOCK_BYTES
    r.engine.store(r.layout, np.arange(2), places).wait(5)
    assert bytes(owner) == r.payload(0) + r.payload(1)


def test_an_error_of_the_drivers_own_does_not_end_the_pinning_of_others() -> None:
    r = rig(18, pinned=False)
    register = r.device.register

    def broken(address: int, size: int, *, writable: bool) -> int:
        raise RuntimeError("unknown error")

    r.device.register = broken  # type: ignore[method-assign]
    r.engine.pinned.add(r.slots.ctypes.data, r.slots.nbytes, writable=True, owner=r.slots)
    assert r.engine.pinned.wait(5), "nothing waits for a region that was given up"
    assert r.engine.pinned.status().refused == "unknown error"
    r.device.register = register  # type: ignore[method-assign]
    r.engine.pinned.add(r.slots.ctypes.data, r.slots.nbytes, writable=True, owner=r.slots)
    assert r.engine.pinned.wait(5)
    assert r.engine.pinned.status().pinned == r.slots.nbytes


def test_a_region_that_is_being_pinned_is_not_pinned_twice_and_closing_unpins_it() -> None:
    r = rig(19, pinned=False)
    register, begun, go_on = r.device.register, threading.Event(), threading.Event()

    def slow(address: int, size: int, *, writable: bool) -> int:
        begun.set()
        assert go_on.wait(5)
        return register(address, size, writable=writable)

    r.device.register = slow  # type: ignore[method-assign]
    for _ in range(2):
        r.engine.pinned.add(r.slots.ctypes.data, r.slots.nbytes, writable=True, owner=r.slots)
        assert begun.wait(5)
    assert r.engine.pinned.status().waiting == 0
    closing = threading.Thread(target=r.engine.close, args=(5,))
    closing.start()
    while not r.engine.pinned._closed:
        closing.join(0.01)
    go_on.set()
    closing.join(5)
    assert r.device._pinned == {}
    assert r.engine.pinned.status().pinned == 0


@pytest.mark.parametrize(("ids", "slots", "why"), [([0, 1], [0], "2 block ids for 1 slots"), ([], [], "0 block ids")])
def test_arguments_that_fit_not_are_refused(ids: list[int], slots: list[int], why: str) -> None:
    r = rig(10)
    with pytest.raises(DmaError, match=why):
        r.engine.load(r.layout, np.array(ids, np.int64), r.addresses(slots))


def test_blocks_too_small_for_the_gpus_checksum_are_refused_before_anything_moves() -> None:
    r = rig(11)
    tiny = Layout.of(r.layout.bases[:1], r.layout.strides[:1], np.array([240], np.int64))
    with pytest.raises(DmaError, match="240 bytes"):
        r.engine.store(tiny, np.arange(2), r.addresses(range(2)), checksums=True)
