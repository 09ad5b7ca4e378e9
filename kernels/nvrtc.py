"""The kernels compiled at run time by NVRTC, for the architecture that is there, and kept on disk.

A compiled kernel is code that this process will run, so it is kept in a directory of the user's own and carries a
SHA-256: one that was torn or changed is compiled again. cupy is imported when something must be compiled; its NVRTC
needs no driver, so any machine can compile for any architecture.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import logging
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
"""Compute capabilities that the kernels are compiled for in tests: Ampere to Blackwell."""

SOURCES = ("paged_copy.cu", "paged_copy.cuh", "xxh3.cuh")
"""The translation unit, then what it includes."""

_OPTIONS = ("--std=c++17", "--restrict", "--ptxas-options=-v")
_DIGEST_BYTES = hashlib.sha256().digest_size

_log = logging.getLogger("forebay.kernels")


class CompileError(Exception):
    """NVRTC refused the kernels; the text is its log."""


class Compiled(NamedTuple):
    """Attributes: cubin: machine code. log: NVRTC's words: registers and spills of each kernel, and any warning."""

    cubin: bytes
    log: str


@functools.cache
def source_texts() -> tuple[str, ...]:
    """The texts of `SOURCES`."""
    here = importlib.resources.files("forebay.kernels")
    return tuple((here / name).read_text("utf-8") for name in SOURCES)


def compile_kernels(architecture: str) -> Compiled:
    """Compile for ``sm_<architecture>``; takes about a second. Raises CompileError, ImportError without cupy."""
    from cupy.cuda import nvrtc

    unit, *headers = source_texts()
    encoded = [text.encode() for text in headers], [name.encode() for name in SOURCES[1:]]  # cupy takes only bytes
    program = nvrtc.createProgram(unit, SOURCES[0], *encoded)
    try:
        nvrtc.compileProgram(program, (*_OPTIONS, f"--gpu-architecture=sm_{architecture}"))
        return Compiled(bytes(nvrtc.getCUBIN(program)), _log_of(program))
    except nvrtc.NVRTCError as error:
        raise CompileError(f"sm_{architecture}: {error}\n{_log_of(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def cached_kernels(architecture: str, directory: Path) -> bytes:
    """The machine code for ``sm_<architecture>``: from `directory`, or compiled and kept there. Raises as above.

    A directory that cannot be written to costs the second of compiling, each time, and a warning.
    """
    from cupy.cuda import nvrtc

    digest = hashlib.sha256("\0".join((*source_texts(), *_OPTIONS)).encode())
    version = ".".join(map(str, nvrtc.getVersion()))
    path = directory / f"{digest.hexdigest()[:32]}-nvrtc{version}-sm_{architecture}.cubin"
    kept = _read(path)
    if kept is not None:
        return kept
    cubin = compile_kernels(architecture).cubin
    try:
        _write(path, cubin)
    except OSError as error:
        _log.warning("compiled kernels cannot be kept in %s: %s", directory, error)
    return cubin


def _log_of(program: int) -> str:
    from cupy.cuda import nvrtc

    return str(nvrtc.getProgramLog(program)).rstrip("\0")


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                _log.warning("%s belongs to somebody else and is not used", path)
                return None
            content = file.read()
    except OSError:
        return None
    cubin, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(cubin + hashlib.sha256(cubin).digest())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
