"""The CUDA sources compiled by g++ and started like the kernels of a GPU: what `CudaKernels` does, on one core.

Only `CudaKernels._start` is another one, so its grids, names and orders of arguments are those that are tried.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

from forebay.kernels.cuda import CudaKernels

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "kernels"
FAULTS = ("none", "lanes of a warp parted at a shuffle", "a shuffle without all lanes", "a misaligned access")
COMPILE_TIMEOUT_S = 100

# unknown-pragmas: g++ does not know `unroll`. alignment: each access is checked, as a GPU does; cpu_shim.h records it.
OPTIONS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fsanitize=alignment")

_U32 = ctypes.c_uint32


class ShimFaultError(Exception):
    """A GPU would have refused this, or computed something else."""


def compiler() -> str | None:
    """Path of g++; None where it is absent."""
    return shutil.which("g++")


def build(source: Path, folder: Path) -> ctypes.CDLL:
    """Compile a unit that includes cpu_shim.h and load it. Warnings are errors."""
    library = folder / f"{source.stem}.so"
    command = [compiler() or "g++", *OPTIONS, "-shared", "-fPIC", f"-I{SOURCES}", f"-I{HERE}", str(source)]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


class ShimKernels(CudaKernels):
    """See `CudaKernels`; all addresses are the host's, and a call has ended when it returns.

    Args:
        multiprocessors: of the GPU that is played.
    """

    def __init__(self, library: ctypes.CDLL, multiprocessors: int = 3) -> None:
        self.multiprocessors = multiprocessors
        self.started: dict[str, set[int]] = {}
        """The sizes of grid that each kernel was started with."""
        self._library = library

    def _start(self, name: str, grid: int, threads: int, arguments: tuple[Any, ...], stream: int) -> None:
        if grid < 1:
            raise ShimFaultError(f"{name}: an empty grid")
        self.started.setdefault(name, set()).add(grid)
        launch = self._library.launch_finish if name == "finish_xxh3" else self._library.launch_copy
        launch.argtypes = [ctypes.c_void_p, ctypes.c_int, _U32, _U32, *map(type, arguments)]
        kernel = ctypes.cast(getattr(self._library, name), ctypes.c_void_p)
        fault = launch(kernel, name.endswith("_xxh3"), grid, threads, *arguments)
        if fault:
            raise ShimFaultError(f"{name}: {FAULTS[fault]}")
