"""The CPU's stand-in for a GPU finds what a GPU would refuse: a shim that cannot fail proves nothing."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from tests.kernels.contract import PREPARED, Rig
from tests.kernels.layouts import Case, line
from tests.kernels.memories import HostMemory
from tests.kernels.shim import FAULTS, ShimFaultError, ShimKernels, build, compiler

LANES = 32

PLANTED = """
#include "cpu_shim.h"
typedef unsigned long long u64;
static u64 out[64];
extern "C" const u64* results() { return out; }
// Rounds of shuffles with every distance; the values are other ones each round.
extern "C" int sound() {
  return shim::launch([] {
    u64 sum = 0;
    for (u64 round = 0; round < 40; ++round)
      sum = sum * 31 + __shfl_xor_sync(0xFFFFFFFFu, threadIdx.x * 1000 + round, 1u << (round % 5));
    out[threadIdx.x] = sum;
  }, true, 1, 64);
}
extern "C" int one_lane_stays_away() {
  return shim::launch([] { if (threadIdx.x) __shfl_xor_sync(0xFFFFFFFFu, 1, 4); }, true, 1, 32);
}
extern "C" int one_lane_shuffles_once_more() {
  return shim::launch([] {
    __shfl_xor_sync(0xFFFFFFFFu, 1, 4);
    if (threadIdx.x == 7) __shfl_xor_sync(0xFFFFFFFFu, 1, 4);
  }, true, 1, 32);
}
extern "C" int lanes_differ_in_distance() {
  return shim::launch([] { __shfl_xor_sync(0xFFFFFFFFu, 1, threadIdx.x < 16 ? 4 : 8); }, true, 1, 32);
}
extern "C" int mask_lacks_a_lane() {
  return shim::launch([] { __shfl_xor_sync(0xFFFFFFFEu, 1, 4); }, true, 1, 32);
}
extern "C" int shuffle_outside_lock_step() {
  return shim::launch([] { __shfl_xor_sync(0xFFFFFFFFu, 1, 4); }, false, 1, 32);
}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if compiler() is None:
        pytest.skip("g++ is not on PATH: the shim cannot be compiled")
    source = tmp_path_factory.mktemp("planted") / "planted.cpp"
    source.write_text(PLANTED)
    return build(source, source.parent)


def test_shuffles_exchange_what_the_lanes_hold_at_that_moment(planted: ctypes.CDLL) -> None:
    assert planted.sound() == FAULTS.index("none")
    planted.results.restype = ctypes.POINTER(ctypes.c_uint64)
    found = np.ctypeslib.as_array(planted.results(), (2 * LANES,))
    threads = np.arange(2 * LANES, dtype=np.uint64)
    expected = np.zeros(2 * LANES, np.uint64)
    for turn in range(40):
        expected = expected * np.uint64(31) + (threads ^ np.uint64(1 << turn % 5)) * np.uint64(1000) + np.uint64(turn)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("one_lane_stays_away", "lanes of a warp parted at a shuffle"),
        ("one_lane_shuffles_once_more", "lanes of a warp parted at a shuffle"),
        ("lanes_differ_in_distance", "lanes of a warp parted at a shuffle"),
        ("mask_lacks_a_lane", "a shuffle without all lanes"),
        ("shuffle_outside_lock_step", "lanes of a warp parted at a shuffle"),
    ],
)
def test_shuffle_that_not_all_lanes_make_alike_is_a_fault(planted: ctypes.CDLL, kernel: str, fault: str) -> None:
    assert FAULTS[getattr(planted, kernel)()] == fault


@pytest.mark.parametrize("width", [16, 4])
@pytest.mark.parametrize("name", ["gather", "scatter"])
def test_misaligned_access_is_a_fault(library: ctypes.CDLL, name: str, width: int) -> None:
    """A GPU ends the process's context for it; a CPU would not mind."""
    rig = Rig(ShimKernels(library), HostMemory(), HostMemory(), HostMemory())
    half = width // 2
    sound = line(1024, width)
    for case in (_moved(sound, half, 0), _moved(sound, 0, half)):
        call = PREPARED[name](rig, case)
        with pytest.raises(ShimFaultError, match="misaligned"):
            call.copy(name)


def _moved(case: Case, paged: int, slots: int) -> Case:
    return replace(case, bases=case.bases + paged, slots=[slot + slots for slot in case.slots])
