"""A GPU's memory and the host's as a GPU sees it, for the kernels' contract (tests/kernels/memories.py)."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from tests.kernels.memories import ALIGNMENT, Bytes, Region


class DeviceRegion:
    def __init__(self, cupy: Any, content: Bytes) -> None:
        self._cupy, self._size = cupy, len(content)
        self._memory = cupy.cuda.alloc(len(content))
        self.address = int(self._memory.ptr)
        assert self.address % ALIGNMENT == 0
        source = np.ascontiguousarray(content)
        cupy.cuda.runtime.memcpy(self.address, source.ctypes.data, self._size, cupy.cuda.runtime.memcpyHostToDevice)

    def read(self) -> Bytes:
        found = np.empty(self._size, np.uint8)
        kind = self._cupy.cuda.runtime.memcpyDeviceToHost
        self._cupy.cuda.runtime.memcpy(found.ctypes.data, self.address, self._size, kind)
        return found


class DeviceMemory:
    """The device's own memory."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy

    def place(self, content: Bytes) -> Region:
        return DeviceRegion(self._cupy, content)

    def synchronize(self) -> None:
        self._cupy.cuda.runtime.deviceSynchronize()


class MappedRegion:
    def __init__(self, cupy: Any, content: Bytes) -> None:
        self._runtime, self._size = cupy.cuda.runtime, len(content)
        self._host = self._runtime.hostAlloc(len(content), self._runtime.hostAllocMapped)
        self.address = int(self._runtime.pointerGetAttributes(self._host).devicePointer)
        assert self.address % ALIGNMENT == 0
        self._view()[:] = content

    def __del__(self) -> None:
        self._runtime.freeHost(self._host)

    def read(self) -> Bytes:
        return self._view().copy()

    def _view(self) -> Bytes:
        return np.ctypeslib.as_array((ctypes.c_uint8 * self._size).from_address(self._host))


class MappedMemory(DeviceMemory):
    """Pinned memory of the host, read and written by the device across the link."""

    def place(self, content: Bytes) -> Region:
        return MappedRegion(self._cupy, content)
