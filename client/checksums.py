"""Checksums of blocks: xxh3_64 of a block's payload bytes, in slot order, 0 standing for "not known".

xxhash is imported when a checksum is first asked for: most engines never do, and should not pay for it. It hashes 9 to
16 GB/s of segments of 8 to 64 KiB, more than a copy moves (5 GB/s of segments of 1 KiB, where the loop is what costs).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay.client.segments import Addresses, SegmentTable, raw_array

Checksums = NDArray[np.uint64]


def of_paged(table: SegmentTable, block_ids: Addresses) -> Checksums:
    """The checksum of each block as it lies in an engine's memory, its segments in order; uint64 (n,).

    Blocking: yes, at memory speed. The GIL is released for each large segment.
    """
    import xxhash

    rows = table.rows
    if len(rows) == 1:
        whole = rows[0]
        return _known((xxhash.xxh3_64_intdigest(whole[block]) for block in block_ids.tolist()), len(block_ids))
    sums = []
    for block in block_ids.tolist():
        running = xxhash.xxh3_64()
        for row in rows:
            running.update(row[block])
        sums.append(running.intdigest())
    return _known(sums, len(block_ids))


def of_slots(addresses: Addresses, block_bytes: int) -> Checksums:
    """The checksum of the block in each slot; the caller keeps the slabs mapped. uint64 (n,). Blocking: as above."""
    import xxhash

    # Any: before Python 3.12 an array's type does not say that it is a buffer.
    slots: Iterator[Any] = (raw_array(address, (block_bytes,), (1,), 1) for address in addresses.tolist())
    return _known((xxhash.xxh3_64_intdigest(slot) for slot in slots), len(addresses))


def _known(sums: Iterable[int], count: int) -> Checksums:
    """0 is taken: it says that a checksum is not known."""
    out = np.fromiter(sums, np.uint64, count)
    out[out == 0] = 1
    return out
