"""Copy figures: fetch and store, each against one memcpy of the same bytes in the same process.

The tier is filled first, through the client, so that every page of every slab is mapped here and a store has to make
room, as in a daemon that has run for a day. Stores are of new blocks each time. What was fetched is compared with what
was stored before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from forebay.bench.bounds import Memcpy, pages_of
from forebay.bench.engine_memory import PAGED, PLAIN, Layout, Pool, chain, contiguous
from forebay.bench.figures import GIB, MIB, Figure
from forebay.bench.plan import Plan, pinned
from forebay.bench.processes import BenchError, Cores, Daemon, Worker
from forebay.bench.timing import Pair, by_turns, take, timed
from forebay.client import Client, Namespace
from forebay.client.copy_threads import THREADS_AUTO_MAX

SMALL, LARGE = 64 * MIB, GIB
TOTALS = {SMALL: "", LARGE: "_1gib"}
ALONE = (PLAIN[0], PAGED)
CLIENTS = (1, 2, 4, 8)
CLIENT_BYTES = 64 * MIB
CLIENT_RUN_S = 1.0
MEMORY_NEEDED_BYTES = 6 * GIB
_BEGIN_IN_S = 0.3


def names(layout: Layout, total: int = SMALL) -> tuple[str, str, str]:
    """The figures of one layout and size: fetch, store, and store of what is there."""
    suffix = f"{layout.name}{TOTALS[total]}"
    return f"fetch_{suffix}_ratio", f"store_{suffix}_ratio", f"store_present_{suffix}_us_per_block"


def alone_names(layout: Layout) -> tuple[str, ...]:
    """Figures of the same transfer by one thread, for the layouts whose figures have targets."""
    return (f"fetch_{layout.name}_1thread_ratio", f"store_{layout.name}_1thread_ratio") if layout in ALONE else ()


def totals_of(layout: Layout) -> tuple[int, ...]:
    """Sizes of transfer measured of a layout."""
    return tuple(TOTALS) if layout in PLAIN else (SMALL,)


def layout_names(layout: Layout) -> tuple[str, ...]:
    return tuple(name for total in totals_of(layout) for name in names(layout, total)) + alone_names(layout)


def client_names(counts: tuple[int, ...] = CLIENTS) -> tuple[str, ...]:
    return tuple(f"{what}_{count}_clients_gb_per_s" for count in counts for what in ("fetch", "store"))


def one_client(plan: Plan, layout: Layout) -> Iterator[Figure]:
    """Fetch and store of one layout, 64 MiB and 1 GiB."""
    alone = plan.wants(*alone_names(layout))
    totals = [t for t in totals_of(layout) if plan.wants(*names(layout, t)) or (t == SMALL and alone)]
    if plan.quick and layout is not PLAIN[0]:
        totals = [total for total in totals if total == SMALL]
    if LARGE in totals and _available_bytes() < MEMORY_NEEDED_BYTES:
        plan.progress("not enough free memory for 1 GiB transfers")
        totals.remove(LARGE)
    if not totals:
        return
    host_bytes = 9 * GIB // 4 if LARGE in totals else GIB
    with pinned(plan.cores.client):
        daemon = Daemon(plan.directory / layout.name, host_bytes, cores=plan.cores.daemon)
        helpers = sorted(plan.cores.free - plan.cores.client)
        threads = min(THREADS_AUTO_MAX, 1 + len(helpers))
        with daemon.populated():
            with daemon.client(copy_threads=threads, copy_cpus=helpers) as client:
                for total in totals:
                    plan.progress(f"fetch and store of {total // MIB} MiB, {layout.name}")
                    yield from _transfers(plan, client, Pool(layout, total), total)
            if alone:
                with daemon.client() as client:
                    plan.progress(f"the same by one thread, {layout.name}")
                    fetch, store, _ = _transfers(plan, client, Pool(layout, SMALL), SMALL)
                    for name, figure in zip(alone_names(layout), (fetch, store), strict=True):
                        yield replace(figure, name=name)


def _transfers(plan: Plan, client: Client, pool: Pool, total: int) -> Iterator[Figure]:
    status = client.status()
    namespace = client.open_namespace(pool.layout.spec)
    memcpy = Memcpy(contiguous(pool), pages_of(status))
    _fill(client, namespace, pool, int(status["tiers"][0]["capacity_bytes"]))
    kept = chain(f"kept {total}", pool.blocks)
    pool.mark(total // MIB)
    _store(client, namespace, pool, kept)
    pool.wipe()
    _fetch(client, namespace, pool, kept)
    if not pool.marked(total // MIB):
        raise BenchError("the bytes fetched are not the bytes stored")
    repetitions = plan.pick(15, 40) if total == SMALL else plan.pick(4, 10)
    fetch, store, present = names(pool.layout, total)
    again = by_turns(memcpy.out(), timed(lambda: _fetch(client, namespace, pool, kept)), repetitions)
    yield _rate(fetch, again, pool)
    fresh = (chain(f"fresh {total} {number}", pool.blocks) for number in range(10_000))

    def store_new() -> float:
        hashes = next(fresh)
        return timed(lambda: _store(client, namespace, pool, hashes))()

    store_new()
    yield _rate(store, by_turns(memcpy.into(), store_new, repetitions), pool)
    last = next(fresh)
    _store(client, namespace, pool, last)
    taken = [take(timed(lambda: _store_present(client, namespace, pool, last))).seconds for _ in range(repetitions)]
    per_block = [seconds * 1e6 / pool.blocks for seconds in taken]
    yield Figure(present, min(per_block), "us", samples={"us": per_block}, note=f"{pool.blocks} blocks a store")


def _fill(client: Client, namespace: Namespace, pool: Pool, capacity_bytes: int) -> None:
    """Store until the tier has been filled once and room was made once more."""
    for number in range(capacity_bytes // pool.total_bytes + 1):
        _store(client, namespace, pool, chain(f"fill {pool.total_bytes} {number}", pool.blocks))


def _store(client: Client, namespace: Namespace, pool: Pool, hashes: list[bytes]) -> None:
    result = client.store(namespace, hashes, pool.table, pool.block_ids)
    if result.committed != len(hashes):
        raise BenchError(f"{result.committed} of {len(hashes)} new blocks were stored: {result.reason or 'no room'}")


def _store_present(client: Client, namespace: Namespace, pool: Pool, hashes: list[bytes]) -> None:
    result = client.store(namespace, hashes, pool.table, pool.block_ids)
    if result.present != len(hashes):
        raise BenchError(f"{result.present} of {len(hashes)} stored blocks were present")


def _fetch(client: Client, namespace: Namespace, pool: Pool, hashes: list[bytes]) -> None:
    result = client.fetch(namespace, hashes, pool.table, pool.block_ids)
    if result.blocks != len(hashes):
        raise BenchError(f"{result.blocks} of {len(hashes)} stored blocks were fetched: {result.reason}")


def _rate(name: str, pair: Pair, pool: Pool) -> Figure:
    def rate(seconds: float) -> float:
        return pool.total_bytes / seconds / 1e9

    measured, bound = rate(pair.measured.best_s), rate(pair.bound.best_s)
    note = f"{measured:.1f} GB/s, memcpy by one thread {bound:.1f} GB/s" + (f"; {pair.note()}" if pair.note() else "")
    samples = {"measured_gb_per_s": pair.measured.scaled(rate), "bound_gb_per_s": pair.bound.scaled(rate)}
    return Figure(name, pair.rate_ratio, "x memcpy", bound, pair.rate_ratio, samples, note)


def many_clients(plan: Plan) -> Iterator[Figure]:
    """1 to 8 client processes at once; the bound is as many processes that only copy."""
    counts = [count for count in CLIENTS if plan.wants(*client_names((count,)))]
    if not counts:
        return
    host_bytes = (max(counts) + 4) * CLIENT_BYTES
    daemon = Daemon(plan.directory / "clients", host_bytes, cores=plan.cores.free)
    with daemon.populated():
        workers: list[Worker] = []
        try:
            for count in counts:
                plan.progress(f"{count} clients at once")
                while len(workers) < count:
                    workers.append(_worker(plan.cores, len(workers), daemon))
                for what in ("fetch", "store"):
                    yield _together(workers, what, count)
        finally:
            for worker in workers:
                worker.stop()


def _worker(cores: Cores, number: int, daemon: Daemon) -> Worker:
    """Each on one core, in turn: the kernel may otherwise pack them all on one."""
    ordered = sorted(cores.free)
    worker = Worker(number, daemon, frozenset((ordered[number % len(ordered)],)))
    worker.ask("attach", layout=PLAIN[0].name, total_bytes=CLIENT_BYTES)
    worker.ask("fill")
    return worker


def _together(workers: list[Worker], what: str, count: int) -> Figure:
    if what == "fetch":
        workers[0].ask("share")  # again each time: stores take its room
    copy = {"fetch": "memcpy_out", "store": "memcpy_into"}[what]
    bound = _aggregate(workers, copy)
    measured = _aggregate(workers, what)
    ratio = measured / bound
    note = f"{count} processes together; bound: as many that memcpy"
    return Figure(f"{what}_{count}_clients_gb_per_s", measured, "GB/s", bound, ratio, note=note)


def _aggregate(workers: list[Worker], what: str) -> float:
    begin = time.monotonic() + _BEGIN_IN_S
    for worker in workers:
        worker.tell("run", what=what, begin_s=begin, end_s=begin + CLIENT_RUN_S)
    answers = [worker.hear() for worker in workers]
    span = max(answer["ended_s"] for answer in answers) - min(answer["begun_s"] for answer in answers)
    return float(sum(answer["bytes"] for answer in answers) / span / 1e9)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
