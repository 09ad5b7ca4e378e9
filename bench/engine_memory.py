"""What stands for an engine: layouts, paged memory with scattered block ids, and chains of prefix hashes.

Block ids are shuffled, because an engine's pool hands out pages in no order; a benchmark over ids 0, 1, 2, ... would
measure one long copy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forebay.bench.bounds import Bytes, heap_array
from forebay.client import SegmentTable
from forebay.kvstore.namespace import NamespaceSpec

KIB = 1 << 10
HASH_BYTES = 32
_STRIDE_WORDS = 4096 // 8


@dataclass(frozen=True, slots=True)
class Layout:
    """Blocks of `segments` equal segments, in arrays that begin `past_bytes` past a page's start."""

    name: str
    block_bytes: int
    segments: int = 1
    past_bytes: int = 0

    @property
    def segment_bytes(self) -> int:
        return self.block_bytes // self.segments

    @property
    def spec(self) -> NamespaceSpec:
        return NamespaceSpec("bench", self.name, "uint8", 16, (self.segment_bytes,) * self.segments)


INDEX = Layout("index", 4 * KIB)
"""The smallest slots there are, for figures about metadata."""

PLAIN = (
    Layout("2mib", 2048 * KIB),
    Layout("512kib", 512 * KIB),
    Layout("64kib", 64 * KIB),
)
PAGED = Layout("paged", 2048 * KIB, 64)
"""32 layers, K and V apart, 16 tokens a block: 64 segments of 32 KiB."""

NUMPY_PAST_BYTES = 16
UNALIGNED = (
    Layout("paged_unaligned", 2048 * KIB, 64, NUMPY_PAST_BYTES),
    Layout("64kib_unaligned", 64 * KIB, 1, NUMPY_PAST_BYTES),
)
"""The same in arrays as numpy allocates them: some CPUs copy those, piece by piece, at half the rate.

Torch lets tensors begin at multiples of 64, which is as good as a page's start."""

BY_NAME = {layout.name: layout for layout in (INDEX, *PLAIN, PAGED, *UNALIGNED)}


class Pool:
    """An engine's KV memory: one array per segment, blocks on axis 0, touched.

    Attributes:
        table: what a client is given.
        block_ids: where the blocks of a transfer lie, in no order.
    """

    def __init__(self, layout: Layout, total_bytes: int) -> None:
        self.layout = layout
        self.blocks = total_bytes // layout.block_bytes
        pages = self.blocks * (2 if layout.segments > 1 else 1)
        self.heaps = [
            heap_array(pages * layout.segment_bytes, past_bytes=layout.past_bytes) for _ in range(layout.segments)
        ]
        self.arrays = [heap.reshape(pages, layout.segment_bytes) for heap in self.heaps]
        self.table = SegmentTable.of(self.arrays)
        ids = list(range(pages))
        random.Random(1).shuffle(ids)
        self.block_ids = np.array(ids[: self.blocks], np.int64)

    @property
    def total_bytes(self) -> int:
        return self.blocks * self.layout.block_bytes

    def mark(self, seed: int) -> None:
        """Write bytes that name their block, segment and page."""
        for array, words in zip(self.arrays, self._words(seed), strict=True):
            array.view(np.uint64)[self.block_ids, ::_STRIDE_WORDS] = words

    def wipe(self) -> None:
        for heap in self.heaps:
            heap[:] = 0

    def marked(self, seed: int) -> bool:
        """Whether the bytes are those of `mark`, one word in every page."""
        return all(
            bool((array.view(np.uint64)[self.block_ids, ::_STRIDE_WORDS] == words).all())
            for array, words in zip(self.arrays, self._words(seed), strict=True)
        )

    def _words(self, seed: int) -> list[NDArray[np.uint64]]:
        per_segment = -(-self.layout.segment_bytes // 4096)
        count = self.blocks * per_segment
        return [
            np.arange(count, dtype=np.uint64).reshape(self.blocks, per_segment) + np.uint64((seed << 48) + (s << 32))
            for s in range(self.layout.segments)
        ]


def chain(label: str, blocks: int) -> list[bytes]:
    """Hashes that the same label gives again in any process."""
    blob = random.Random(label).randbytes(HASH_BYTES * blocks)
    return [blob[start : start + HASH_BYTES] for start in range(0, len(blob), HASH_BYTES)]


def contiguous(pool: Pool) -> Bytes:
    """Heap for the bound of a pool's transfers: the pool's own where it is one piece."""
    return pool.heaps[0] if pool.layout.segments == 1 else heap_array(pool.total_bytes)
