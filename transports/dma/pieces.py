"""Pieces: the contiguous runs that a transfer is made of, as a copy engine wants them."""

from __future__ import annotations

import numpy as np

from forebay.kernels.layout import Layout
from forebay.transports.dma.device import Addresses

Pieces = tuple[Addresses, Addresses, Addresses]
"""Addresses on one side, on the other, and sizes; int64 (n,) each."""


def of_segments(layout: Layout, block_ids: Addresses, slots: Addresses, regions: Addresses) -> Pieces:
    """Each segment of each block: its paged address, its address in the slot, its size; neighbours merged.

    Args:
        regions: int64 (blocks,); slots with different numbers are not merged.
    """
    paged = (block_ids[:, None] * layout.strides + layout.bases).ravel()
    inside = (slots[:, None] + layout.offsets[:-1]).ravel()
    sizes = np.broadcast_to(layout.sizes, (len(slots), layout.segments)).ravel()
    return merged(paged, inside, sizes, np.repeat(regions, layout.segments))


def merged(left: Addresses, right: Addresses, sizes: Addresses, regions: Addresses) -> Pieces:
    """Join each piece that begins, on both sides and in the same region, where the one before it ends."""
    follows = (left[1:] == left[:-1] + sizes[:-1]) & (right[1:] == right[:-1] + sizes[:-1])
    follows &= regions[1:] == regions[:-1]
    starts = np.flatnonzero(np.concatenate(([True], ~follows)))
    return left[starts], right[starts], np.add.reduceat(sizes, starts)
