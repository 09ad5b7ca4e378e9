"""Host memory beside a busy drive: lookups and fetches of resident blocks while the nvme tier is saturated.

One process prefetches blocks from the drive without a pause, another stores new ones as fast as they become durable.
Neither copies a byte, as with GPUs that read and write the slots by DMA. What is measured is what that does to
somebody whose blocks are in memory: the 99th percentile of his calls, over the same when all is quiet. The bound is the
same with fio at the drive instead: what any reader of it costs its neighbours on these cores. Nobody is pinned: the
kernel places daemon, caller and the others, as it does in service.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from forebay.bench.bounds import pages_of
from forebay.bench.engine_memory import INDEX, PLAIN, Layout, Pool, chain
from forebay.bench.figures import GIB, MIB, Figure
from forebay.bench.fio import Fio
from forebay.bench.nvme import DEPTH, LARGE, nvme_settings
from forebay.bench.plan import Plan, pinned
from forebay.bench.processes import BenchError, Daemon, Worker, pause, wait_until
from forebay.bench.timing import each, percentile
from forebay.client import Client, Namespace

NAME = "host_p99_under_nvme_ratio"
LOOKUP_BLOCKS = 1000
FETCH_BLOCKS = 16
FETCH_LAYOUT = PLAIN[2]
COLD_BYTES = 32 * MIB
COLD_CHAINS = 32
STORED_BYTES = 16 * MIB
CALLS = 300
TURNS = 10
"""Of each kind, by turns and short, so that the slow seconds of a shared machine fall on all kinds alike."""
FIO_START_S = 1.0
"""Until it reads."""
PACE_S = 0.005
"""Between two calls: fewer than 200 a second. With one every millisecond caller and daemon alone take a core of two,
and no core is ever halted: both p99s are then of a machine that is busy with lookups."""
IDLE_S = 30
_BUSY = ("loading", "storing", "queued_load_blocks", "queued_write_blocks", "index_queue")
_PERCENTS = (50, 90, 95, 99, 99.9, 100)

Call = Callable[[], None]
Times = dict[str, list[float]]


def host(plan: Plan) -> Iterator[Figure]:
    """The worse of lookups and fetches."""
    settings = nvme_settings(plan.on_drive / "beside", 8 * GIB)
    daemon = Daemon(plan.directory / "beside", 512 * MIB, cores=plan.cores.free, settings=settings)
    with daemon.populated(), pinned(plan.cores.free), daemon.client() as client:
        plan.progress("host memory beside a busy drive")
        work = {"lookup": _looker(client), "fetch": _fetcher(client)}
        quiet, beside_fio, busy = (Times({name: [] for name in work}) for _ in range(3))
        workers = [Worker(number, daemon, plan.cores.free) for number in range(2)]
        try:
            workers[1].ask("attach", layout=LARGE.name, total_bytes=STORED_BYTES)
            workers[0].ask("cold", layout=LARGE.name, chain_bytes=COLD_BYTES, chains=COLD_CHAINS)
            moved, took_s = [0, 0], 0.0
            with _fio(plan, client) as fio:
                for _ in range(plan.pick(3, TURNS)):
                    _measure(work, quiet)
                    if fio is not None:
                        with fio.beside("read", LARGE.block_bytes, DEPTH, plan.directory / "fio.log") as process:
                            pause(FIO_START_S)
                            _measure(work, beside_fio)
                            process.check()
                    before, begun = _moved(client), time.monotonic()
                    for worker, order in zip(workers, ("warm", "keep")):
                        worker.tell(order)
                    _measure(work, busy)
                    for worker in workers:
                        worker.tell("stop")
                        worker.hear()
                    took_s += time.monotonic() - begun
                    moved = [total + after - at for total, at, after in zip(moved, before, _moved(client))]
                    wait_until(lambda: _is_idle(client), IDLE_S, "ending what the drive has under way")
            rates = [total / took_s / 1e9 for total in moved]
        finally:
            for worker in workers:
                worker.stop()
    yield _worse(quiet, beside_fio, busy, rates)


def _measure(work: dict[str, Call], times: Times) -> None:
    """One turn: the first tenth of its calls is thrown away."""
    for name, call in work.items():
        times[name] += _paced(call, CALLS + CALLS // 10)[CALLS // 10 :]


@contextmanager
def _fio(plan: Plan, client: Client) -> Iterator[Fio | None]:
    """fio on a file of its own; None where there is none."""
    try:
        fio = Fio(plan.on_drive, 2 * GIB, pages_of(client.status()))
    except BenchError:
        yield None
        return
    with closing(fio):
        yield fio


def _moved(client: Client) -> tuple[int, int]:
    """Bytes read from and written to the drive so far."""
    detail = client.status()["nvme"]
    return detail["read_bytes"], detail["written_bytes"]


def _is_idle(client: Client) -> bool:
    """Whether nothing is read or written, or waits to be."""
    status = client.status()
    drives = status["nvme"]["drives"]
    return not status["store"]["movement"]["writes"] and not any(drive[name] for drive in drives for name in _BUSY)


def _paced(call: Callable[[], None], calls: int) -> list[float]:
    """The time of each of `calls` calls, in seconds, a little apart."""
    taken = []
    for _ in range(calls):
        taken += each(call, 1)
        pause(PACE_S)
    return taken


def _worse(quiet: Times, beside_fio: Times, busy: Times, rates: list[float]) -> Figure:
    told, ratios, bounds, samples = [], {}, {}, {}
    for name in quiet:
        measured = {"quiet": quiet[name], "fio": beside_fio[name], "busy": busy[name]}
        p99 = {when: percentile(times, 99) * 1e3 for when, times in measured.items() if times}
        ratios[name], bounds[name] = p99["busy"] / p99["quiet"], p99["fio"] / p99["quiet"] if "fio" in p99 else None
        told.append(f"{name} p99 " + ", ".join(f"{when} {value:.2f} ms" for when, value in p99.items()))
        for when in p99:
            samples[f"{name}_{when}_ms_p50_90_95_99_999_max"] = [
                percentile(measured[when], at) * 1e3 for at in _PERCENTS
            ]
    worst = max(ratios, key=ratios.__getitem__)
    note = f"{'; '.join(told)}; meanwhile {rates[0]:.2f} GB/s were read and {rates[1]:.2f} GB/s written"
    return Figure(NAME, ratios[worst], "x quiet p99", bounds[worst], ratios[worst], samples, note)


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
