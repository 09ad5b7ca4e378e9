"""Tests that need a GPU: all of them skip, with one reason, where there is none.

A machine with a GPU may lack what the other tests need (pytest-asyncio, pyzmq, lmdb): nothing here imports it.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import pytest

ASYNCIO_OPTIONS = ("asyncio_mode", "asyncio_default_fixture_loop_scope")


def pytest_addoption(parser: pytest.Parser) -> None:
    """pyproject.toml sets pytest-asyncio's options, and pytest refuses options that nobody declares."""
    if importlib.util.find_spec("pytest_asyncio") is None:
        for name in ASYNCIO_OPTIONS:
            parser.addini(name, "of pytest-asyncio, which is not installed")


@functools.cache
def missing() -> str:
    """What keeps the tests from a GPU; empty where one can be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cupy's about the CUDA it finds: the tests tell what matters
        try:
            import cupy

            if not cupy.cuda.runtime.getDeviceCount():
                return "no GPU: the driver shows no device"
            cupy.cuda.Device(0).use()
            cupy.cuda.runtime.deviceSynchronize()
        except (ImportError, OSError, RuntimeError) as error:
            return f"no GPU can be used: {type(error).__name__}: {error}"
    return ""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """From here, not from a fixture: pytest then tells one reason once, with the number of tests that it kept back."""
    if missing():
        pytest.skip(missing())


@pytest.fixture(scope="session")
def gpu() -> Any:
    """cupy."""
    import cupy

    return cupy


def pytest_report_header() -> list[str]:
    """Which GPU the results are from."""
    if missing():
        return []
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return [f"gpu: {name}, sm_{cupy.cuda.Device(0).compute_capability}, cupy {cupy.__version__}"]
