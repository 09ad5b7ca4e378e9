"""The CUDA sources as a library for the CPU, built once a session."""

from __future__ import annotations

import ctypes

import pytest
from tests.kernels.shim import HERE, build, compiler


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if compiler() is None:
        pytest.skip("g++ is not on PATH: the CUDA sources cannot be run on the CPU")
    return build(HERE / "shim.cpp", tmp_path_factory.mktemp("shim"))
