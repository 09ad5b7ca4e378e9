"""The engine that moves blocks: three strategies, two directions, streams of its own, nothing waited for.

A transfer is cut into chunks. A direction has one stream for its copies (two at once were slower on an H200) and a few
stages, each with a stream for kernels and a piece of device memory; the stages take the chunks in turn, so the copy
engine works on one while kernels work on others:

- DMA: the copy engine moves each segment, neighbours merged. Costs the GPU's multiprocessors nothing.
- STAGED: the copy engine moves whole slots through a ring in device memory, a kernel scatters or gathers there.
- MAPPED: the kernel reads or writes the host's slots itself.

Checksums are summed by the kernel that copies; with DMA, by one that reads the paged memory.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from forebay.kernels.layout import CHECKSUM_BLOCK_BYTES_MIN, Layout, Table, alignment_of, sums_of
from forebay.transports.dma.device import Addresses, Buffer, Device, Direction
from forebay.transports.dma.errors import DmaError, DmaTimeout
from forebay.transports.dma.pieces import merged, of_segments
from forebay.transports.dma.pinned import PinnedRegions
from forebay.transports.dma.strategy import Strategy
from forebay.transports.dma.tuning import Tuning

_EAGER_S = 200e-6
"""Most small transfers end within this time, and a timer would wake up later than they do."""

_POLL_S = 50e-6
_SUM_ROW_BYTES = 64
_RING_ALIGNMENT = 16

DMA_SEGMENT_BYTES_MIN = 128 << 10
MAPPED_BYTES_MAX = 8 << 20
"""Where nothing was measured: segments of this size are worth a descriptor each; so few bytes to load, one kernel."""

SMALL_CHUNK_BYTES = 4 << 20
"""Chunks are not made smaller than this: each costs the calling thread about 60 us."""

CHUNKS = 4
"""A transfer of less than some full chunks is cut into this many: its copies and kernels overlap as well."""

MAPPED_STAGES = 2
"""Mapped kernels run side by side, so that one fills the gaps of the other."""


@dataclass(frozen=True, slots=True)
class DmaOptions:
    """How much of the GPU the engine may take.

    Attributes:
        chunk_bytes: moved at most by one step of the pipeline; at least one block. mapped_chunk_bytes: the same for
            MAPPED, which has no ring to fit into.
        stages: chunks under way at once, a direction; of MAPPED `MAPPED_STAGES` at most.
        inflight_bytes: of one transfer, enqueued and not yet moved; more waits.
        multiprocessors: that STAGED's kernels may use, a direction, and those that only hash; the rest stays the
            inference engine's. 0: all.
        mapped_multiprocessors: the same of MAPPED, twice as many where checksums are made. As few as fill the link:
            on an H200 16 of them moved nothing more, and slowed a matmul beside them by 18 % (loads), 102 % (stores).
        timeout_s: how long a transfer may wait for its turn, for those before it, and for each chunk beyond
            `inflight_bytes`.
    """

    chunk_bytes: int = 32 << 20
    mapped_chunk_bytes: int = 128 << 20
    stages: int = 3
    inflight_bytes: int = 256 << 20
    multiprocessors: int = 16
    mapped_multiprocessors: int = 2
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """Blocks on their way. Keeps what the GPU still reads or writes alive until its event has passed."""

    bytes: int
    _device: Device
    _event: Any
    _kept: tuple[object, ...]
    _checksums: tuple[NDArray[np.uint64], ...] | None

    def done(self) -> bool:
        return self._device.passed(self._event)

    def wait(self, timeout_s: float) -> None:
        """Until the bytes are where they belong. Raises DmaTimeout: they may still be moving."""
        wait_until(self._device, self._event, time.monotonic() + timeout_s)

    def before(self, stream: int) -> None:
        """What is enqueued on the stream from now on runs after this transfer."""
        with self._device.used():  # the default streams' handles are the same on each device
            self._device.wait(stream, self._event)

    @property
    def checksums(self) -> NDArray[np.uint64]:
        """XXH3-64 of each block as it lies in the paged memory, 1 where that is 0; once `done`. uint64 (blocks,)."""
        if self._checksums is None:
            raise DmaError("this transfer was begun without checksums")
        return np.concatenate(self._checksums)


_never = threading.Event()


def wait_until(device: Device, event: Any, deadline: float) -> None:
    """Poll an event: no callback of the driver's ever takes the GIL, no thread is stuck in the driver."""
    began = time.monotonic()
    while not device.passed(event):
        now = time.monotonic()
        if now > deadline:
            raise DmaTimeout("the GPU has not ended a transfer in time")
        if now - began < _EAGER_S:
            time.sleep(0)  # noqa: TID251  # lets other threads have the GIL; the deadline is above
        else:
            _never.wait(_POLL_S)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One transfer's blocks.

    Attributes:
        hosts: where the slots begin, int64 (n,). seen: the same as the device sees them.
        regions: which pinned region each lies in.
        after: the stream to wait for, if any.
    """

    layout: Layout
    block_ids: Addresses
    hosts: Addresses
    seen: Addresses
    regions: Addresses
    strategy: Strategy
    checksums: bool
    after: int | None

    def __len__(self) -> int:
        return len(self.block_ids)


@dataclass(slots=True)
class _Stage:
    """What a chunk runs through: a stream for its kernels, device memory for its slots and its sums.

    Attributes:
        ended: behind the last use of `slots`. Chunks that use none leave it alone: they may overtake one that does.
    """

    stream: int
    ended: Any
    slots: Buffer | None = None
    sums: Buffer | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    """One chunk of a job: blocks `first` to `last - 1`, and device addresses of their ids and slots.

    Attributes:
        ring: int64 (blocks,), their places in the stage's memory, for STAGED.
        checksums: where they go on the device; 0: none are made.
        multiprocessors: that its kernel may use.
    """

    job: _Job
    first: int
    last: int
    stage: _Stage
    table: Table
    ids: int
    slots: int
    width: int
    ring: Addresses
    checksums: int
    multiprocessors: int

    @property
    def blocks(self) -> int:
        return self.last - self.first

    @property
    def inside(self) -> slice:
        return slice(self.first, self.last)

    @property
    def sums(self) -> int:
        return self.stage.sums.address if self.job.checksums and self.stage.sums is not None else 0


@dataclass(slots=True)
class _Lane:
    """One direction: its stages, what is under way.

    Attributes:
        opening: the stream that brings what kernels are told. ending: the one behind which transfers end.
        copying: the one of the copy engine.
    """

    direction: Direction
    copying: int
    opening: int
    ending: int
    stages: list[_Stage]
    lock: threading.Lock = field(default_factory=threading.Lock)
    pending: deque[Transfer] = field(default_factory=deque)
    bounce: list[Buffer] = field(default_factory=list)
    holding: list[object] = field(default_factory=list)
    """Memory of transfers that were not enqueued to their end."""


class DmaEngine:
    """Moves blocks between one GPU's paged memory and host slots. May be used by several threads at once.

    Attributes:
        pinned: the host memory that the GPU reaches; slots outside it go through a pinned bounce buffer.
    """

    def __init__(self, device: Device, options: DmaOptions | None = None, tuning: Tuning | None = None) -> None:
        self._device = device
        self._tuning = tuning
        self._options = options or DmaOptions()
        self.pinned = PinnedRegions(device)
        with device.used():
            self._lanes = {direction: self._lane(direction) for direction in Direction}

    def load(
        self,
        layout: Layout,
        block_ids: Addresses,
        slots: Addresses,
        *,
        strategy: Strategy | None = None,
        after: int | None = None,
        checksums: bool = False,
    ) -> Transfer:
        """Slots to paged memory.

        Args:
            block_ids: int64 (n,), each at most once.
            slots: int64 (n,), the host address of each block's slot.
            strategy: None chooses.
            after: the stream that last used the blocks, by handle; None: nobody uses them.
            checksums: also hash the blocks as they come to lie in the paged memory.
        Raises:
            DmaError: refused, or failed and stopped, or others did not let go of the engine in time. DmaTimeout: bytes
                may still be moving.
        """
        return self._run(Direction.LOAD, layout, block_ids, slots, strategy, after, checksums)

    def store(
        self,
        layout: Layout,
        block_ids: Addresses,
        slots: Addresses,
        *,
        strategy: Strategy | None = None,
        after: int | None = None,
        checksums: bool = False,
    ) -> Transfer:
        """Paged memory to slots; as `load`, with `after` the stream that writes the blocks. Ids may repeat."""
        return self._run(Direction.STORE, layout, block_ids, slots, strategy, after, checksums)

    def load_parts(
        self,
        layout: Layout,
        block_ids: Addresses,
        slots: Addresses,
        bounds: Sequence[int],
        *,
        strategy: Strategy | None = None,
        after: int | None = None,
    ) -> list[Transfer]:
        """As `load`, segments ``bounds[i]`` to ``bounds[i + 1] - 1`` of all blocks before the next ones.

        For engines that begin to compute a layer when its part is there: a transfer a part, in order.
        """
        parts = [(layout.part(first, last), layout.offsets[first]) for first, last in itertools.pairwise(bounds)]
        return [self.load(part, block_ids, slots + offset, strategy=strategy, after=after) for part, offset in parts]

    def close(self, timeout_s: float) -> None:
        """Wait for what is under way, then let go of all memory.

        Raises DmaTimeout, and DmaError where others do not let go of the engine; what may be moving has its memory.
        """
        deadline = time.monotonic() + timeout_s
        for lane in self._lanes.values():
            with _taken(lane, deadline), self._device.used():
                self._drain(lane, deadline)
                lane.pending.clear()
                lane.bounce.clear()
                for stage in lane.stages:
                    stage.slots = stage.sums = None
        self.pinned.close(max(0.0, deadline - time.monotonic()))

    def choose(self, layout: Layout, blocks: int, direction: Direction) -> Strategy:
        """The strategy for so many blocks: the fastest where that was measured, else by rules."""
        moved = blocks * layout.block_bytes
        if self._tuning is not None:
            measured = self._tuning.choose(direction, layout.block_bytes // layout.segments, moved)
            if measured is not None:
                return measured
        if int(layout.sizes.min()) >= DMA_SEGMENT_BYTES_MIN:
            return Strategy.DMA
        if direction is Direction.LOAD and moved <= MAPPED_BYTES_MAX:
            return Strategy.MAPPED
        return Strategy.STAGED

    # --- one transfer -------------------------------------------------------------------------------------------

    def _run(
        self,
        direction: Direction,
        layout: Layout,
        block_ids: Addresses,
        slots: Addresses,
        strategy: Strategy | None,
        after: int | None,
        checksums: bool,
    ) -> Transfer:
        if len(block_ids) != len(slots) or not len(slots):
            raise DmaError(f"{len(block_ids)} block ids for {len(slots)} slots")
        if checksums and layout.block_bytes < CHECKSUM_BLOCK_BYTES_MIN:
            raise DmaError(f"blocks of {layout.block_bytes} bytes are too small for a checksum on the GPU")
        lane = self._lanes[direction]
        ids, hosts = (np.ascontiguousarray(column, np.int64) for column in (block_ids, slots))
        with _taken(lane, self._deadline()), self._device.used():
            seen = self.pinned.device_addresses(hosts, layout.block_bytes)
            regions = self.pinned.region_of(hosts)
            chosen = strategy or self.choose(layout, len(hosts), direction)
            job = _Job(layout, ids, hosts, hosts if seen is None else seen, regions, chosen, checksums, after)
            try:
                while lane.pending and lane.pending[0].done():
                    lane.pending.popleft()
                transfer = self._enqueue(lane, job) if seen is not None else self._bounced(lane, job)
            except DmaTimeout:
                self._leave(lane, after)
                raise
            except Exception as error:
                self._stop(lane, after)
                raise DmaError(f"{direction.value} failed: {type(error).__name__}: {error}") from error
            except BaseException:  # a signal
                self._stop(lane, after)
                raise
            lane.pending.append(transfer)
            return transfer

    def _stop(self, lane: _Lane, after: int | None) -> None:
        """Wait for what a transfer had enqueued before it failed. Raises DmaTimeout where that may still be moving."""
        try:
            self._drain(lane, self._deadline())
        except DmaTimeout:
            self._leave(lane, after)
            raise

    def _leave(self, lane: _Lane, after: int | None) -> None:
        """A transfer may still be moving: keep what it uses.

        What comes on the caller's stream, or on the legacy default stream, waits for a load: who was told that it
        failed may compute the blocks.
        """
        lane.holding.append(lane.bounce)
        lane.bounce = []
        if lane.direction is Direction.LOAD:
            for stream in (lane.copying, *(stage.stream for stage in lane.stages)):
                self._device.wait(after or 0, self._recorded(stream))

    def _enqueue(self, lane: _Lane, job: _Job) -> Transfer:
        layout, count = job.layout, len(job)
        pitch = _rounded(layout.block_bytes)
        most, per_chunk = self._chunks(job, pitch)
        self._grow(lane, job, most)
        side_by_side = lane.stages[:MAPPED_STAGES] if job.strategy is Strategy.MAPPED else lane.stages
        stages = [side_by_side[index % len(side_by_side)] for index in range(-(-count // per_chunk))]
        ring, seen = np.zeros(0, np.int64), job.seen
        if job.strategy is Strategy.STAGED:
            places = np.arange(per_chunk, dtype=np.int64) * pitch
            bases = [stage.slots.address for stage in stages if stage.slots is not None]
            ring = seen = np.concatenate([base + places for base in bases])[:count]
        used = stages[: len(side_by_side)]
        address, kept = self._opened(lane, job, used, (job.block_ids, seen, layout.packed()))
        hashes, results = self._results(count if job.checksums else 0)
        held = len(lane.holding)
        lane.holding.append((kept, hashes, results))
        table, width = Table(address + 16 * count, layout), min(layout.alignment, alignment_of(seen))
        share = self._multiprocessors(job)
        window: deque[tuple[Any, int]] = deque()
        for index, stage in enumerate(stages):
            first, last = index * per_chunk, min((index + 1) * per_chunk, count)
            ids = address + 8 * first
            sums = 0 if hashes is None else hashes.address + 8 * first
            run = _Run(job, first, last, stage, table, ids, ids + 8 * count, width, ring[first:last], sums, share)
            window.append((_STEPS[job.strategy](self, lane, run), run.blocks * layout.block_bytes))
            self._keep_in_flight(window)
        transfer = self._ended(lane, job, used, hashes, results, kept)
        del lane.holding[held:]
        return transfer

    def _multiprocessors(self, job: _Job) -> int:
        """How many one kernel may use; 0: all."""
        options = self._options
        if job.strategy is not Strategy.MAPPED:
            return options.multiprocessors
        both = options.mapped_multiprocessors * (2 if job.checksums else 1)
        return -(-both // min(MAPPED_STAGES, options.stages))

    def _chunks(self, job: _Job, pitch: int) -> tuple[int, int]:
        """How many blocks a chunk has at most, and has in this job."""
        options = self._options
        most = options.mapped_chunk_bytes if job.strategy is Strategy.MAPPED else options.chunk_bytes
        wanted = max(len(job) * pitch // CHUNKS, SMALL_CHUNK_BYTES)
        return max(1, most // pitch), max(1, min(most, wanted) // pitch)

    def _opened(
        self, lane: _Lane, job: _Job, used: Sequence[_Stage], columns: Sequence[Addresses]
    ) -> tuple[int, tuple[object, ...]]:
        """Bring to the device what kernels are told, and let the streams begin behind it and behind `after`.

        Returns its address, and what to keep; copies by the copy engine alone need nothing.
        """
        device = self._device
        address = 0
        kept: tuple[object, ...] = ()
        before = [] if job.after is None else [self._recorded(job.after)]
        if job.strategy is not Strategy.DMA or job.checksums:
            address, kept = self._upload(lane, columns)
            before.append(self._recorded(lane.opening))
        streams = [stage.stream for stage in used]
        if job.strategy is Strategy.DMA:  # otherwise copies touch the ring, and kernels the engine's blocks
            streams.append(lane.copying)
        for stream in streams:
            for event in before:
                device.wait(stream, event)
        return address, kept

    def _ended(
        self,
        lane: _Lane,
        job: _Job,
        used: Sequence[_Stage],
        hashes: Buffer | None,
        results: Buffer | None,
        kept: tuple[object, ...],
    ) -> Transfer:
        """One event behind everything that the transfer enqueued."""
        for stream in (lane.copying, *(stage.stream for stage in used)):
            self._device.wait(lane.ending, self._recorded(stream))
        checksums = None
        if hashes is not None and results is not None and results.view is not None:
            self._copy_one(results.address, hashes.address, results.size, Direction.STORE, lane.ending)
            checksums = (results.view.view(np.uint64),)
        end = self._recorded(lane.ending)
        keep = (*kept, hashes, results)
        return Transfer(len(job) * job.layout.block_bytes, self._device, end, keep, checksums)

    def _keep_in_flight(self, window: deque[tuple[Any, int]]) -> None:
        """Wait until no more is enqueued than may be."""
        while len(window) > 1 and sum(size for _, size in window) > self._options.inflight_bytes:
            oldest, _ = window.popleft()
            wait_until(self._device, oldest, self._deadline())

    # --- one chunk, by strategy; each returns an event behind its bytes -------------------------------------------

    def _dma(self, lane: _Lane, run: _Run) -> Any:
        device, job, stage = self._device, run.job, run.stage
        places = (job.block_ids[run.inside], job.hosts[run.inside], job.regions[run.inside])
        paged, hosts, sizes = of_segments(job.layout, *places)
        sides = (paged, hosts) if lane.direction is Direction.LOAD else (hosts, paged)
        device.copy(*sides, sizes, lane.direction, lane.copying)
        ended = self._recorded(lane.copying)
        if job.checksums:
            device.wait(stage.stream, ended)
            device.kernels.read(
                run.table,
                run.ids,
                run.blocks,
                width=job.layout.alignment,
                sums=run.sums,
                stream=stage.stream,
                multiprocessors=run.multiprocessors,
            )
            self._finish(run)
        return ended

    def _staged(self, lane: _Lane, run: _Run) -> Any:
        device, job, stage = self._device, run.job, run.stage
        sizes = np.full(run.blocks, job.layout.block_bytes, np.int64)
        ring, hosts, sizes = merged(run.ring, job.hosts[run.inside], sizes, job.regions[run.inside])
        if lane.direction is Direction.LOAD:
            if not device.passed(stage.ended):
                device.wait(lane.copying, stage.ended)
            device.copy(ring, hosts, sizes, lane.direction, lane.copying)
            device.wait(stage.stream, self._recorded(lane.copying))
            stage.ended = self._mapped(lane, run)
        else:
            if not device.passed(stage.ended):
                device.wait(stage.stream, stage.ended)
            self._kernel(lane, run)
            device.wait(lane.copying, self._recorded(stage.stream))
            device.copy(hosts, ring, sizes, lane.direction, lane.copying)
            stage.ended = self._recorded(lane.copying)
            self._finish(run)
        return stage.ended

    def _mapped(self, lane: _Lane, run: _Run) -> Any:
        self._kernel(lane, run)
        self._finish(run)
        return self._recorded(run.stage.stream)

    def _kernel(self, lane: _Lane, run: _Run) -> None:
        kernels = self._device.kernels
        move = kernels.scatter if lane.direction is Direction.LOAD else kernels.gather
        move(
            run.table,
            run.ids,
            run.slots,
            run.blocks,
            width=run.width,
            sums=run.sums,
            stream=run.stage.stream,
            multiprocessors=run.multiprocessors,
        )

    def _finish(self, run: _Run) -> None:
        """Make the checksums of the sums, if there are any."""
        if run.checksums:
            self._device.kernels.finish(
                run.table, run.ids, run.blocks, sums=run.sums, checksums=run.checksums, stream=run.stage.stream
            )

    # --- host memory that is not pinned ---------------------------------------------------------------------------

    def _bounced(self, lane: _Lane, job: _Job) -> Transfer:
        """By way of two pinned buffers in turn; a store has ended when this returns."""
        size = _rounded(job.layout.block_bytes)
        per_buffer = max(1, self._options.chunk_bytes // size)
        while len(lane.bounce) < 2 or lane.bounce[0].size < per_buffer * size:
            for transfer in lane.pending:
                transfer.wait(self._options.timeout_s)
            lane.bounce = [self._device.pinned_memory(per_buffer * size) for _ in range(2)]
        parts: list[tuple[Transfer, Addresses, Addresses]] = []
        for index, first in enumerate(range(0, len(job), per_buffer)):
            inside = slice(first, first + per_buffer)
            hosts = job.hosts[inside]
            places = lane.bounce[index % 2].address + np.arange(len(hosts), dtype=np.int64) * size
            if index >= 2:
                self._settle(lane, job, parts[index - 2])
            if lane.direction is Direction.LOAD:
                _copy_on_cpu(places, hosts, job.layout.block_bytes)
            ids, regions = job.block_ids[inside], np.zeros(len(hosts), np.int64)
            part = replace(job, block_ids=ids, hosts=places, seen=places, regions=regions)
            parts.append((self._enqueue(lane, part), places, hosts))
            lane.pending.append(parts[-1][0])
        for settled in parts[-2:]:
            self._settle(lane, job, settled)
        sums = [part._checksums[0] for part, _, _ in parts if part._checksums is not None]
        kept = tuple(part for part, _, _ in parts)
        last = parts[-1][0]
        return replace(last, bytes=len(job) * job.layout.block_bytes, _kept=kept, _checksums=tuple(sums) or None)

    def _settle(self, lane: _Lane, job: _Job, part: tuple[Transfer, Addresses, Addresses]) -> None:
        """Wait for what uses a bounce buffer; what was stored goes on to its slots."""
        transfer, places, hosts = part
        transfer.wait(self._options.timeout_s)
        if lane.direction is Direction.STORE:
            _copy_on_cpu(hosts, places, job.layout.block_bytes)

    # --- streams, events, memory ----------------------------------------------------------------------------------

    def _lane(self, direction: Direction) -> _Lane:
        device = self._device
        urgent = direction is Direction.LOAD
        # Kernels that overtook the inference engine's cost it up to 9 % of a matmul beside them on an H200.
        stages = [_Stage(device.stream(urgent=False), device.event()) for _ in range(self._options.stages)]
        copying, opening, ending = (device.stream(urgent=urgent) for _ in range(3))
        return _Lane(direction, copying, opening, ending, stages)

    def _grow(self, lane: _Lane, job: _Job, per_chunk: int) -> None:
        """Make the stages large enough for a job's chunks; one that is replaced was used up first."""
        slots = per_chunk * _rounded(job.layout.block_bytes) if job.strategy is Strategy.STAGED else 0
        sums = per_chunk * sums_of(job.layout.block_bytes) * _SUM_ROW_BYTES if job.checksums else 0
        for stage in lane.stages:
            if slots > _size(stage.slots) or sums > _size(stage.sums):
                for event in (stage.ended, self._recorded(stage.stream)):
                    wait_until(self._device, event, self._deadline())
            if slots > _size(stage.slots):
                stage.slots = self._device.device_memory(slots)
            if sums > _size(stage.sums):
                stage.sums = self._device.device_memory(sums)

    def _upload(self, lane: _Lane, columns: Sequence[Addresses]) -> tuple[int, tuple[object, ...]]:
        """Numbers for the kernels, one column behind the other; returns their address and what to keep."""
        numbers = np.concatenate(columns)
        source, target = self._device.pinned_memory(numbers.nbytes), self._device.device_memory(numbers.nbytes)
        assert source.view is not None
        source.view[:] = numbers.view(np.uint8)
        self._copy_one(target.address, source.address, numbers.nbytes, Direction.LOAD, lane.opening)
        return target.address, (source, target)

    def _results(self, count: int) -> tuple[Buffer | None, Buffer | None]:
        """Where `count` checksums are made, and where they are told."""
        if not count:
            return None, None
        return self._device.device_memory(8 * count), self._device.pinned_memory(8 * count)

    def _copy_one(self, target: int, source: int, size: int, direction: Direction, stream: int) -> None:
        targets, sources, sizes = (np.array([number], np.int64) for number in (target, source, size))
        self._device.copy(targets, sources, sizes, direction, stream)

    def _recorded(self, stream: int) -> Any:
        event = self._device.event()
        self._device.record(event, stream)
        return event

    def _drain(self, lane: _Lane, deadline: float) -> None:
        """What was enqueued must end before its memory is let go of."""
        try:
            for stream in (lane.copying, lane.opening, lane.ending, *(stage.stream for stage in lane.stages)):
                wait_until(self._device, self._recorded(stream), deadline)
        except DmaTimeout:
            raise
        except Exception as error:  # the context is lost, and nothing moves any more
            raise DmaError(f"the GPU is lost: {error}") from error
        lane.holding.clear()

    def _deadline(self) -> float:
        return time.monotonic() + self._options.timeout_s


@contextmanager
def _taken(lane: _Lane, deadline: float) -> Iterator[None]:
    """Have a direction to oneself. Raises DmaError: one of those before waits for the GPU for longer."""
    if not lane.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise DmaError("other transfers wait for the GPU")
    try:
        yield
    finally:
        lane.lock.release()


_Step: TypeAlias = Callable[[DmaEngine, _Lane, _Run], Any]
_STEPS: dict[Strategy, _Step] = {
    Strategy.DMA: DmaEngine._dma,
    Strategy.STAGED: DmaEngine._staged,
    Strategy.MAPPED: DmaEngine._mapped,
}


def _size(buffer: Buffer | None) -> int:
    return 0 if buffer is None else buffer.size


def _rounded(size: int) -> int:
    return -(-size // _RING_ALIGNMENT) * _RING_ALIGNMENT


def _copy_on_cpu(targets: Addresses, sources: Addresses, size: int) -> None:
    for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
        ctypes.memmove(target, source, size)
