"""The nvme tier's rates, each beside fio on the same file system, by turns: what a client gets, what becomes durable.

fio always has its next request at hand and its data in memory, so the tier is measured with as much: two fetches at a
time, as the vLLM connector loads, of blocks that are on the drive alone, from the first request to the last byte in the
engine's memory; and host memory full of blocks that become durable (flushed, and indexed) while nobody stores. What a
single fetch reaches, and what becomes durable while a client stores, is told beside it. Every slot has been written
before, as in a daemon that has run for a day.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count, cycle
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np

from forebay.bench.bounds import pages_of
from forebay.bench.engine_memory import PLAIN, Layout, Pool, chain
from forebay.bench.figures import GIB, MIB, Figure
from forebay.bench.fio import Direction, Fio, Rate
from forebay.bench.footprint import cpu_s
from forebay.bench.plan import Plan, pinned
from forebay.bench.processes import BenchError, Daemon, pause, wait_until
from forebay.bench.timing import Pair, Series, by_turns, take_latency
from forebay.client import Client
from forebay.client.vllm_worker import LOAD_THREADS
from forebay.tiers.nvme_bandwidth import Bandwidth, write_bandwidth

DEPTH = 8
"""The default of nvme.queue_depth, and fio's."""
SLAB_BYTES = 64 * MIB
CHAINS = 8
FETCHES = LOAD_THREADS
"""At one time, as the vLLM connector loads."""
DIRTY_CHAINS = 3
"""Of the cold chains' size: what host memory has to write, and can hold beside what is being written."""
STORED_BYTES = 32 * MIB
"""By one call."""
STORED_SHARE = 1.1
"""Of what fio has just written."""
SETTLE_S = 0.3
FILL_S = 60.0
_WARM_S = 0.015
_WARM_TRIES = 200
_NOTHING = Series(())

LARGE, SMALL = PLAIN[0], PLAIN[2]
CPU_NAMES = ("nvme_cpu_s_per_gb_read", "nvme_cpu_s_per_gb_written")
LARGE_NAMES = ("nvme_fetch_2mib_ratio", CPU_NAMES[0], "nvme_write_2mib_ratio", CPU_NAMES[1])
SMALL_NAMES = ("nvme_fetch_64kib_ratio",)


def nvme_settings(directory: Path, nvme_bytes: int) -> Mapping[str, object]:
    """The tier in a directory of its own; all else but the sizes by default."""
    return {"nvme.paths": directory, "nvme.bytes": nvme_bytes, "nvme.slab_bytes": SLAB_BYTES}


def large(plan: Plan) -> Iterator[Figure]:
    """Both directions in blocks of 2 MiB; what was reached is written down for the daemon."""
    with _Rig(plan, LARGE) as rig:
        plan.progress("fetches of 2 MiB blocks from the drive")
        read = rig.fetches(plan.pick(4, 8))
        cpu = rig.cpu(CPU_NAMES[0])
        yield rig.ratio(LARGE_NAMES[0], read, rig.single(plan.pick(2, 4)))
        yield cpu
        if not plan.wants(*LARGE_NAMES[2:]):
            return
        plan.progress("2 MiB blocks of host memory written")
        write = rig.writes(plan.pick(4, 8))
        cpu = rig.cpu(CPU_NAMES[1])
        plan.progress("2 MiB blocks written while others are stored")
        yield rig.ratio(LARGE_NAMES[2], write, rig.storing(plan.pick(2, 4), plan.pick(1.0, 2.0)))
        yield cpu
        if plan.told is not None:
            reached = [1e9 * median(pair.measured.scaled(_rate)) for pair in (read, write)]
            bandwidth = Bandwidth.of(reached[0], reached[1], block_bytes=LARGE.block_bytes, queue_depth=DEPTH)
            write_bandwidth(plan.told, bandwidth)


def small(plan: Plan) -> Iterator[Figure]:
    """Fetches of 64 KiB blocks."""
    with _Rig(plan, SMALL) as rig:
        plan.progress("fetches of 64 KiB blocks from the drive")
        read = rig.fetches(plan.pick(4, 8))
        yield rig.ratio(SMALL_NAMES[0], read, rig.single(plan.pick(2, 4)))


