"""A copier for blocks in a GPU's memory: plans of device tables go through the device's `DmaEngine`.

Plans of host tables go to the copier of host memory. An engine is made with the first plan of its device: only then is
cupy imported. Slabs are pinned when a plan first touches them, in a thread of the engine's; until that has happened,
and where it is refused, the engine goes through a bounce buffer.

A slab is unpinned when nothing refers to its mapping any more: the session has let go of it and no lease, reservation
or plan holds it. A transfer's plan does, so nothing is unpinned under a transfer. What the garbage collector tells of
is only queued, and unpinned in a thread: it may come at any point of any thread.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from forebay.client import checksums
from forebay.client.copier import LEGACY_STREAM, Copier, CopyPlan, CopyTimeout, Pinned
from forebay.client.places import SlabMapping
from forebay.client.segments import SegmentTable
from forebay.kernels.layout import CHECKSUM_BLOCK_BYTES_MIN, Layout
from forebay.transports.dma import Direction, DmaEngine, DmaError, DmaTimeout, PinnedRegions, Transfer, tuning
from forebay.transports.paths import cache_directory

TIMEOUT_S = 30.0
"""How long a transfer may take; a store has 256 MiB at most."""

REST_S = 5.0
"""After a transfer that did not end in time, no other one is begun for this long: each would wait as long."""

CLOSE_S = 30.0

_log = logging.getLogger("forebay.client")


def cuda_engine(device: int) -> DmaEngine:
    """An engine for the CUDA device of that index, with what was measured of it, if anything was.

    Raises DmaError where cupy, the driver or the device is missing.
    """
    if importlib.util.find_spec("cupy") is None:
        raise DmaError("blocks in GPU memory need cupy: pip install 'forebay[cuda13]', for CUDA 12 'forebay[cuda12]'")
    from forebay.transports.dma.cuda_device import CudaDevice

    there = CudaDevice(device)
    return DmaEngine(there, tuning=tuning.load(cache_directory(), there.key))


@dataclass(slots=True, eq=False)
class _Side:
    """One device.

    Attributes:
        slabs: what was given to `engine.pinned`.
        moving: plans whose transfer did not end in time. Kept, and with them the memory that it may still use.
    """

    engine: DmaEngine
    slabs: weakref.WeakSet[SlabMapping] = field(default_factory=weakref.WeakSet)
    moving: list[tuple[CopyPlan, Transfer | None]] = field(default_factory=list)
    resting_until: float = 0.0


_Retired = tuple[PinnedRegions, int, object]
"""Where a slab was pinned, its address, and its memory: until it is unpinned nothing else is mapped at that address."""


class DeviceCopier:
    """A `Copier` for host and device memory; may be used by several threads at once.

    An error of the GPU or its driver fails the plan's blocks and is logged. Raises CopyTimeout where the bytes of a
    transfer may still be moving.
    """

    def __init__(
        self, host: Copier, engine_of: Callable[[int], DmaEngine] = cuda_engine, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._host = host
        self._engine_of = engine_of
        self._timeout_s = timeout_s
        self._lock: threading.Lock
        self._sides: dict[int, _Side | DmaError]
        self._layouts: weakref.WeakKeyDictionary[SegmentTable, Layout]
        self._retired: SimpleQueue[_Retired | None]
        self._unpinner: threading.Thread | None
        self._renew()
        _live.add(self)

    def gather(self, plan: CopyPlan) -> Sequence[int]:
        if plan.table.device is None:
            return self._host.gather(plan)
        return self._moved(plan, plan.table.device, Direction.STORE)

    def scatter(self, plan: CopyPlan) -> Sequence[int]:
        if plan.table.device is None:
            return self._host.scatter(plan)
        return self._moved(plan, plan.table.device, Direction.LOAD)

    def prepare(self, device: int) -> None:
        """Make the device's engine now. Raises DmaError where that cannot be; later calls raise it again."""
        self._side(device)

    def engines(self) -> dict[int, DmaEngine]:
        """The engines there are, by device."""
        with self._lock:
            return {device: side.engine for device, side in self._sides.items() if isinstance(side, _Side)}

    def pinned(self) -> Pinned:
        """As of now, over all devices."""
        told = [engine.pinned.status() for engine in self.engines().values()]
        return Pinned(sum(each.pinned for each in told), next((each.refused for each in told if each.refused), ""))

    def _moved(self, plan: CopyPlan, device: int, direction: Direction) -> Sequence[int]:
        if not len(plan.addresses):
            return ()
        try:
            side = self._side(device)
            if time.monotonic() < side.resting_until:
                raise DmaError("a transfer has not ended in time; others are not begun for a while")
            self._pin(side, plan)
            self._move(side, plan, direction)
        except DmaTimeout as error:
            raise CopyTimeout(f"CUDA device {device}: {error}") from error
        except Exception as error:  # noqa: BLE001  # also the driver's own, of a device that is lost: nothing moves
            _log.warning("%d blocks could not be copied: CUDA device %d: %s", len(plan.addresses), device, error)
            return range(len(plan.addresses))
        return ()

    def _move(self, side: _Side, plan: CopyPlan, direction: Direction) -> None:
        """Copy, wait, and tell the checksums if the plan asks for them."""
        layout, sums = self._layout(plan.table), plan.sums
        hashes = sums is not None and layout.block_bytes >= CHECKSUM_BLOCK_BYTES_MIN
        begin = side.engine.load if direction is Direction.LOAD else side.engine.store
        transfer = None
        try:
            transfer = begin(layout, plan.block_ids, plan.addresses, after=plan.stream, checksums=hashes)
            self._wait(transfer)
        except DmaTimeout:
            self._leave_moving(side, plan, transfer)
            if transfer is not None and direction is Direction.LOAD:  # who computes these blocks comes after it
                transfer.before(LEGACY_STREAM if plan.stream is None else plan.stream)
            raise
        if sums is not None:
            sums[:] = transfer.checksums if hashes else checksums.of_slots(plan.addresses, layout.block_bytes)

    def _wait(self, transfer: Transfer) -> None:
        """Until its bytes have moved. A signal too comes through only then: its caller gives both sides' memory away.

        Raises DmaTimeout, also where a signal came.
        """
        deadline = time.monotonic() + self._timeout_s
        try:
            transfer.wait(self._timeout_s)
        except Exception:
            raise
        except BaseException:
            transfer.wait(max(0.0, deadline - time.monotonic()))
            raise

    def _leave_moving(self, side: _Side, plan: CopyPlan, transfer: Transfer | None) -> None:
        with self._lock:
            side.resting_until = time.monotonic() + REST_S
            side.moving = [moving for moving in side.moving if moving[1] is None or not moving[1].done()]
            side.moving.append((plan, transfer))

    def _pin(self, side: _Side, plan: CopyPlan) -> None:
        """Have the plan's slabs pinned, those that were not given to the engine before."""
        for mapping in {owner for owner in plan.owners if isinstance(owner, SlabMapping)}:
            with self._lock:
                if mapping in side.slabs:
                    continue
                side.slabs.add(mapping)
            pinned, data = side.engine.pinned, mapping.data
            retire = weakref.finalize(mapping, self._retired.put, (pinned, mapping.address, data))
            retire.atexit = False
            pinned.add(mapping.address, data.nbytes, writable=mapping.writable, owner=data)

    def _layout(self, table: SegmentTable) -> Layout:
        """The table as the kernels are told it; made once."""
        with self._lock:
            layout = self._layouts.get(table)
            if layout is None:
                layout = self._layouts[table] = table.layout()
            return layout

    def _side(self, device: int) -> _Side:
        with self._lock:
            side = self._sides.get(device)
            if side is None:
                if self._unpinner is None:
                    arguments = (self._retired, self._sides)
                    unpinner = threading.Thread(target=_unpin, args=arguments, name="forebay-unpin", daemon=True)
                    unpinner.start()
                    self._unpinner = unpinner
                try:
                    side = _Side(self._engine_of(device))
                except DmaError as error:
                    side = error
                except Exception as error:  # noqa: BLE001  # cupy's and the driver's errors have no common type
                    side = DmaError(f"CUDA device {device} cannot be used: {type(error).__name__}: {error}")
                self._sides[device] = side
        if isinstance(side, DmaError):
            raise side.with_traceback(None)  # or it would grow with each who asks
        return side

    def _renew(self) -> None:
        """No engines yet: a new copier's state, and a forked child's, where the parent's streams are of no use."""
        self._lock = threading.Lock()
        self._sides = {}
        self._layouts = weakref.WeakKeyDictionary()
        self._retired = SimpleQueue()
        self._unpinner = None
        weakref.finalize(self, self._retired.put, None).atexit = False


