"""What importing the client costs."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["forebay.client", "forebay.client.sync", "forebay.client.aio"])
def test_importing_the_client_loads_no_engine_and_no_daemon(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    roots = set(loaded.stdout.split())
    heavy = ("torch", "cupy", "lmdb", "prometheus_client", "transformers", "forebay.daemon", "forebay.tiers")
    assert not roots.intersection(heavy)