class ColdChains:
    """Chains that are durable, more than host memory holds: fetched in turn, each is on the drive alone again."""

    def __init__(self, client: Client, layout: Layout, chain_bytes: int, chains: int = CHAINS, label: str = "") -> None:
        self._client = client
        self.pool = Pool(layout, chain_bytes)
        self.namespace = client.open_namespace(layout.spec)
        self._chains = [chain(f"cold {label} {number}", self.pool.blocks) for number in range(chains)]
        self._turns = cycle(self._chains)
        self._pools = [self.pool]

    def write(self) -> None:
        """Store all and wait until they are durable; then read them back and compare. Raises BenchError."""
        for number, hashes in enumerate(self._chains):
            self.pool.mark(number)
            stored = self._client.store(self.namespace, hashes, self.pool.table, self.pool.block_ids)
            if stored.committed != len(hashes):
                raise BenchError(f"{stored.committed} of {len(hashes)} new blocks were stored: {stored.reason}")
            kept = self._client.persist(self.namespace, hashes, timeout_ms=FILL_S * 1000)
            if kept.durable != len(hashes):
                raise BenchError(f"{kept.durable} of {len(hashes)} blocks became durable")
        for number in range(len(self._chains)):
            self.pool.wipe()
            self._fetch_next()
            if not self.pool.marked(number):
                raise BenchError("the bytes fetched are not the bytes stored")

    def _fetch_next(self) -> None:
        """Fetch the next chain, which is on the drive alone."""
        hashes = next(self._turns)
        found = self._client.lookup(self.namespace, hashes).by_tier
        if found.get("nvme") != len(hashes):
            raise BenchError(f"blocks to be read from the drive lie elsewhere: {found}")
        self._fetch(hashes, self.pool)

    def fetch_all(self, at_once: int) -> tuple[float, int]:
        """Fetch every chain, so many at one time; returns the seconds it took and the bytes read from the drive.

        Fewer than the chains have, where the daemon kept one in host memory: it may have learned that turns come again.
        """
        while len(self._pools) < at_once:
            self._pools.append(Pool(self.pool.layout, self.pool.total_bytes))
        wanted, before = iter([next(self._turns) for _ in self._chains]), self._promoted_bytes()

        def fetch_in_turn(pool: Pool) -> None:
            for hashes in wanted:  # one iterator for all
                self._fetch(hashes, pool)

        with ThreadPoolExecutor(at_once) as threads:
            begun = time.perf_counter()
            for each in [threads.submit(fetch_in_turn, pool) for pool in self._pools[:at_once]]:
                each.result()
            took = time.perf_counter() - begun
        return took, self._promoted_bytes() - before

    def _fetch(self, hashes: Sequence[bytes], pool: Pool) -> None:
        result = self._client.fetch(self.namespace, hashes, pool.table, pool.block_ids)
        if result.blocks != len(hashes):
            raise BenchError(f"{result.blocks} of {len(hashes)} blocks were fetched: {result.reason}")

    def _promoted_bytes(self) -> int:
        return int(self._client.status()["store"]["counters"]["promoted_bytes"])

    def warm_next(self) -> int:
        """Prefetch the next chain, as soon as there is room for it; returns the bytes asked for.

        No copy is made: what saturates a drive for others to feel it should take no core of theirs.
        """
        hashes, coming = next(self._turns), 0
        for _ in range(_WARM_TRIES):
            answer = self._client.prefetch(self.namespace, hashes)
            coming = answer.resident + answer.promised
            if coming == len(hashes):
                break
            pause(_WARM_S)
        return coming * self.pool.layout.block_bytes


