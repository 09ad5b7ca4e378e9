"""What the daemon says about itself at one instant: the record behind /metrics, /healthz and ``forebay status``.

The owner thread makes a DaemonSnapshot on request; everybody else only reads it. One record for all readers, so that
two of them can never disagree. All counters are totals since start.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from forebay.kvstore.stats import StoreStats

if TYPE_CHECKING:
    from forebay.tiers.base import TierInfo
from forebay.tiers.nvme_jobs import NvmeInfo

SERVING = "serving"
DRAINING = "draining"
# With these the document stays well below the protocol's bound on it, whatever clients name their models.
NAMESPACES_SHOWN_MAX = 256
MODEL_CHARS_SHOWN_MAX = 128


@dataclass(frozen=True, slots=True)
class VerbStats:
    """Requests of one verb.

    ``errors`` counts by error name ("Busy"). ``latency_counts[i]`` counts answers at or under
    ``counters.LATENCY_BOUNDS_S[i]`` and above the bound before; its last element counts the rest.
    """

    verb: str
    requests: int
    errors: Mapping[str, int]
    latency_counts: tuple[int, ...]
    latency_sum_s: float


@dataclass(frozen=True, slots=True)
class LoopStats:
    """The owner loop: how often it turned, how long it worked (not waited), its longest turn."""

    turns: int
    busy_s: float
    longest_turn_s: float


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """What the operating system says about the daemon's process. Slabs count in ``rss_bytes`` only where mapped."""

    rss_bytes: int
    cpu_s: float
    open_fds: int
    fds_max: int
    threads: int


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars; 0: not configured. Of a GPU's hour, a GiB for a month, 10^12 bytes written to a drive."""

    gpu_hour: float = 0.0
    host_gib_month: float = 0.0
    nvme_gib_month: float = 0.0
    nvme_tb_written: float = 0.0

    def gpu_dollars(self, gpu_s: float) -> float:
        return gpu_s * self.gpu_hour / 3600

    def write_dollars(self, written_bytes: float) -> float:
        return written_bytes * self.nvme_tb_written / 1e12


NO_PRICES = Prices()


@dataclass(frozen=True, slots=True)
class DaemonSnapshot:
    """The daemon at one instant. ``state`` is SERVING or DRAINING; ``boot_id`` is hex."""

    version: str
    pid: int
    boot_id: str
    uptime_s: float
    state: str
    runtime_dir: str
    store: StoreStats
    tiers: tuple[TierInfo, ...]
    nvme: NvmeInfo | None
    refused_sessions: Mapping[str, int]
    verbs: tuple[VerbStats, ...]
    loop: LoopStats
    process: ProcessStats
    prices: Prices = NO_PRICES


def measure_process() -> ProcessStats:
    """Ask the kernel (about 0.2 ms; no lock, no I/O)."""
    process = psutil.Process()
    with process.oneshot():
        cpu = process.cpu_times()
        return ProcessStats(
            rss_bytes=process.memory_info().rss,
            cpu_s=cpu.user + cpu.system,
            open_fds=process.num_fds(),
            fds_max=process.rlimit(psutil.RLIMIT_NOFILE)[0],
            threads=process.num_threads(),
        )


def write_dollars(snapshot: DaemonSnapshot) -> float | None:
    """What writing to the nvme tier has cost in wear; None without a price."""
    if not snapshot.prices.nvme_tb_written:
        return None
    written = snapshot.nvme.written_bytes if snapshot.nvme else 0
    return snapshot.prices.write_dollars(written)


def saved_dollars(snapshot: DaemonSnapshot) -> float | None:
    """What was saved since the start, less what loading and writing cost; None without a price for GPUs."""
    physics = snapshot.store.physics
    if physics is None or not snapshot.prices.gpu_hour:
        return None
    net_s = physics.savings.gpu_s - physics.savings.stall_gpu_s
    return snapshot.prices.gpu_dollars(net_s) - (write_dollars(snapshot) or 0.0)


def not_ready(snapshot: DaemonSnapshot) -> list[str]:
    """Why no new work should be sent here; empty when ready."""
    reasons = ["draining: the daemon is shutting down"] if snapshot.state != SERVING else []
    return reasons + [f"tier {tier.tier} is down: {tier.reason}" for tier in snapshot.tiers if not tier.up]


def summary(snapshot: DaemonSnapshot) -> dict[str, Any]:
    """A few lines of it, for /healthz."""
    reasons = not_ready(snapshot)
    return {
        "ready": not reasons,
        "not_ready": reasons,
        "version": snapshot.version,
        "state": snapshot.state,
        "uptime_s": round(snapshot.uptime_s, 3),
        "sessions": snapshot.store.sessions,
        "tiers": {
            tier.tier: {"capacity_bytes": tier.capacity_bytes, "resident_bytes": tier.resident_bytes}
            for tier in snapshot.store.tiers
        },
    }


def document(snapshot: DaemonSnapshot) -> dict[str, Any]:
    """The status document: the record's fields, and whether and why not ready. Of namespaces the largest are shown."""
    reasons = not_ready(snapshot)
    whole = {"ready": not reasons, "not_ready": reasons, **dataclasses.asdict(snapshot)}
    namespaces = sorted(whole["store"]["namespaces"], key=lambda each: -int(each["resident_bytes"]))
    whole["store"]["namespaces"] = namespaces[:NAMESPACES_SHOWN_MAX]
    whole["namespaces_omitted"] = max(0, len(namespaces) - NAMESPACES_SHOWN_MAX)
    whole["saved_dollars"], whole["write_dollars"] = saved_dollars(snapshot), write_dollars(snapshot)
    for each in whole["store"]["namespaces"]:
        each["model"] = each["model"][:MODEL_CHARS_SHOWN_MAX]
    return whole


def to_json(snapshot: DaemonSnapshot) -> str:
    """The answer of the STATUS verb: compact, ASCII."""
    return json.dumps(document(snapshot), separators=(",", ":"))
