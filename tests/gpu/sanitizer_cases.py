"""Small copies by every kernel, each side exactly as large as it must be: a script for compute-sanitizer to start.

Arguments: a directory for the compiled kernels; `planted`, to read beyond the paged memory. Memory comes from plain
allocations, since cupy's pool would hide an access beyond one.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import cupy
import numpy as np
from tests.gpu.memories import DeviceMemory, MappedMemory
from tests.kernels.contract import ASSERTED, PREPARED, Rig, gathering
from tests.kernels.layouts import Case

from forebay.kernels.cuda import CudaKernels
from forebay.kernels.layout import WIDTHS

BLOCKS = 3


def tight(sizes: list[int], width: int) -> Case:
    """Blocks side by side, their segments backwards; nothing before, between or after them."""
    block_bytes = sum(sizes)
    ends = np.cumsum(sizes)
    return Case(
        bases=(block_bytes - ends).astype(np.int64),
        strides=np.full(len(sizes), block_bytes, np.int64),
        sizes=np.array(sizes, np.int64),
        paged_bytes=BLOCKS * block_bytes,
        slots_bytes=BLOCKS * block_bytes,
        block_ids=[2, 0, 1],
        slots=[block * block_bytes for block in range(BLOCKS)],
        width=width,
        multiprocessors=2,
        seed=width,
    )


def run(rig: Rig, case: Case) -> None:
    for name in ("gather", "scatter"):
        for sums in (False, True):
            call = PREPARED[name](rig, case)
            call.copy(name, sums=sums)
            ASSERTED[name](call)
            assert not sums or call.checksums() == call.expected_checksums()
    call = gathering(rig, case)
    call.read()
    assert call.checksums() == call.expected_checksums()


def main(cache: str, *planted: str) -> None:
    cupy.cuda.set_allocator(None)
    device, mapped = DeviceMemory(cupy), MappedMemory(cupy)
    kernels = CudaKernels(Path(cache))
    if planted:
        case = tight([4096], 16)
        gathering(Rig(kernels, device, device, device), replace(case, block_ids=[BLOCKS + 8] * BLOCKS)).copy("gather")
    for width in WIDTHS:
        for sizes in ([1536] * 4, [width, 5 * width, 4096, 3 * width, 1040, 1024 + width], [240 + width]):
            run(Rig(kernels, device, device, device), tight(sizes, width))
            run(Rig(kernels, device, mapped, device), tight(sizes, width))
    print("all copied")


if __name__ == "__main__":
    main(*sys.argv[1:])