class _Rig:
    """A daemon with an nvme tier, its client, and fio beside it."""

    def __init__(self, plan: Plan, layout: Layout) -> None:
        self._plan = plan
        self._layout = layout
        self._used = ExitStack()
        self._daemon_cpu_s = self._moved_gb = 0.0
        self._bounds: list[Rate] = []
        self._fresh = count()

    def __enter__(self) -> Self:
        plan, name = self._plan, f"nvme-{self._layout.name}"
        self._nvme_bytes = plan.pick(2, 4) * GIB
        try:
            self._used.enter_context(pinned(plan.cores.client))
            self._used.callback(shutil.rmtree, plan.on_drive / name, ignore_errors=True)
            settings = nvme_settings(plan.on_drive / name, self._nvme_bytes)
            self._daemon = self._used.enter_context(
                Daemon(plan.directory / name, plan.pick(512 * MIB, GIB), cores=plan.cores.free, settings=settings)
            )
            self._daemon.populated()
            self._client = self._used.enter_context(self._daemon.client())
            self._fio, self._no_fio = self._start_fio(pages_of(self._client.status()))
            self._cold = ColdChains(self._client, self._layout, plan.pick(128 * MIB, 256 * MIB))
            self._cold.write()
        except BaseException:
            self._used.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._used.close()

    def fetches(self, repetitions: int) -> Pair:
        """Seconds a GB, of fio and of fetches of every chain."""
        return self._by_turns("read", self._fetch_all, repetitions)

    def single(self, repetitions: int) -> str:
        """What is read when each chain is asked for once the one before it has come."""
        ended = [self._cold.fetch_all(1) for _ in range(repetitions)]
        rates = [size / took / 1e9 for took, size in ended]
        return f"; {median(rates):.2f} GB/s one fetch at a time"

    def writes(self, repetitions: int) -> Pair:
        """The same for blocks of host memory that become durable while nobody stores."""
        wait_until(self._has_filled, FILL_S, "writing every slot once")
        return self._by_turns("write", self._write_down, repetitions)

    def storing(self, repetitions: int, seconds: float) -> str:
        """What becomes durable while a client stores: a little more than fio has just written, and all it can."""
        paced = [self._storm(seconds, self._bytes_per_s()) for _ in range(repetitions)]
        unpaced = [self._storm(seconds, inf) for _ in range(repetitions)]
        return (
            f"; {median(paced):.2f} GB/s while a client stores a tenth more than fio, "
            f"{median(unpaced):.2f} while it stores without a pause"
        )

    def ratio(self, name: str, pair: Pair, more: str = "") -> Figure:
        measured = median(pair.measured.scaled(_rate))
        if self._fio is None:
            note = f"not measured: {self._no_fio}; forebay reached {measured:.2f} GB/s"
            return Figure(name, None, "x fio", note=note)
        bound, ratio = median(pair.bound.scaled(_rate)), pair.typical_rate_ratio
        samples = {"measured_gb_per_s": pair.measured.scaled(_rate), "bound_gb_per_s": pair.bound.scaled(_rate)}
        note = f"{measured:.2f} GB/s, fio {bound:.2f} GB/s ({self._fio.describe()}); medians, ratio turn by turn{more}"
        return Figure(name, ratio, "x fio", bound, ratio, samples, note)

    def cpu(self, name: str) -> Figure:
        """The daemon's CPU time in what `fetches` or `writes` has just measured, preparation left out."""
        value = self._daemon_cpu_s / self._moved_gb
        bound = min((rate.cpu_s_per_gb for rate in self._bounds), default=None)
        note = "CPU seconds of the daemon and its I/O process; bound: fio"
        return Figure(name, value, "s/GB", bound, value / bound if bound else None, note=note)

    def _start_fio(self, pages: str) -> tuple[Fio | None, str]:
        self._plan.progress("fio")
        try:
            fio = Fio(self._plan.on_drive, self._nvme_bytes, pages)
        except BenchError as error:
            return None, str(error)
        self._used.callback(fio.close)
        return fio, ""

    def _by_turns(self, direction: Direction, measured: Any, repetitions: int) -> Pair:
        self._daemon_cpu_s = self._moved_gb = 0.0
        self._bounds = []
        if self._fio is None:
            return Pair(_NOTHING, Series(tuple(take_latency(measured) for _ in range(repetitions))))
        return by_turns(lambda: self._bound(direction), measured, repetitions, take=take_latency)

    def _bound(self, direction: Direction) -> float:
        assert self._fio is not None
        rate = self._fio.random(direction, self._layout.block_bytes, DEPTH, self._plan.pick(1.0, 1.5))
        self._bounds.append(rate)
        return 1e9 / rate.bytes_per_s

    def _fetch_all(self) -> float:
        used = cpu_s(*self._daemon.pids)
        seconds, size = self._cold.fetch_all(FETCHES)
        return self._note(used, size, seconds)

    def _write_down(self) -> float:
        hashes = self._store_dirty()

        def are_durable() -> bool:
            kept = self._client.persist(self._cold.namespace, hashes, timeout_ms=0)
            return kept.durable == len(hashes)

        used, before, begun = cpu_s(*self._daemon.pids), self._durable_bytes(), time.perf_counter()
        wait_until(are_durable, FILL_S, "writing host memory down", step_s=0.004)
        took = time.perf_counter() - begun
        return self._note(used, self._durable_bytes() - before, took)

    def _store_dirty(self) -> Sequence[bytes]:
        """A chain in host memory of which next to nothing is on the drive, and nothing on its way there."""
        pool = self._cold.pool
        hashes = chain(f"dirty {next(self._fresh)}", DIRTY_CHAINS * pool.blocks)
        ids = np.tile(pool.block_ids, DIRTY_CHAINS)
        for end in range(pool.blocks, len(hashes) + 1, pool.blocks):
            wait_until(self._is_quiet, FILL_S, "ending what is being written")
            stored = self._client.store(self._cold.namespace, hashes[:end], pool.table, ids[:end])
            if stored.committed != pool.blocks:
                raise BenchError(f"{stored.committed} of {pool.blocks} new blocks were stored: {stored.reason}")
        wait_until(self._is_quiet, FILL_S, "ending what is being written")
        return hashes

    def _is_quiet(self) -> bool:
        return not self._client.status()["store"]["movement"]["writes"]

    def _bytes_per_s(self) -> float:
        """A little more than fio reached last; without it, no bound."""
        return STORED_SHARE * self._bounds[-1].bytes_per_s if self._bounds else inf

    def _storm(self, seconds: float, bytes_per_s: float) -> float:
        """GB/s."""
        self._store_for(SETTLE_S, bytes_per_s)
        before, begun = self._durable_bytes(), time.perf_counter()
        self._store_for(seconds, bytes_per_s)
        took = time.perf_counter() - begun
        return (self._durable_bytes() - before) / took / 1e9

    def _note(self, used_s: float, moved_bytes: int, seconds: float) -> float:
        if not moved_bytes:
            raise BenchError("nothing was moved")
        self._daemon_cpu_s += cpu_s(*self._daemon.pids) - used_s
        self._moved_gb += moved_bytes / 1e9
        return seconds / moved_bytes * 1e9

    def _store_for(self, seconds: float, bytes_per_s: float) -> None:
        """Store new chains, at most so many bytes a second."""
        pool = self._cold.pool
        blocks = STORED_BYTES // pool.layout.block_bytes
        begun, chain_s = time.perf_counter(), STORED_BYTES / bytes_per_s
        for stored in count():
            pause(max(0.0, begun + stored * chain_s - time.perf_counter()))
            if time.perf_counter() > begun + seconds:
                return
            hashes = chain(f"storm {next(self._fresh)}", blocks)
            self._client.store(self._cold.namespace, hashes, pool.table, pool.block_ids[:blocks])

    def _has_filled(self) -> bool:
        self._store_for(SETTLE_S, inf)
        return self._durable_bytes() > self._nvme_bytes

    def _durable_bytes(self) -> int:
        return int(self._client.status()["store"]["counters"]["demoted_bytes"])


def _rate(seconds_per_gb: float) -> float:
    return 1 / seconds_per_gb
