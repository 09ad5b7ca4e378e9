"""A GPU through cupy's runtime, and the driver's batched copy where it has one."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from forebay.kernels.cuda import CudaKernels
from forebay.transports.dma.device import Addresses, Buffer, Direction, Kernels
from forebay.transports.dma.errors import DmaError
from forebay.transports.paths import cache_directory

_REGISTER_PORTABLE, _REGISTER_MAPPED, _REGISTER_READ_ONLY = 1, 2, 8

_DESCRIPTORS_MAX = 4096
"""Pieces of one batched call: the driver's own limits are not documented, and others' callers cap theirs."""

_log = logging.getLogger("forebay.dma")


class CudaDevice:
    """See `forebay.transports.dma.device.Device`.

    Attributes:
        name: as the driver calls it. key: what tuning is kept under: name and driver version.
    """

    def __init__(self, index: int, cache: Path | None = None) -> None:
        """Raises DmaError where cupy, the driver or the device is missing or refuses."""
        try:
            import cupy

            self._cuda = cupy.cuda
            self._runtime = cupy.cuda.runtime
            self._index = index
            with self.used():
                self.kernels: Kernels = CudaKernels(cache or cache_directory())
        except Exception as error:
            raise DmaError(f"GPU {index} cannot be used: {type(error).__name__}: {error}") from error
        properties = self._runtime.getDeviceProperties(index)
        self.name: str = properties["name"].decode()
        self.key = f"{self.name}, driver {self._runtime.driverGetVersion()}"
        self._streams: dict[int, Any] = {}
        self._batch = _BatchedCopy.find()
        self._reads_only = bool(
            self._runtime.deviceGetAttribute(self._runtime.cudaDevAttrHostRegisterReadOnlySupported, index)
        )

    @contextmanager
    def used(self) -> Iterator[None]:
        before = self._runtime.getDevice()
        self._runtime.setDevice(self._index)  # also where it is current: a new thread has no context yet
        try:
            yield
        finally:
            if before != self._index:
                self._runtime.setDevice(before)

    def stream(self, *, urgent: bool) -> int:
        stream = self._cuda.Stream(non_blocking=True, priority=-1 if urgent else 0)
        self._streams[stream.ptr] = stream
        return int(stream.ptr)

    def event(self) -> Any:
        return self._cuda.Event(block=False, disable_timing=True)

    def record(self, event: Any, stream: int) -> None:
        self._runtime.eventRecord(event.ptr, stream)

    def wait(self, stream: int, event: Any) -> None:
        self._runtime.streamWaitEvent(stream, event.ptr, 0)

    def passed(self, event: Any) -> bool:
        return bool(event.done)

    def copy(self, targets: Addresses, sources: Addresses, sizes: Addresses, direction: Direction, stream: int) -> None:
        if self._batch is not None and len(sizes) > 1:
            for first in range(0, len(sizes), _DESCRIPTORS_MAX):
                part = slice(first, first + _DESCRIPTORS_MAX)
                self._batch.copy(targets[part], sources[part], sizes[part], direction, stream)
            return
        runtime = self._runtime
        kind = runtime.memcpyHostToDevice if direction is Direction.LOAD else runtime.memcpyDeviceToHost
        for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            runtime.memcpyAsync(target, source, size, kind, stream)

    def device_memory(self, size: int) -> Buffer:
        memory = self._cuda.alloc(size)
        return Buffer(int(memory.ptr), size, memory)

    def pinned_memory(self, size: int) -> Buffer:
        memory = self._cuda.alloc_pinned_memory(size)
        return Buffer(int(memory.ptr), size, memory, np.frombuffer(memory, np.uint8, size))

    def register(self, address: int, size: int, *, writable: bool) -> int:
        flags = _REGISTER_PORTABLE | _REGISTER_MAPPED
        if not writable:
            if not self._reads_only:
                raise DmaError("this GPU cannot map host memory that is read-only")
            flags |= _REGISTER_READ_ONLY
        try:
            self._runtime.hostRegister(address, size, flags)
        except self._runtime.CUDARuntimeError as error:
            raise DmaError(f"{size} bytes of host memory cannot be pinned: {error}") from error
        return int(self._runtime.pointerGetAttributes(address).devicePointer)

    def unregister(self, address: int) -> None:
        self._runtime.hostUnregister(address)


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes; the two locations are hints for managed memory only and stay 0."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_location", ctypes.c_int * 2),
        ("target_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


_ORDER_STREAM, _ORDER_ANY = 1, 3
_PREFER_OVERLAP = 1


class _BatchedCopy:
    """``cuMemcpyBatchAsync`` (CUDA 12.8): one call for many pieces. It refuses the legacy default stream."""

    def __init__(self, function: Any) -> None:
        self._function = function

    @classmethod
    def find(cls) -> _BatchedCopy | None:
        try:
            function = ctypes.CDLL("libcuda.so.1")["cuMemcpyBatchAsync"]
        except (OSError, AttributeError):
            _log.info("the driver has no batched copy: pieces are copied one by one")
            return None
        pointer, count = ctypes.c_void_p, ctypes.c_size_t
        function.argtypes = (pointer, pointer, pointer, count, pointer, pointer, count, pointer, pointer)
        function.restype = ctypes.c_int
        return cls(function)

    def copy(self, targets: Addresses, sources: Addresses, sizes: Addresses, direction: Direction, stream: int) -> None:
        # What the host wrote is complete when a load begins; a store's source is complete in stream order only.
        order = _ORDER_ANY if direction is Direction.LOAD else _ORDER_STREAM
        attributes = _Attributes(order, flags=_PREFER_OVERLAP)
        columns = [np.ascontiguousarray(column, np.uint64) for column in (targets, sources, sizes)]
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        status = self._function(
            *(column.ctypes.data for column in columns),
            len(sizes),
            ctypes.byref(attributes),
            ctypes.byref(first),
            1,
            ctypes.byref(failed),
            stream,
        )
        if status:
            raise DmaError(f"cuMemcpyBatchAsync: error {status}, piece {failed.value} of {len(sizes)}")
