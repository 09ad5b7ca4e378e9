"""The kernels in numpy keep the kernels' contract."""

from __future__ import annotations

import pytest
from tests.kernels.contract import KernelContract, Rig
from tests.kernels.memories import HostMemory

from forebay.kernels.reference import ReferenceKernels


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(ReferenceKernels(), HostMemory(), HostMemory(), HostMemory())


class TestReferenceKernels(KernelContract):
    pass
