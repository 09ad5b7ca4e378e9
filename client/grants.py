"""What an engine may hold between calls: leases to read in place, reservations to write in place.

Both clients hand out the same ones: giving back is a message that nobody waits for, so it needs no `await`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from forebay.client.core import Attachment, Filled, Grant, Held, holds_nothing
from forebay.client.loads import Progress
from forebay.client.namespaces import Namespace
from forebay.client.places import no_places
from forebay.client.results import BlockOutcome, StoreResult
from forebay.client.segments import Addresses, SegmentTable
from forebay.kvstore.errors import ForebayError, LayoutError
from forebay.transports.messages import AbortRequest, ReleaseRequest, Request


class Holder(Protocol):
    """The link a grant came over."""

    attachment: Attachment

    def progress(self, lease: int) -> Progress: ...

    def post(self, request: Request) -> bool: ...

    def leave(self) -> None: ...


class BaseLease:
    """Blocks that may be read in place until released; a context manager. True when it holds any.

    Blocks of slower tiers are held at once and read into memory meanwhile, in order: `ready` says how many may be
    read, `wait` waits for more. Where memory is the only tier all are ready from the start.

    Attributes:
        lease_id: what `resolve` takes in another session of the client group; 0 for none.
    """

    def __init__(self, held: Held, link: Holder | None, *, owned: bool) -> None:
        self.lease_id = held.lease
        self._places = held.places
        self._progress = held.progress
        self._owned = owned
        self._holder = link if held.lease else None

    def __len__(self) -> int:
        """Leading blocks held."""
        return len(self._places)

    @property
    def slots(self) -> list[int]:
        """Slot within its slab of each block."""
        return self._places.slots()

    def ready(self) -> int:
        """Leading blocks that may be read now; does not wait. 0 when the daemon died before all were ready."""
        if self._holder is not None and not self._progress.ended:
            try:
                self._progress = self._progress.merged(self._holder.progress(self.lease_id))
            except ForebayError:
                return 0
        return self._readable()

    def _readable(self) -> int:
        return min(self._progress.ready, len(self._places))

    def views(self) -> list[NDArray[np.uint8]]:
        """One read-only uint8 array (block_bytes,) per block, in shared memory.

        A view may be read after the lease has ended (the memory stays mapped) but its bytes may be another
        block's: whatever was read from it counts only if `valid` says so afterwards.
        """
        return self._places.views(writable=False)

    def valid(self) -> int:
        """How many leading blocks are still where they were; ask after reading. Costs no round trip.

        Blocks that neither the daemon's reply nor `ready` or `wait` said were ready are not counted.
        """
        return min(self._places.verified(), self._readable())

    def release(self) -> None:
        """End the lease; does not wait. Idempotent."""
        holder, self._holder = self._holder, None
        if holder is None:
            return
        if self._owned:
            holder.post(ReleaseRequest(self.lease_id))
        else:
            holder.attachment.loads.end(self.lease_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class BaseReservation:
    """Slots to write in place; a context manager that aborts what was not committed.

    While it is open its session is not closed, even when the daemon is given up: closing would let the daemon
    hand the slots to others while the caller still writes.

    Attributes:
        codes: one `BlockOutcome` a byte and hash; those STORED are to be written, in order.
    """

    def __init__(self, grant: Grant, link: Holder | None) -> None:
        """`link` was entered for this reservation, which leaves it when done."""
        self.reservation_id = grant.reservation
        self.codes = grant.codes
        self._grant = grant
        self._places = grant.places
        self._sums: NDArray[np.uint64] | None = None
        self._holder = link if grant.reservation else None
        if link is not None and self._holder is None:
            link.leave()

    @property
    def outcomes(self) -> tuple[BlockOutcome, ...]:
        return StoreResult(self.codes).outcomes

    def views(self) -> list[NDArray[np.uint8]]:
        """One writable uint8 array (block_bytes,) per block to write; not to be touched after commit or abort.

        Fewer than were granted when a slab could not be mapped: commit the rest as failed.
        """
        return self._places.views(writable=True)

    def _checked(self, source: SegmentTable, block_ids: Iterable[int]) -> Addresses:
        if source.block_bytes != self._places.block_bytes:
            raise LayoutError(f"blocks of {source.block_bytes} bytes; the slots hold {self._places.block_bytes}")
        return source.checked_ids(block_ids, self.codes.count(BlockOutcome.STORED))

    def _filled(self, filled: Filled | None, count: int) -> Sequence[int]:
        """Book what became of a copy into the slots. While bytes may still move, the holder is not let go of."""
        if filled is None:
            return range(count)
        if filled.moving:
            self._holder = None
        else:
            self._sums = filled.sums
        return filled.failed

    def abort(self) -> None:
        """Give the slots back; does not wait. Idempotent."""
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.post(AbortRequest(self.reservation_id))
            holder.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()


def nothing_held(ns: Namespace) -> Held:
    """What a lease of nothing holds."""
    return holds_nothing(ns.block_bytes)


def nothing_granted(ns: Namespace, count: int) -> Grant:
    """What a reservation that no daemon answered grants."""
    return Grant(0, bytes([BlockOutcome.UNAVAILABLE]) * count, no_places(ns.block_bytes))
