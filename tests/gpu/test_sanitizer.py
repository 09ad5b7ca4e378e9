"""compute-sanitizer finds nothing in any kernel, and finds what is planted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = Path(__file__).resolve().parent / "sanitizer_cases.py"
FOUND = 77
TIMEOUT_S = 100


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def sanitized(tool: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The cases under a tool of the sanitizer; skips where it cannot run."""
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # what cupy asks the driver and is refused is no matter of the kernels
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*command, sys.executable, "-P", str(SCRIPT), str(cache), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer refuses this device: 'Device not supported'")
    return done


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    done = sanitized(tool, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "all copied" in done.stdout
    assert "SUMMARY: 0 " in done.stdout


def test_sanitizer_finds_a_read_beyond_the_paged_memory(tmp_path: Path) -> None:
    """Planted: a tool that is not at work would report nothing either."""
    done = sanitized("memcheck", tmp_path, "planted")
    assert done.returncode != 0
    assert "Invalid __global__ read" in done.stdout, done.stdout[-4000:]
