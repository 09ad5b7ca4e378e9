"""What the daemon costs: memory, CPU and time to start; and whether a full tier stays full and answers every store."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forebay.bench.control import RESIDENT_BLOCKS, fill
from forebay.bench.engine_memory import INDEX, PLAIN, Pool, chain
from forebay.bench.figures import GIB, MIB, Figure
from forebay.bench.plan import Plan, pinned
from forebay.bench.processes import BenchError, Daemon, Process, pause
from forebay.bench.timing import Series, take
from forebay.client import BlockOutcome, Client

IDLE_HOST_BYTES = GIB
FILL_HOST_BYTES = 256 * MIB
FILL_LAYOUT = PLAIN[1]
FILL_CHAIN_BYTES = 16 * MIB
SETTLE_S = 1.0
IDLE_NAMES = ("idle_rss_mib", "idle_cpu_percent")
_POLL_S = 0.001
_BARE = "import zmq, msgpack, psutil"


def start(plan: Plan) -> Iterator[Figure]:
    """From exec to the first ping answered, by default settings but for the size."""
    plan.progress("start")
    root = plan.directory
    _start_once(root / "start-warm")  # compiles modules, as an installation does
    _bare_once(root)
    bounds, starts = [], []
    for number in range(plan.pick(4, 10)):
        bounds.append(take(lambda: _bare_once(root)))
        starts.append(take(lambda n=number: _start_once(root / f"start-{n}")))  # type: ignore[misc]
    measured, bound = Series(tuple(starts)), Series(tuple(bounds))
    ms, bound_ms = measured.best_s * 1e3, bound.best_s * 1e3
    samples = {"measured_ms": measured.scaled(_ms), "bound_ms": bound.scaled(_ms)}
    note = "bound: an interpreter that imports zmq, msgpack and psutil, and ends"
    yield Figure("start_ms", ms, "ms", bound_ms, ms / bound_ms, samples, note)


def _ms(seconds: float) -> float:
    return seconds * 1e3


def _start_once(directory: Path) -> float:
    with Daemon(directory, IDLE_HOST_BYTES) as daemon:
        daemon.ready(step_s=_POLL_S)
        return time.monotonic() - daemon.started_s


def _bare_once(directory: Path) -> float:
    started = time.monotonic()
    with Process("python", [sys.executable, "-P", "-c", _BARE], directory / "bare.log") as process:
        process.child.wait(10)
    return time.monotonic() - started


def resting(plan: Plan) -> Iterator[Figure]:
    """A daemon whose memory is touched: first with nobody attached, then after 1e5 blocks were stored."""
    with Daemon(plan.directory / "resting", GIB) as daemon:
        daemon.populated()
        if plan.wants(*IDLE_NAMES):
            plan.progress("an idle daemon")
            yield from _idle(daemon.pid, plan.pick(5.0, 15.0))
        if plan.wants("rss_bytes_per_block"):
            plan.progress("memory per block")
            yield _metadata(daemon)


def _idle(pid: int, seconds: float) -> Iterator[Figure]:
    pause(SETTLE_S)
    before, begun = cpu_s(pid), time.monotonic()
    pause(seconds)
    percent = (cpu_s(pid) - before) / (time.monotonic() - begun) * 100
    memory = memory_mib(pid)
    note = "VmRSS, of it RssAnon {RssAnon:.1f}, RssFile {RssFile:.1f}, RssShmem (slabs) {RssShmem:.1f}".format(**memory)
    yield Figure("idle_rss_mib", memory["VmRSS"], "MiB", samples={"mib": list(memory.values())}, note=note)
    yield Figure("idle_cpu_percent", percent, "% of a core", note=f"over {seconds:g} s, all threads, nobody attached")


def _metadata(daemon: Daemon) -> Figure:
    """What resident blocks add to the daemon's memory, slabs not counted."""
    with daemon.client() as client:
        namespace = client.open_namespace(INDEX.spec)
        client.lookup(namespace, chain("absent", 1000))
        before = own_bytes(daemon.pid)
        fill(client, namespace)
        pause(SETTLE_S)
        after = own_bytes(daemon.pid)
    each_bytes = (after - before) / RESIDENT_BLOCKS
    note = f"{before / MIB:.1f} -> {after / MIB:.1f} MiB (VmRSS less RssShmem) over {RESIDENT_BLOCKS} blocks"
    return Figure("rss_bytes_per_block", each_bytes, "B", note=note)


def full_tier(plan: Plan) -> Iterator[Figure]:
    """Stores without end, several times the tier: how full it stays, and whether any block went unanswered."""
    plan.progress("endless stores")
    with pinned(plan.cores.client), Daemon(plan.directory / "full", FILL_HOST_BYTES, cores=plan.cores.daemon) as daemon:
        daemon.populated()
        with daemon.client() as client:
            fills, outcomes = _store_endlessly(client, plan.pick(6, 30))
    unanswered = outcomes.pop("unanswered")
    told = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    note = f"lowest of {len(fills)} readings once full; bytes of resident blocks over host.bytes"
    yield Figure("fill_ratio", min(fills), "x capacity", 1.0, min(fills), {"fill": fills}, note)
    yield Figure("unanswered_stores", unanswered, "blocks", note=f"answered: {told}")


def _store_endlessly(client: Client, times: int) -> tuple[list[float], Counter[str]]:
    """Store `times` the tier's size; returns the fill after each store beyond the first full tier."""
    pool = Pool(FILL_LAYOUT, FILL_CHAIN_BYTES)
    namespace = client.open_namespace(FILL_LAYOUT.spec)
    capacity = _tier(client)["capacity_bytes"]
    outcomes: Counter[str] = Counter({"unanswered": 0})
    fills = []
    for number in range(times * capacity // pool.total_bytes):
        hashes = chain(f"endless {number}", pool.blocks)
        result = client.store(namespace, hashes, pool.table, pool.block_ids)
        outcomes.update(outcome.name.lower() for outcome in result.outcomes if outcome not in _UNANSWERED)
        answered = sum(outcome not in _UNANSWERED for outcome in result.outcomes)
        outcomes["unanswered"] += len(hashes) - answered
        if (number + 1) * pool.total_bytes > capacity:
            fills.append(_tier(client)["resident_bytes"] / capacity)
    if not fills:
        raise BenchError("the tier was never full")
    return fills, outcomes


_UNANSWERED = (BlockOutcome.UNAVAILABLE, BlockOutcome.FAILED)


def _tier(client: Client) -> dict[str, Any]:
    tier: dict[str, Any] = client.status()["store"]["tiers"][0]
    return tier


def cpu_s(*pids: int) -> float:
    """Seconds of CPU that the processes' living threads have used, to the nanosecond."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def memory_mib(pid: int) -> dict[str, float]:
    """VmRSS and what it is made of."""
    wanted = ("VmRSS", "RssAnon", "RssFile", "RssShmem")
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) / 1024 for words in lines if words and words[0][:-1] in wanted}


def own_bytes(pid: int) -> float:
    """Resident memory without shared memory: slabs belong to their blocks, not to the daemon."""
    memory = memory_mib(pid)
    return (memory["VmRSS"] - memory["RssShmem"]) * MIB
