"""Fetch and store of a GPU's blocks through the client and a daemon, beside one plain copy of the same bytes.

What an engine's connector does: one call of `Client`, everything included, until the bytes are where they belong.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from forebay.bench.engine_memory import PAGED, chain
from forebay.bench.figures import GIB, Figure
from forebay.bench.processes import BenchError, Daemon
from forebay.client import Client, SegmentTable
from forebay.kvstore.namespace import NamespaceSpec
from forebay.transports.dma import Direction

HOST_BYTES = 3 * GIB
TURNS = 7
REHEARSALS = 4
"""Enough to touch every slab: they are pinned in the background when first touched, and copies bounce until then."""

Action = Callable[[], float]


class Blocks(Protocol):
    """The paged memory of `forebay.bench.gpu.Rig`, in the shape of `PAGED`."""

    paged: list[Any]
    ids: NDArray[np.int64]

    @property
    def bytes(self) -> int: ...

    def plain(self, direction: Direction) -> Action: ...


def through_client(made: Blocks) -> Iterator[Figure]:
    """1 GiB of new blocks stored, and fetched, unverified and verified, each turn."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as directory:
        daemon = Daemon(Path(directory) / "run", HOST_BYTES, settings={"host.slab_bytes": 256 << 20})
        with daemon.populated(), daemon.client() as client, _verifying(daemon) as verifying:
            yield from _turns(made, client, verifying)


def _verifying(daemon: Daemon) -> Client:
    return Client(daemon.directory, "verifying", strict=True, timeout_ms=10_000, checksum_stores=True, verify="load")


def _turns(made: Blocks, client: Client, verifying: Client) -> Iterator[Figure]:
    table = SegmentTable.of(made.paged)
    spec = NamespaceSpec("bench", "gpu", "uint8", 16, (PAGED.segment_bytes,) * PAGED.segments)
    count = made.bytes // PAGED.block_bytes
    spaces = {each: each.open_namespace(spec) for each in (client, verifying)}
    fresh = (chain(f"gpu {number}", count) for number in itertools.count())

    def stored(by: Client, hashes: list[bytes]) -> float:
        began = time.perf_counter()
        result = by.store(spaces[by], hashes, table, made.ids, stream=None)
        if result.committed != count:
            raise BenchError(f"{result.committed} of {count} blocks were stored: {result.reason or 'no room'}")
        return time.perf_counter() - began

    def fetched(by: Client, hashes: list[bytes]) -> float:
        began = time.perf_counter()
        result = by.fetch(spaces[by], hashes, table, made.ids, stream=None)
        if result.blocks != count:
            raise BenchError(f"{result.blocks} of {count} blocks were fetched: {result.reason}")
        return time.perf_counter() - began

    rounds: list[tuple[float, ...]] = []
    for _ in range(REHEARSALS + TURNS):
        hashes = next(fresh)
        times = (stored(verifying, hashes), fetched(client, hashes), fetched(verifying, hashes))
        rounds.append((*times, made.plain(Direction.STORE)(), made.plain(Direction.LOAD)()))
    store, fetch, verified, plain_store, plain_load = zip(*rounds[REHEARSALS:], strict=True)
    results = (("fetch", fetch, plain_load), ("fetch_verified", verified, plain_load), ("store", store, plain_store))
    for what, times, bound in results:
        ratio = median(b / t for t, b in zip(times, bound, strict=True))
        rate = made.bytes / median(times) / 1e9
        limit = made.bytes / median(bound) / 1e9
        note = f"{rate:.1f} GB/s through daemon and client, plain copy {limit:.1f}"
        yield Figure(f"gpu_client_{what}_ratio", ratio, "x plain copy", limit, ratio, note=note)
