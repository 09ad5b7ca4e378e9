"""The CUDA sources keep the contract, compiled by g++; the grids and arguments are those of `CudaKernels`.

What a compiler for the CPU cannot show (a GPU's caches, its order of memory) is shown by tests/gpu.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import pytest
from tests.kernels.contract import KernelContract, Rig, gathering, scattering
from tests.kernels.layouts import line
from tests.kernels.memories import HostMemory
from tests.kernels.shim import ShimKernels

from forebay.kernels.layout import WIDTHS
from forebay.kernels.nvrtc import source_texts

MULTIPROCESSORS = 3


@pytest.fixture(scope="module")
def rig(library: ctypes.CDLL) -> Rig:
    return Rig(ShimKernels(library, MULTIPROCESSORS), HostMemory(), HostMemory(), HostMemory())


class TestShimKernels(KernelContract):
    pass


def test_every_kernel_of_the_sources_can_be_started(rig: Rig) -> None:
    """A name that `CudaKernels` composes and one in the sources can part only here."""
    rig.kernels.started.clear()
    for width in WIDTHS:
        case = line(1024, width)
        for sums in (False, True):
            gathering(rig, case).copy("gather", sums=sums)
            scattering(rig, case).copy("scatter", sums=sums)
        call = gathering(rig, case)
        call.read()
        call.checksums()
    defined = set(re.findall(r"^COPY\((\w+),", source_texts()[0], re.MULTILINE)) | {"finish_xxh3"}
    assert set(rig.kernels.started) == defined
    assert len(defined) == 16


@pytest.mark.parametrize(("asked", "ctas"), [(1, 1), (2, 2), (0, 4 * MULTIPROCESSORS), (1000, MULTIPROCESSORS)])
def test_grid_leaves_the_multiprocessors_that_may_not_be_used(rig: Rig, asked: int, ctas: int) -> None:
    """One block of threads on each that may be used, and the engine keeps the others; or all of them, filled."""
    rig.kernels.started.clear()
    gathering(rig, replace(line(64 << 10, 16, blocks=8), multiprocessors=asked)).copy("gather")
    assert rig.kernels.started == {"gather_16": {ctas}}


@pytest.mark.parametrize(("width", "ctas"), [(16, 1), (4, 4), (1, 4)])
def test_small_copy_starts_no_more_warps_than_it_has_tiles(rig: Rig, width: int, ctas: int) -> None:
    """32 KiB are 8 tiles of 4 KiB, or 32 of 1 KiB where accesses are narrow; a block of threads has 8 warps."""
    rig.kernels.started.clear()
    gathering(rig, line(32 << 10, width)).copy("gather")
    assert rig.kernels.started == {f"gather_{width}": {ctas}}
