"""What a simulated disk may do wrong, how often, and the record of what it did (support/sim_files.py does it).

A fault is drawn from (seed, site, file, offset, how often that site was called there), never from a shared sequence:
the same calls meet the same faults in whatever order threads make them. Only `FaultPlan.at`, which counts a site's
calls over all files, depends on that order.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Fault(StrEnum):
    EIO = "eio"
    ENOSPC = "enospc"
    HELD = "held"  # the lock is another's
    SHORT = "short"
    TORN = "torn"
    LOST = "lost"
    MISDIRECTED = "misdirected"
    FLIP_READ = "flip_read"  # the next read of the place is right again
    FLIP_MEDIA = "flip_media"  # wrong until written again


RAISED = frozenset({Fault.EIO, Fault.ENOSPC, Fault.HELD})
SILENT = frozenset({Fault.TORN, Fault.LOST, Fault.MISDIRECTED, Fault.FLIP_READ, Fault.FLIP_MEDIA})

# Per site: which field of the plan is the chance of which fault.
SITE_FAULTS: Mapping[str, tuple[tuple[str, Fault], ...]] = {
    "open": (("eio_open", Fault.EIO),),
    "lock": (("lock_held", Fault.HELD),),
    "size": (("eio_size", Fault.EIO),),
    "allocate": (("enospc_allocate", Fault.ENOSPC),),
    "preadv": (
        ("eio_read", Fault.EIO),
        ("short_read", Fault.SHORT),
        ("flip_read", Fault.FLIP_READ),
        ("flip_media", Fault.FLIP_MEDIA),
    ),
    "pwritev": (
        ("eio_write", Fault.EIO),
        ("enospc_write", Fault.ENOSPC),
        ("short_write", Fault.SHORT),
        ("torn_write", Fault.TORN),
        ("lost_write", Fault.LOST),
        ("misdirected_write", Fault.MISDIRECTED),
    ),
    "sync": (("eio_sync", Fault.EIO),),
    "advise": (("eio_advise", Fault.EIO),),
    "statvfs_free_bytes": (("eio_statvfs", Fault.EIO),),
    "filesystem": (("eio_filesystem", Fault.EIO),),
}
SITES = tuple(SITE_FAULTS)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The chance of each fault per call, 0 to 1; at most one happens in a call. All zero: a sound disk.

    `at` names calls that fail whatever the chances: (site, n, fault) is the n-th call of the site, from 1. `slow` is
    the chance that a call waits for the disk's `stall`. Silent faults (those no caller is told of) spare the bytes
    below `silent_from_byte`. `direct` is whether files can be opened with O_DIRECT.
    """

    eio_open: float = 0.0
    lock_held: float = 0.0
    eio_size: float = 0.0
    enospc_allocate: float = 0.0
    eio_read: float = 0.0
    short_read: float = 0.0
    flip_read: float = 0.0
    flip_media: float = 0.0
    eio_write: float = 0.0
    enospc_write: float = 0.0
    short_write: float = 0.0
    torn_write: float = 0.0
    lost_write: float = 0.0
    misdirected_write: float = 0.0
    eio_sync: float = 0.0
    eio_advise: float = 0.0
    eio_statvfs: float = 0.0
    eio_filesystem: float = 0.0
    slow: float = 0.0
    at: tuple[tuple[str, int, Fault], ...] = ()
    silent_from_byte: int = 0
    direct: bool = True

    def __post_init__(self) -> None:
        for site, call, fault in self.at:
            if fault not in RAISED and fault not in [possible for _, possible in SITE_FAULTS[site]]:
                raise ValueError(f"{site} call {call} cannot have the fault {fault}")

    def draw(self, site: str, call: int, offset: int, dice: random.Random) -> Fault | None:
        """The fault of the site's `call`-th call, at `offset`; draws from `dice` once."""
        number = dice.random()
        for wanted_site, wanted_call, fault in self.at:
            if (wanted_site, wanted_call) == (site, call):
                return fault
        for field, fault in SITE_FAULTS[site]:
            number -= getattr(self, field)
            if number < 0:
                return None if fault in SILENT and offset < self.silent_from_byte else fault
        return None


@dataclass(frozen=True, slots=True)
class SiteCount:
    """Calls of one site: how many, and how many of them raised, fell short, or lied (a fault nobody was told of)."""

    calls: int
    raised: int
    short: int
    lied: int


@dataclass(frozen=True, slots=True)
class Corruption:
    """A page that silently became, or was read as, something else than was written there."""

    kind: Fault
    path: Path
    page: int


@dataclass(frozen=True, slots=True)
class CorruptRead:
    """A page given to a reader with bytes that are not what was last written; `first_byte` is the first of them."""

    path: Path
    page: int
    first_byte: int


class Record:
    """What happened on one simulated disk over all its lives. The disk's lock guards it."""

    def __init__(self, seed: int) -> None:
        self.corruptions: list[Corruption] = []
        self.corrupt_reads: list[CorruptRead] = []
        self.read_wrong: dict[tuple[Path, int], int] = {}
        self._seed = seed.to_bytes(8, "little")
        self._calls: Counter[str] = Counter()
        self._calls_at: Counter[tuple[str, str, int]] = Counter()
        self._faults: Counter[tuple[str, Fault]] = Counter()

    def begin(self, site: str, path: Path, offset: int) -> tuple[int, random.Random]:
        """Count a call; its number at the site, and the dice that decide all about it.

        Of the path only the last two parts count, so that runs in different temporary folders agree.
        """
        self._calls[site] += 1
        name = "/".join(path.parts[-2:])
        self._calls_at[site, name, offset] += 1
        return self._calls[site], self.dice(site, name, offset, self._calls_at[site, name, offset])

    def dice(self, *what: object) -> random.Random:
        digest = hashlib.blake2b(repr(what).encode(), key=self._seed, digest_size=8).digest()
        return random.Random(int.from_bytes(digest, "little"))

    def fault(self, site: str, fault: Fault) -> None:
        self._faults[site, fault] += 1

    def faults(self) -> dict[str, int]:
        """How often each fault happened, by `site.fault`."""
        return {f"{site}.{fault}": count for (site, fault), count in sorted(self._faults.items())}

    def sites(self) -> dict[str, SiteCount]:
        return {
            site: SiteCount(
                self._calls[site],
                sum(self._faults[site, fault] for fault in RAISED),
                self._faults[site, Fault.SHORT],
                sum(self._faults[site, fault] for fault in SILENT),
            )
            for site in SITES
        }
