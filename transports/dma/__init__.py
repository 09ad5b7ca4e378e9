"""DMA streams: blocks between a GPU's paged memory and host slots, asynchronously and at link speed.

`DmaEngine` moves them in one of three ways (`Strategy`), on streams of its own, ordered by events after whoever wrote
the source and before whoever reads the destination. `PinnedRegions` makes the host's side reachable for the GPU.
"""

from forebay.transports.dma.device import Device, Direction
from forebay.transports.dma.engine import DmaEngine, DmaOptions, Transfer
from forebay.transports.dma.errors import DmaError, DmaTimeout
from forebay.transports.dma.pinned import PinnedRegions
from forebay.transports.dma.strategy import Strategy
from forebay.transports.dma.tuning import Tuning

__all__ = [
    "Device",
    "Direction",
    "DmaEngine",
    "DmaError",
    "DmaOptions",
    "DmaTimeout",
    "PinnedRegions",
    "Strategy",
    "Transfer",
    "Tuning",
]