def pinned_by(copier: Copier) -> Pinned:
    """What a copier's GPUs reach by themselves; nothing where it has none."""
    return copier.pinned() if isinstance(copier, DeviceCopier) else Pinned()


def _unpin(retired: SimpleQueue[_Retired | None], sides: dict[int, _Side | DmaError]) -> None:
    """Unpin slabs that nobody uses any more; in the end, when the copier is gone, close its engines."""
    while (told := retired.get()) is not None:
        pinned, address, memory = told
        try:
            pinned.remove(address)
        except Exception as error:  # noqa: BLE001  # the driver's own; the next slab may go better
            _log.warning("a slab could not be unpinned: %s", error)
        del told, memory  # or it would stay mapped until the next one comes
    for side in sides.values():
        if isinstance(side, _Side):
            try:
                side.engine.close(CLOSE_S)
            except Exception as error:  # noqa: BLE001  # likewise
                _log.warning("a DMA engine could not be closed: %s", error)
                _unclosed.append(side)


_live: weakref.WeakSet[DeviceCopier] = weakref.WeakSet()
_unclosed: list[_Side] = []
"""What a GPU may still use though its copier is gone."""

_inherited: list[object] = []
"""What a parent process had, kept so that nothing gives back its memory in the child."""


def _after_fork_in_child() -> None:
    for copier in list(_live):
        _inherited.append((copier._sides, copier._retired))
        copier._renew()


os.register_at_fork(after_in_child=_after_fork_in_child)
