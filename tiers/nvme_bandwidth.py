"""What a drive was measured to do, in a file beside its data: written by a benchmark, read when the tier starts.

One JSON object, replaced atomically: whoever reads it sees the old one or the new one. It may have been written on
another machine, or by hand, so it is believed only where it is whole and its figures are such as a drive can have.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

BANDWIDTH_NAME = "bandwidth.json"
SIZE_MAX = 4096
_VERSION = 1
_RATES = 10**6, 10**12
"""No drive is slower, and no path of a machine is faster."""
_BOUNDS = {
    "read_bytes_per_s": _RATES,
    "write_bytes_per_s": _RATES,
    "block_bytes": (1, 1 << 40),
    "queue_depth": (1, 1 << 16),
}
_TIME = re.compile(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9]Z")


class BadBandwidth(ValueError):
    """A file does not say what a drive was measured to do; the text tells why."""


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Rates that the nvme tier reached, checksums, flushing and index included. `measured_at` is UTC, ISO 8601."""

    read_bytes_per_s: int
    write_bytes_per_s: int
    block_bytes: int
    queue_depth: int
    measured_at: str

    @classmethod
    def of(cls, read_bytes_per_s: float, write_bytes_per_s: float, *, block_bytes: int, queue_depth: int) -> Self:
        """Measured just now."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(int(read_bytes_per_s), int(write_bytes_per_s), block_bytes, queue_depth, now)


def write_bandwidth(directory: Path, bandwidth: Bandwidth) -> None:
    """Replace the directory's bandwidth.json. Raises OSError, leaving the old one."""
    text = json.dumps({"version": _VERSION, **asdict(bandwidth)}, indent=1) + "\n"
    fresh = directory / f".{BANDWIDTH_NAME}.{os.getpid()}"
    try:
        with fresh.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(directory / BANDWIDTH_NAME)
    finally:
        fresh.unlink(missing_ok=True)


def read_bandwidth(directory: Path) -> Bandwidth | None:
    """What the directory's bandwidth.json says, None where there is none. Blocks for one small read.

    Raises BadBandwidth, OSError.
    """
    try:
        text = _read(directory / BANDWIDTH_NAME)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadBandwidth(f"it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadBandwidth("it is no JSON object")
    if type(found.get("version")) is not int or found["version"] != _VERSION:
        raise BadBandwidth(f"its version is {found.get('version')!r:.40}, not {_VERSION}")
    for name, (least, most) in _BOUNDS.items():
        value = found.get(name)
        if type(value) is not int or not least <= value <= most:
            raise BadBandwidth(f"{name} is {value!r:.40}, no whole number from {least} to {most}")
    at = found.get("measured_at")
    if not isinstance(at, str) or not _TIME.fullmatch(at):
        raise BadBandwidth(f"measured_at is {at!r:.40}, no time such as 2026-01-31T23:59:59Z")
    return Bandwidth(**{name: found[name] for name in _BOUNDS}, measured_at=at)


def _read(path: Path) -> bytes:
    """Of a plain file alone: neither a link nor a pipe makes anybody read, or wait for, something else."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BadBandwidth("it is no plain file")
        text = file.read(SIZE_MAX + 1)
    if len(text) > SIZE_MAX:
        raise BadBandwidth(f"it is longer than {SIZE_MAX} bytes")
    return text
