"""Kernels found in a library's file, with a driver of our own."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest

from forebay.bench.gpu_lmcache_kernels import Kernels, Objects4, ShapeDesc, fat_binaries

NAME = b"_ZN7lmcache4copyILb1EEEvv"
WANTED = 77


def fat_binary(content: bytes, *, version: int = 1) -> bytes:
    return struct.pack("<IHHQ", 0xBA55ED50, version, 16, len(content)) + content


IMAGE = (
    b"\x7fELF" + fat_binary(b"one") + b"\0" + NAME + b"\0rest" + fat_binary(b"newer", version=2) + fat_binary(b"two")
)


class Driver:
    """libcuda with one kernel, in the second library loaded."""

    def __init__(self, *, looks_up: bool = True, result: int = 0) -> None:
        self.looks_up, self.result = looks_up, result
        self.loaded: list[bytes] = []
        self.launched: list[tuple[Any, ...]] = []

    def cuLibraryLoadData(self, library: Any, binary: Any, *rest: Any) -> int:
        self.loaded.append(binary.raw[:-1])
        library._obj.value = len(self.loaded)
        return self.result

    def cuLibraryGetKernel(self, kernel: Any, library: ctypes.c_void_p, name: bytes) -> int:
        if not self.looks_up or library.value != 2 or name != NAME:
            return 500
        kernel._obj.value = WANTED
        return 0

    def cuLibraryGetKernelCount(self, count: Any, library: ctypes.c_void_p) -> int:
        count._obj.value = library.value or 0
        return 0

    def cuLibraryEnumerateKernels(self, kernels: Any, count: ctypes.c_uint, library: ctypes.c_void_p) -> int:
        kernels[:] = [76, WANTED][: count.value]
        return 0

    def cuKernelGetName(self, text: Any, kernel: ctypes.c_void_p) -> int:
        text._obj.value = NAME if kernel.value == WANTED else b"_ZN5other"
        return 0

    def cuLaunchKernel(self, kernel: ctypes.c_void_p, *arguments: Any) -> int:
        grid_and_block, (shared, stream, pointers, extra) = arguments[:6], arguments[6:]
        first = ctypes.cast(pointers[0], ctypes.POINTER(ctypes.c_int)).contents.value
        self.launched.append((kernel.value, grid_and_block, shared, stream.value, first, extra))
        return 0


def test_only_fat_binaries_of_the_known_version_are_taken() -> None:
    """The four bytes of the magic number may stand anywhere, the file's end included."""
    assert list(fat_binaries(IMAGE + b"\x50\xed\x55\xba")) == [fat_binary(b"one"), fat_binary(b"two")]
    driver = Driver()
    Kernels(IMAGE, driver)
    assert driver.loaded == [fat_binary(b"one"), fat_binary(b"two")]


@pytest.mark.parametrize("looks_up", [True, False])
def test_kernel_is_found_by_part_of_its_name(looks_up: bool) -> None:
    """By the driver's look-up, or in its list where it does not look up such names."""
    assert Kernels(IMAGE, Driver(looks_up=looks_up)).find("copyILb1E").value == WANTED


def test_kernel_that_is_not_there_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"no kernel copyILb0E: names .*, 2 fat binaries"):
        Kernels(IMAGE, Driver()).find("copyILb0E")


def test_refusal_of_the_driver_has_its_number() -> None:
    with pytest.raises(RuntimeError, match="cuLibraryLoadData failed with CUDA error 209"):
        Kernels(IMAGE, Driver(result=209))


def test_launch_hands_over_the_arguments_addresses() -> None:
    driver = Driver()
    Kernels(IMAGE, driver).launch(ctypes.c_void_p(WANTED), (1, 2, 3), (4, 5, 6), 9, ctypes.c_int(42), ctypes.c_int64(0))
    assert driver.launched == [(WANTED, (1, 2, 3, 4, 5, 6), 0, 9, 42, None)]


def test_structures_are_as_large_as_the_kernels_take_them() -> None:
    """They are passed by value."""
    assert (ctypes.sizeof(Objects4), ctypes.sizeof(ShapeDesc)) == (40, 32)
