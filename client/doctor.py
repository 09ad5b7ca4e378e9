"""``forebay doctor``: what this machine has for moving blocks of a GPU, and what is in the way.

Run as a module, in a process of its own: it looks at the GPU through the client's side, which the daemon never loads.
Every finding is a line: a name, what was found, and ``!`` in front where it costs speed or forbids the GPU path. The
exit code is 0 if blocks of a GPU can be moved, else 1. ``--tune`` first measures which way of moving is the fastest.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forebay.transports.dma import DmaEngine, Tuning, tuning
from forebay.transports.paths import cache_directory

TUNING_FILES = "dma-tuning-*.json"

MEMLOCK_BYTES_MIN = 1 << 30
"""A limit below this pins less than a few slabs."""

_THP = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_MEMINFO = Path("/proc/meminfo")
_PCI_DEVICES = Path("/sys/bus/pci/devices")

CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """Attributes: good: False where it costs speed, or forbids the GPU path."""

    name: str
    text: str
    good: bool = True


def findings(cache: Path, *, tune: bool = False) -> tuple[list[Finding], bool]:
    """All there is to say, and whether blocks of a GPU can be moved.

    Args:
        tune: measure each GPU anew: seconds in which its link is busy.
    """
    found = [*_cupy(), *_gpus(cache, tune)]
    usable = all(finding.good for finding in found)
    found += [_batched_copy(), _memlock(), *_huge_pages(), _kernel_cache(cache), *_tuning(cache)]
    return found, usable


def _cupy() -> Iterator[Finding]:
    """cupy, and the NVRTC that it compiles the kernels with."""
    try:
        import cupy
    except Exception as error:  # noqa: BLE001  # a broken installation raises what it likes
        text = f"{type(error).__name__}: {error}; pip install 'forebay[cuda13]', for CUDA 12 'forebay[cuda12]'"
        yield Finding("cupy", text, good=False)
        return
    yield Finding("cupy", str(cupy.__version__))
    yield _asked("NVRTC", lambda: "{}.{}".format(*cupy.cuda.nvrtc.getVersion()))
    driver = int(cupy.cuda.runtime.driverGetVersion())
    yield Finding("driver", f"CUDA {_version(driver)}" if driver else "none", good=driver > 0)
    yield _asked("runtime", lambda: f"CUDA {_version(cupy.cuda.runtime.runtimeGetVersion())}")


def _gpus(cache: Path, tune: bool) -> Iterator[Finding]:
    """Each GPU, and whether the kernels load on it."""
    try:
        import cupy

        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # noqa: BLE001  # likewise, and the driver's
        yield Finding("GPUs", f"none: {type(error).__name__}: {error}", good=False)
        return
    yield Finding("GPUs", str(count), good=count > 0)
    for index in range(count):
        yield _asked(f"GPU {index}", lambda index=index: _gpu(index, cache))  # type: ignore[misc]
        if tune:
            yield _asked(f"GPU {index} measured", lambda index=index: _tuned(index, cache))  # type: ignore[misc]


def _gpu(index: int, cache: Path) -> str:
    import cupy

    from forebay.transports.dma.cuda_device import CudaDevice

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    began = time.monotonic()
    device = CudaDevice(index, cache)
    seconds = time.monotonic() - began
    architecture = f"sm_{properties['major']}{properties['minor']}"
    size = _size(int(properties["totalGlobalMem"]))
    node = _numa_node(cupy.cuda.runtime.deviceGetPCIBusId(index))
    return f"{device.name}, {architecture}, {size}, {node}, kernels loaded in {seconds:.2f} s"


def _numa_node(bus_id: str) -> str:
    """Where slabs are best for this GPU: the daemon's ``host.numa_node``."""
    try:
        node = int((_PCI_DEVICES / bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        node = -1
    return f"NUMA node {node}" if node >= 0 else "NUMA node unknown"


def _tuned(index: int, cache: Path) -> str:
    from forebay.transports.dma.cuda_device import CudaDevice

    device = CudaDevice(index, cache)
    engine = DmaEngine(device)
    began = time.monotonic()
    try:
        path = tuning.save(tuning.measure(engine, device, device.key), cache)
    finally:
        engine.close(CLOSE_S)
    return f"in {time.monotonic() - began:.1f} s, kept in {path.name}; clients use it from their next start on"


def _asked(name: str, ask: Callable[[], str]) -> Finding:
    try:
        return Finding(name, ask())
    except Exception as error:  # noqa: BLE001  # cupy's and the driver's errors have no common type
        return Finding(name, f"{type(error).__name__}: {error}", good=False)


def _batched_copy() -> Finding:
    try:
        there = hasattr(ctypes.CDLL("libcuda.so.1"), "cuMemcpyBatchAsync")
    except OSError:
        return Finding("batched copy", "no driver library here", good=False)
    text = "cuMemcpyBatchAsync" if there else "the driver has none (CUDA 12.8 brings it): pieces are copied one by one"
    return Finding("batched copy", text, good=there)


def _memlock() -> Finding:
    """How much this user may pin; some drivers pin on behalf of root and do not ask."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = " of ".join("unlimited" if limit == resource.RLIM_INFINITY else _size(limit) for limit in (soft, hard))
    return Finding("memlock limit", shown, good=soft == resource.RLIM_INFINITY or soft >= MEMLOCK_BYTES_MIN)


def _huge_pages() -> Iterator[Finding]:
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        counts = (lines.get(name, "?").strip() for name in ("HugePages_Total", "HugePages_Free", "Hugepagesize"))
        yield Finding("huge pages", "{}, {} free, of {}".format(*counts))
    with contextlib.suppress(OSError):
        chosen = _THP.read_text().partition("[")[2].partition("]")[0]
        yield Finding("transparent huge pages of shared memory", chosen or "unknown")


def _kernel_cache(cache: Path) -> Finding:
    if not cache.is_dir():
        return Finding("kernel cache", f"{cache}: not made yet")
    kept = list(cache.glob("*.cubin"))
    writable = os.access(cache, os.W_OK)
    text = f"{cache}: {len(kept)} compiled, {_size(sum(path.stat().st_size for path in kept))}"
    return Finding("kernel cache", text if writable else f"{text}; it cannot be written to", good=writable)


def _tuning(cache: Path) -> Iterator[Finding]:
    """Which measurements there are that strategies are chosen by."""
    files = sorted(cache.glob(TUNING_FILES)) if cache.is_dir() else []
    if not files:
        yield Finding("tuning", "nothing measured: strategies are chosen by rule")
    for path in files:
        try:
            measured = Tuning.of_document(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            yield Finding("tuning", f"{path.name} cannot be used: {error}", good=False)
            continue
        date = time.strftime("%Y-%m-%d", time.gmtime(measured.measured))
        yield Finding("tuning", f"{measured.device}, measured {date}")
        for row in measured.rows:
            moved = f"{row.direction.value} of {_size(row.moved_bytes)} in segments of {_size(row.segment_bytes)}"
            rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in row.rates.items())
            yield Finding(f"  {moved}", f"{row.best.value} ({rates} GB/s)")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _size(count: int) -> str:
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="forebay doctor", description="What this machine has for blocks of a GPU.")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--tune", action="store_true", help="measure each GPU's link anew (seconds), and keep it")
    parsed = parser.parse_args(arguments)
    found, usable = findings(cache_directory(), tune=parsed.tune)
    if parsed.json:
        document: dict[str, Any] = {"usable": usable, "findings": [asdict(finding) for finding in found]}
        print(json.dumps(document))
    else:
        for finding in found:
            print(f"{' ' if finding.good else '!'} {finding.name}: {finding.text}")
        print(f"blocks of a GPU {'can' if usable else 'cannot'} be moved here")
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
