"""The ways in which blocks are moved."""

from __future__ import annotations

import enum


class Strategy(enum.Enum):
    """How blocks are moved; what each does: `forebay.transports.dma.engine`."""

    DMA = "dma"
    STAGED = "staged"
    MAPPED = "mapped"
