"""Arrays that say they are a GPU's, over numpy memory: what `LateDevice` and the client need to meet."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from numpy.typing import NDArray

from forebay.transports.dma import DmaEngine, DmaOptions
from support.late_device import LateDevice


class CudaTensor:
    """What is read of a torch tensor on CUDA."""

    def __init__(self, memory: NDArray[Any], device: int = 0) -> None:
        self.memory = memory
        self.shape = memory.shape
        self.device = SimpleNamespace(type="cuda", index=device)

    def data_ptr(self) -> int:
        return int(self.memory.ctypes.data)

    def stride(self) -> tuple[int, ...]:
        return tuple(stride // self.memory.itemsize for stride in self.memory.strides)

    def element_size(self) -> int:
        return self.memory.itemsize


class CudaArray:
    """What is read of a cupy array."""

    def __init__(self, memory: NDArray[Any], device: int = 0, *, read_only: bool = False) -> None:
        self.memory = memory
        self.device = SimpleNamespace(id=device)
        self._read_only = read_only

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        contiguous = self.memory.flags.c_contiguous
        return {
            "shape": self.memory.shape,
            "typestr": self.memory.dtype.str,
            "data": (self.memory.ctypes.data, self._read_only),
            "strides": None if contiguous else self.memory.strides,
            "version": 3,
        }


class LateDevices:
    """A DMA engine over a `LateDevice` for whoever asks; `made` has them by index."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        self.devices: dict[int, LateDevice] = {}
        self.made: dict[int, DmaEngine] = {}
        self.on_made: Callable[[LateDevice], None] = lambda device: None
        self._seed = seed
        self._options = {"timeout_s": 5.0, **options}

    def __call__(self, index: int) -> DmaEngine:
        assert index not in self.made, "one engine a device"
        device = self.devices[index] = LateDevice(self._seed + index)
        self.on_made(device)
        engine = self.made[index] = DmaEngine(device, DmaOptions(**self._options))
        return engine
