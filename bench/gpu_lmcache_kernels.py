"""LMCache's compiled copy code, had from its unpacked wheel without its Python package.

Its library is built for a newer torch, whose Tensor has another layout than torch 2.11's: its functions that take
tensors crash there. Those that take addresses work; what it does with its other kernels is done here by launching them
from the library's own fat binaries, through the CUDA driver. Written for the wheel of LMCache 0.5.6.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import struct
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

_MAGIC = b"\x50\xed\x55\xba"
_HEADER = struct.Struct("<IHHQ")  # of a fat binary: magic, version, bytes of the header, bytes of the content


class Objects4(ctypes.Structure):
    """`MemoryObj4`: addresses of up to four chunks, which the block kernel takes by value (40 bytes)."""

    _fields_ = (("objects", ctypes.c_uint64 * 4), ("num_objects", ctypes.c_int))


class ShapeDesc(ctypes.Structure):
    """`PageBufferShapeDesc`, which the block kernel takes by value (32 bytes)."""

    NAMES: ClassVar = ("kv_size", "nl", "nb", "bs", "nh", "hs", "element_size", "block_stride_elems")
    _fields_ = tuple((name, ctypes.c_int) for name in NAMES)


def find_library(folder: Path) -> Path:
    """The folder with the compiled modules in an unpacked wheel. Raises FileNotFoundError."""
    inner = (folder / "lmcache").resolve()
    if not all(any(inner.glob(f"{name}*.so")) for name in ("cuda_ops", "lmcache_native")):
        raise FileNotFoundError(f"{folder} holds no lmcache/cuda_ops*.so and lmcache/lmcache_native*.so")
    return inner


def load_library(folder: Path) -> tuple[Any, Any]:
    """The modules `cuda_ops` and `lmcache_native` of an unpacked wheel. Raises FileNotFoundError, ImportError."""
    inner = find_library(folder)
    importlib.import_module("torch")  # whose libraries those of cuda_ops are linked with
    if "lmcache" not in sys.modules:
        package = types.ModuleType("lmcache")
        package.__path__ = [str(inner)]
        sys.modules["lmcache"] = package
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # torch 2.11 lacks one symbol, an error's constructor that is not called here
    try:
        native = importlib.import_module("lmcache.lmcache_native")
        return importlib.import_module("lmcache.cuda_ops"), native
    finally:
        sys.setdlopenflags(flags)


def fat_binaries(image: bytes) -> Iterator[bytes]:
    """The fat binaries in a library's file, headers included."""
    at = image.find(_MAGIC)
    while 0 <= at <= len(image) - _HEADER.size:
        _, version, header_bytes, content_bytes = _HEADER.unpack_from(image, at)
        if (version, header_bytes) == (1, _HEADER.size):
            yield image[at : at + _HEADER.size + content_bytes]
        at = image.find(_MAGIC, at + _HEADER.size)


class Kernels:
    """Finds kernels in a library's fat binaries and launches them. Raises RuntimeError where the driver refuses.

    Args:
        image: the library's file.
        driver: libcuda, as ctypes loads it.
    """

    def __init__(self, image: bytes, driver: Any) -> None:
        self._image, self._driver = image, driver
        self._binaries = [ctypes.create_string_buffer(binary) for binary in fat_binaries(image)]
        self._libraries = []
        for binary in self._binaries:
            library = ctypes.c_void_p()
            self._call("cuLibraryLoadData", ctypes.byref(library), binary, None, None, 0, None, None, 0)
            self._libraries.append(library)

    def find(self, part: str) -> ctypes.c_void_p:
        """The kernel whose mangled name contains `part`; the names stand in the library's read-only data."""
        names = set(re.findall(rb"\0(_ZN\w*" + part.encode() + rb"\w*)(?=\0)", self._image))
        kernel = self._asked_for(names) or self._listed(names)
        if kernel is None:
            raise RuntimeError(f"no kernel {part}: names {sorted(names)}, {len(self._libraries)} fat binaries")
        return kernel

    def launch(
        self, kernel: ctypes.c_void_p, grid: Sequence[int], block: Sequence[int], stream: int, *arguments: Any
    ) -> None:
        """Enqueue one launch; `arguments` are ctypes values in the kernel's order."""
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
        self._call("cuLaunchKernel", kernel, *grid, *block, 0, ctypes.c_void_p(stream), pointers, None)

    def _asked_for(self, names: set[bytes]) -> ctypes.c_void_p | None:
        kernel = ctypes.c_void_p()
        for name in names:
            for library in self._libraries:
                if not self._driver.cuLibraryGetKernel(ctypes.byref(kernel), library, name):
                    return kernel
        return None

    def _listed(self, names: set[bytes]) -> ctypes.c_void_p | None:
        """For drivers that do not look up kernels local to a file."""
        for library in self._libraries:
            count, text = ctypes.c_uint(), ctypes.c_char_p()
            self._call("cuLibraryGetKernelCount", ctypes.byref(count), library)
            kernels = (ctypes.c_void_p * count.value)()
            self._call("cuLibraryEnumerateKernels", kernels, count, library)
            for address in kernels:
                self._call("cuKernelGetName", ctypes.byref(text), ctypes.c_void_p(address))
                if text.value in names:
                    return ctypes.c_void_p(address)
        return None

    def _call(self, name: str, *arguments: Any) -> None:
        result = int(getattr(self._driver, name)(*arguments))
        if result:
            raise RuntimeError(f"{name} failed with CUDA error {result}")
