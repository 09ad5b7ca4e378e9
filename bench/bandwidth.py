"""What a drive was measured to do, written beside its data, where the daemon finds it.

One JSON object, replaced atomically: whoever reads it sees the old one or the new one.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

BANDWIDTH_NAME = "bandwidth.json"
_VERSION = 1


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
