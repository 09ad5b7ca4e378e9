"""Layouts: where the segments of each block lie in a paged memory, as the kernels are told.

Segment s of block b is ``sizes[s]`` bytes at ``bases[s] + b * strides[s]`` and lies in a slot at ``offsets[s]``, the
sum of the sizes before it. Addresses are plain numbers, of device or of host memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

WIDTHS = (16, 4, 1)
"""Bytes of one access of a kernel."""

CHECKSUM_BLOCK_BYTES_MIN = 241
"""XXH3 hashes shorter inputs by other rules, which the kernels do not have."""

BLOCK_BYTES_MAX = (1 << 32) - 4096
"""Positions in a block are 32 bits wide, and a tile may begin just below its end."""

_STRIPE_BYTES = 64
_SUM_BYTES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Segments of the blocks of one paged memory; immutable.

    Attributes:
        bases, strides, sizes: int64 (segments,), bytes.
        offsets: int64 (segments + 1,); the last one is `block_bytes`.
        alignment: the widest access, of `WIDTHS`, that fits every address and size.
    """

    bases: Integers
    strides: Integers
    sizes: Integers
    offsets: Integers
    block_bytes: int
    alignment: int

    @classmethod
    def of(cls, bases: Integers, strides: Integers, sizes: Integers) -> Layout:
        """Raises ValueError: no segments, different counts, or a block too large to address."""
        columns = [np.ascontiguousarray(column, np.int64) for column in (bases, strides, sizes)]
        if len({len(column) for column in columns}) != 1 or not len(columns[2]) or int(columns[2].min()) < 1:
            raise ValueError("a layout has one base, stride and positive size for each of its segments")
        offsets = np.concatenate(([0], np.cumsum(columns[2])))
        if int(offsets[-1]) > BLOCK_BYTES_MAX:
            raise ValueError(f"blocks of more than {BLOCK_BYTES_MAX} bytes")
        alignment = alignment_of(np.concatenate(columns))
        return cls(columns[0], columns[1], columns[2], offsets, int(offsets[-1]), alignment)

    @property
    def segments(self) -> int:
        return len(self.sizes)

    @property
    def segment_bytes(self) -> int:
        """Of every segment; 0 where they differ."""
        return int(self.sizes[0]) if int(self.sizes.min()) == int(self.sizes.max()) else 0

    def part(self, first: int, last: int) -> Layout:
        """Segments `first` to `last - 1` alone: what lies in a slot from ``offsets[first]`` on."""
        return Layout.of(self.bases[first:last], self.strides[first:last], self.sizes[first:last])

    def packed(self) -> Integers:
        """What the kernels read: bases, strides, offsets; int64 (3 * segments + 1,)."""
        return np.concatenate((self.bases, self.strides, self.offsets))


class Table(NamedTuple):
    """A layout and the address, for whoever runs the kernels, of its `packed` form."""

    address: int
    layout: Layout


def alignment_of(numbers: Integers) -> int:
    """The widest access, of `WIDTHS`, that divides each of these addresses, strides or sizes."""
    odd = int(np.bitwise_or.reduce(np.abs(numbers), initial=0))
    return next(width for width in WIDTHS if odd % width == 0)


def sums_of(block_bytes: int) -> int:
    """How many sums the checksum of a block is made of, 64 bytes each."""
    return (block_bytes - 1) // _SUM_BYTES + 1


def summed_stripes(block_bytes: int) -> int:
    """How many stripes of 64 bytes are summed; the last 64 bytes of a block are taken once more, apart."""
    return (block_bytes - 1) // _STRIPE_BYTES
