"""Cases of the kernels' contract: layouts, ids and slots as hypothesis draws them, no two of their bytes shared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from forebay.kernels.layout import CHECKSUM_BLOCK_BYTES_MIN, Integers, Layout

SEGMENTS_MAX = 100
SEGMENT_BYTES_MAX = 40 << 10
BLOCK_BYTES_MAX = 96 << 10
PAGED_BLOCKS_MAX = 6
SLOTS_MAX = 13
GUARD_BYTES = 64


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a kernel. Bases and slots count from the start of their memory, which is a multiple of 64.

    Attributes:
        bases, strides, sizes: int64 (segments,), bytes.
        block_ids, slots: one for each block.
        width: bytes of one access; divides all of the above.
        multiprocessors: the limit that the call names; 0: none.
        seed: of the bytes on both sides.
    """

    bases: Integers
    strides: Integers
    sizes: Integers
    paged_bytes: int
    slots_bytes: int
    block_ids: list[int]
    slots: list[int]
    width: int
    multiprocessors: int
    seed: int

    @property
    def block_bytes(self) -> int:
        return int(self.sizes.sum())

    def at(self, address: int) -> Layout:
        """The layout where the paged memory lies."""
        return Layout.of(self.bases + address, self.strides, self.sizes)

    def pieces(self, block: int) -> list[tuple[int, int]]:
        """Where a block's bytes lie in the paged memory, in their order: (first, last + 1)."""
        starts = (self.bases + block * self.strides).tolist()
        return [(start, start + size) for start, size in zip(starts, self.sizes.tolist(), strict=True)]


@st.composite
def cases(draw: DrawFn, width: int, *, unique: bool = False, checksummed: bool = False) -> Case:
    """
    Args:
        width: bytes of one access, which all drawn addresses and sizes are multiples of.
        unique: no block id comes twice, as `scatter` asks.
        checksummed: blocks are large enough for a checksum.
    """
    sizes = draw(_sizes(width))
    if checksummed and sum(sizes) < CHECKSUM_BLOCK_BYTES_MIN:
        sizes += [width * draw(st.integers(256 // width, 1024 // width))]
    paged_blocks = draw(st.integers(1, PAGED_BLOCKS_MAX))
    bases, strides, paged_bytes = draw(_places(sizes, paged_blocks, width))
    if unique:
        order = draw(st.permutations(range(paged_blocks)))
        block_ids = list(order[: draw(st.integers(1, paged_blocks))])
    else:
        count = draw(st.integers(1, SLOTS_MAX))
        block_ids = draw(st.lists(st.integers(0, paged_blocks - 1), min_size=count, max_size=count))
    slots, slots_bytes = draw(_slots(sum(sizes), len(block_ids), width))
    return Case(
        *(np.array(column, np.int64) for column in (bases, strides, sizes)),
        paged_bytes,
        slots_bytes,
        block_ids,
        slots,
        width,
        draw(st.sampled_from([0, 1, 2, 1000])),
        draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def _sizes(draw: DrawFn, width: int) -> list[int]:
    """1 to 100 segments of one size or of several, cut off where a block would outgrow the test."""
    count = draw(st.sampled_from([1, 2, 3, 5, 16, 64, SEGMENTS_MAX]))
    largest = SEGMENT_BYTES_MAX // width
    most = draw(st.sampled_from([1, 5, 64, min(2048, largest), largest]))
    size = st.integers(1, most)
    if draw(st.booleans()):
        drawn = [draw(size)] * count
    else:
        drawn = draw(st.lists(size, min_size=count, max_size=count))
    sizes = [units * width for units in drawn]
    kept = int(np.searchsorted(np.cumsum(sizes), BLOCK_BYTES_MAX, side="right"))
    return sizes[: max(1, kept)]


@st.composite
def _places(draw: DrawFn, sizes: list[int], blocks: int, unit: int) -> tuple[list[int], list[int], int]:
    """Bases and strides: segments in groups, each group with a region of its own, segments and groups in any order.

    One group: whole blocks side by side. A group a segment: layers one after the other. Some regions run backwards.
    """
    gaps = _gaps(unit)
    order = draw(st.permutations(range(len(sizes))))
    groups = draw(st.integers(1, len(sizes)))
    bases, strides = [0] * len(sizes), [0] * len(sizes)
    end = GUARD_BYTES + draw(gaps)
    for members in (order[group::groups] for group in range(groups)):
        inner, pitch = {}, 0
        gap = draw(gaps)
        for segment in members:
            inner[segment] = pitch
            pitch += sizes[segment] + gap
        backwards = draw(st.booleans())
        for segment in members:
            bases[segment] = end + inner[segment] + (pitch * (blocks - 1) if backwards else 0)
            strides[segment] = -pitch if backwards else pitch
        end += pitch * blocks + draw(gaps)
    return bases, strides, end + GUARD_BYTES


@st.composite
def _slots(draw: DrawFn, block_bytes: int, count: int, unit: int) -> tuple[list[int], int]:
    """Slots side by side or apart, in any order."""
    pitch = block_bytes + draw(_gaps(unit))
    first = GUARD_BYTES + draw(_gaps(unit))
    places = draw(st.permutations(range(count)))
    return [first + place * pitch for place in places], first + count * pitch + GUARD_BYTES


def _gaps(unit: int) -> SearchStrategy[int]:
    return st.sampled_from([0, unit, 3 * unit, 5 * unit, 64 * unit])


def line(block_bytes: int, width: int, *, blocks: int = 1, seed: int = 0) -> Case:
    """Blocks of one segment, side by side on both sides; as oddly placed as the width allows."""
    first = GUARD_BYTES + width
    return Case(
        np.array([first], np.int64),
        np.array([block_bytes], np.int64),
        np.array([block_bytes], np.int64),
        first + blocks * block_bytes + GUARD_BYTES,
        first + blocks * block_bytes + GUARD_BYTES,
        list(range(blocks)),
        [first + block * block_bytes for block in range(blocks)],
        width,
        0,
        seed,
    )


def layers(segments: int, segment_bytes: int) -> Case:
    """An engine's memory: a tensor for each segment, one after the other, of which two of four blocks are moved."""
    region = 4 * segment_bytes
    slots_bytes = GUARD_BYTES + 2 * segments * segment_bytes + GUARD_BYTES
    return Case(
        np.arange(segments, dtype=np.int64) * region + GUARD_BYTES,
        np.full(segments, segment_bytes, np.int64),
        np.full(segments, segment_bytes, np.int64),
        GUARD_BYTES + segments * region + GUARD_BYTES,
        slots_bytes,
        [2, 1],
        [GUARD_BYTES + segments * segment_bytes, GUARD_BYTES],
        16,
        0,
        segments,
    )
