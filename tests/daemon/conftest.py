"""A daemon's snapshot out of thin air, for the modules that only read one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from forebay.daemon.counters import RequestCounters
from forebay.daemon.status import DaemonSnapshot, LoopStats, Prices, ProcessStats
from forebay.kvstore.physics import (
    ETA_BOUNDS,
    SIZES_TOLD,
    CurvePoint,
    EtaErrors,
    LinkStats,
    PhysicsStats,
    PlanCounts,
    Savings,
)
from forebay.kvstore.planner import Origin
from forebay.kvstore.stats import Counters, MovementStats, NamespaceStats, StoreStats, TierStats
from forebay.kvstore.store import TIER_NAMES
from forebay.tiers.base import TierInfo
from forebay.tiers.nvme_jobs import LATENCY_BOUNDS_S, DriveInfo, Latency, NvmeInfo


def tier_info(up: bool = True, reason: str = "") -> TierInfo:
    return TierInfo(
        "host", 1 << 30, 1 << 24, 64, "thp", (("thp", 64),), 1 << 29, 4096, 0, ("memory is not locked",), up, reason
    )


def _errors(first: int) -> EtaErrors:
    return EtaErrors(list(range(first, first + len(ETA_BOUNDS) + 1)), first * 1.5)


def physics_stats() -> PhysicsStats:
    points = tuple(
        CurvePoint(int(share * (2 << 30)), 0.1 + share / 8, share * 1e6, share * 1e11, share * 100)
        for share in SIZES_TOLD
    )
    return PhysicsStats(
        savings=Savings(5000, 6e15, 700.0, 80.0),
        plans=PlanCounts(11, 12, 13, (_errors(1), _errors(2)), 4),
        links=(LinkStats("host", 20.0, 0.0, 0), LinkStats("nvme", 3.0, 1e-3, 4096, Origin.BENCHED)),
        prefill_samples=14,
        prefill_line=(0.004, 1e-4, 1e-9),
        curve=points,
        curves=((f"{0:064x}", tuple((point.size_bytes, point.hit_share) for point in points)),),
        curve_keys=15,
        curve_skipped=16,
    )


def store_stats(namespaces: int = 1) -> StoreStats:
    tiers = tuple(TierStats(name, 1 << 30, 1 << 24, 64, 10, 123 << 20, 1000, 100, 20, 3, 877) for name in TIER_NAMES)
    named = tuple(
        NamespaceStats(
            f"{number:064x}",
            f"model-{number}",
            1000,
            16,
            2048,
            1,
            100 + number,
            1,
            2,
            204800 + number,
            409600 + number,
            5.0,
        )
        for number in range(namespaces)
    )
    counters = Counters(**{each.name: 1000 + position for position, each in enumerate(fields(Counters))})
    return StoreStats(
        tiers=tiers,
        namespaces=named,
        sessions=3,
        leases=4,
        leased_blocks=40,
        reservations=5,
        quarantined_reservations=1,
        pinned_blocks=7,
        draining=False,
        movement=MovementStats(True, 6, 61, 8, 81, 81 << 20, 91, 10 << 40, 11 << 30),
        counters=counters,
        physics=physics_stats(),
    )


def nvme_info() -> NvmeInfo:
    drive = DriveInfo("/data", True, "", "direct", "", True, 1, 2, 3, 4, "up", "", 5, 6, 3 << 40)
    counts = tuple(range(len(LATENCY_BOUNDS_S) + 1))
    return NvmeInfo(
        (drive,),
        10_001,
        10_002,
        10_003,
        10_004,
        Latency(counts, 1.5),
        Latency(counts, 2.5),
        (("IO_ERROR", 7),),
        8,
        0.5,
        False,
        True,
        20 << 40,
    )


@pytest.fixture
def make_snapshot() -> Callable[..., DaemonSnapshot]:
    """A snapshot with every counter different; keyword arguments replace fields, ``namespaces`` their number."""

    def make(namespaces: int = 1, **replaced: Any) -> DaemonSnapshot:
        counters = RequestCounters()
        counters.observe("lookup", 3e-5)
        counters.observe("lookup", 2.0)
        counters.observe("reserve", 1e-3, "Busy")
        given: dict[str, Any] = {
            "version": "9.9.9",
            "pid": 4242,
            "boot_id": "ab" * 16,
            "uptime_s": 93784.5,
            "state": "serving",
            "runtime_dir": "/run/forebay",
            "store": store_stats(namespaces),
            "tiers": (tier_info(),),
            "nvme": nvme_info(),
            "refused_sessions": {"Forbidden": 2},
            "verbs": counters.freeze(),
            "loop": LoopStats(77, 1.5, 0.25),
            "prices": Prices(2.5, 3.0, 0.1, 0.08),
            "process": ProcessStats(30 << 20, 12.5, 60, 65_536, 5),
        }
        return DaemonSnapshot(**given | replaced)

    return make


@pytest.fixture
def make_tier() -> Callable[..., TierInfo]:
    """A host tier's description; ``up`` and ``reason`` may be given."""
    return tier_info
