"""Host memory beside a busy drive: lookups and fetches of resident blocks while others keep the nvme tier saturated.

One process fetches blocks from the drive and another stores new ones, both without a pause. What is measured is what
that does to somebody whose blocks are in memory: the 99th percentile of his calls, over the same when all is quiet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from forebay.bench.engine_memory import INDEX, PLAIN, Layout, Pool, chain
from forebay.bench.figures import GIB, MIB, Figure
from forebay.bench.nvme import LARGE, nvme_settings
from forebay.bench.plan import Plan, pinned
from forebay.bench.processes import BenchError, Daemon, Worker, pause
from forebay.bench.timing import each, percentile
from forebay.client import Client, Namespace

NAME = "host_p99_under_nvme_ratio"
LOOKUP_BLOCKS = 1000
FETCH_BLOCKS = 16
FETCH_LAYOUT = PLAIN[2]
COLD_BYTES = 128 * MIB
COLD_CHAINS = 8
PACE_S = 0.001
"""Between two calls: without it, caller and daemon would leave nothing of their core to the kernel's own block I/O."""
_PERCENTS = (50, 90, 95, 99, 99.9, 100)


@dataclass(frozen=True, slots=True)
class _Quiet:
    """A call and how long it takes when nobody else does anything."""

    call: Callable[[], None]
    seconds: list[float]


def host(plan: Plan) -> Iterator[Figure]:
    """The worse of lookups and fetches."""
    settings = nvme_settings(plan.on_drive / "beside", 8 * GIB)
    daemon = Daemon(plan.directory / "beside", 512 * MIB, cores=plan.cores.daemon, settings=settings)
    calls = plan.pick(2000, 6000)
    with daemon.populated(), pinned(plan.cores.busy_client), daemon.client() as client:
        plan.progress("host memory beside a busy drive")
        work = {"lookup": _looker(client), "fetch": _fetcher(client)}
        loader, storer = (Worker(number, daemon, plan.cores.others) for number in range(2))
        try:
            loader.ask("attach", layout=LARGE.name, total_bytes=COLD_BYTES)
            loader.ask("cold", layout=LARGE.name, chain_bytes=COLD_BYTES, chains=COLD_CHAINS)
            storer.ask("attach", layout=LARGE.name, total_bytes=COLD_BYTES)
            quiet = {name: _Quiet(call, _paced(call, calls)) for name, call in work.items()}
            loader.tell("load")
            storer.tell("pour")
            for known in quiet.values():
                _paced(known.call, calls // 10)
            busy = {name: _paced(known.call, calls) for name, known in quiet.items()}
            moved = []
            for worker in (loader, storer):
                worker.tell("stop")
                moved.append(worker.hear()["bytes"])
        finally:
            loader.stop()
            storer.stop()
    yield _worse(quiet, busy, moved)


def _paced(call: Callable[[], None], calls: int) -> list[float]:
    """The time of each of `calls` calls, in seconds, a little apart."""
    taken = []
    for _ in range(calls):
        taken += each(call, 1)
        pause(PACE_S)
    return taken


def _worse(quiet: dict[str, _Quiet], busy: dict[str, list[float]], moved: list[int]) -> Figure:
    told, ratios, samples = [], {}, {}
    for name, known in quiet.items():
        before, beside = percentile(known.seconds, 99) * 1e3, percentile(busy[name], 99) * 1e3
        ratios[name] = beside / before
        told.append(f"{name} p99 {beside:.2f} ms, quiet {before:.2f} ms")
        samples[f"{name}_ms_p50_90_95_99_999_max"] = [percentile(busy[name], each) * 1e3 for each in _PERCENTS]
        samples[f"{name}_quiet_ms"] = [percentile(known.seconds, each) * 1e3 for each in _PERCENTS]
    worst = max(ratios.values())
    note = f"{'; '.join(told)}; meanwhile {moved[0] / GIB:.1f} GiB were loaded and {moved[1] / GIB:.1f} GiB stored"
    return Figure(NAME, worst, "x quiet p99", ratio=worst, samples=samples, note=note)


def _looker(client: Client) -> Callable[[], None]:
    hashes, namespace, _ = _resident(client, INDEX, LOOKUP_BLOCKS)

    def look() -> None:
        if client.lookup(namespace, hashes).by_tier.get("host") != len(hashes):
            raise BenchError("pinned blocks are not in host memory")

    return look


def _fetcher(client: Client) -> Callable[[], None]:
    hashes, namespace, pool = _resident(client, FETCH_LAYOUT, FETCH_BLOCKS)

    def fetch() -> None:
        if client.fetch(namespace, hashes, pool.table, pool.block_ids).blocks != len(hashes):
            raise BenchError("pinned blocks could not be fetched")

    return fetch


def _resident(client: Client, layout: Layout, blocks: int) -> tuple[list[bytes], Namespace, Pool]:
    """A chain in host memory that stays there: it is pinned."""
    pool = Pool(layout, blocks * layout.block_bytes)
    namespace = client.open_namespace(layout.spec)
    hashes = chain(f"resident {layout.name}", blocks)
    client.store(namespace, hashes, pool.table, pool.block_ids)
    if client.pin(namespace, hashes) != blocks:
        raise BenchError("blocks could not be pinned")
    return hashes, namespace, pool
