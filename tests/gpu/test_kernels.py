"""The kernels keep their contract on a GPU: between device memory on both sides, and to and from the host's slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.gpu.memories import DeviceMemory, MappedMemory
from tests.kernels.contract import KernelContract, Rig, assert_gathered, gathering
from tests.kernels.layouts import line

from forebay.kernels.cuda import CudaKernels

BUSY_BYTES, BUSY_COPIES = 256 << 20, 100  # some 20 ms of a stream's time


@pytest.fixture(scope="module")
def kernels(gpu: Any, tmp_path_factory: pytest.TempPathFactory) -> CudaKernels:
    """Compiled here and now, so that what runs is what lies in the tree."""
    return CudaKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module", params=[DeviceMemory, MappedMemory], ids=["device", "mapped"])
def rig(request: pytest.FixtureRequest, gpu: Any, kernels: CudaKernels) -> Rig:
    return Rig(kernels, DeviceMemory(gpu), request.param(gpu), DeviceMemory(gpu))


class TestCudaKernels(KernelContract):
    pass


def test_kept_machine_code_runs(gpu: Any, tmp_path: Path) -> None:
    """The second set of kernels is loaded from what the first one kept."""
    device, mapped = DeviceMemory(gpu), MappedMemory(gpu)
    for _ in range(2):
        call = gathering(Rig(CudaKernels(tmp_path), device, mapped, device), line(8192, 16))
        call.copy("gather", sums=True)
        assert_gathered(call)
        assert call.checksums() == call.expected_checksums()
    assert len(list(tmp_path.iterdir())) == 1


def test_kernels_run_on_the_stream_they_are_given(rig: Rig, gpu: Any) -> None:
    """Behind what is enqueued there: here a copy that brings the bytes they move."""
    runtime = gpu.cuda.runtime
    stream = gpu.cuda.Stream(non_blocking=True)
    call = gathering(rig, line(1 << 20, 16, blocks=8))
    content = call.paged.read()
    late, busy = rig.tables.place(content), gpu.cuda.alloc(2 * BUSY_BYTES)
    runtime.memset(call.paged.address, 0, len(content))
    runtime.deviceSynchronize()
    kind = runtime.memcpyDeviceToDevice
    for _ in range(BUSY_COPIES):
        runtime.memcpyAsync(busy.ptr, busy.ptr + BUSY_BYTES, BUSY_BYTES, kind, stream.ptr)
    runtime.memcpyAsync(call.paged.address, late.address, len(content), kind, stream.ptr)
    call.copy("gather", sums=True, stream=stream.ptr)
    assert_gathered(call)
    assert call.checksums() == call.expected_checksums()
