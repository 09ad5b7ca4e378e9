"""Where the contract's bytes lie: the host's memory here, a GPU's in tests/gpu."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
ALIGNMENT = 64


class Region(Protocol):
    """Bytes that stay where they are as long as this lives.

    Attributes:
        address: for the kernels; a multiple of `ALIGNMENT`.
    """

    address: int

    def read(self) -> Bytes:
        """A copy of what is there now."""


class Memory(Protocol):
    """A kind of memory that kernels reach."""

    def place(self, content: Bytes) -> Region: ...

    def synchronize(self) -> None:
        """Wait until every kernel that was started has ended."""


class HostRegion:
    def __init__(self, content: Bytes) -> None:
        self._memory = np.empty(len(content) + ALIGNMENT, np.uint8)
        skipped = -self._memory.ctypes.data % ALIGNMENT
        self._view = self._memory[skipped : skipped + len(content)]
        self._view[:] = content
        self.address = self._view.ctypes.data

    def read(self) -> Bytes:
        return self._view.copy()


class HostMemory:
    """Plain memory of this process, for kernels that have ended when their call returns."""

    def place(self, content: Bytes) -> Region:
        return HostRegion(content)

    def synchronize(self) -> None:
        pass
