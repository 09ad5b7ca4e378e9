"""Control figures: round trips and lookups, quiet and beside busy clients; stores of blocks that are there already.

Client on one core, daemon (or echo server) on the other. A repetition is the median of many calls; the value is the
best repetition. Lookups rotate over ten chains, so that an index of 1e5 blocks is walked and not one warm chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from statistics import median

import numpy as np

from forebay.bench.bounds import Echo
from forebay.bench.engine_memory import INDEX, PLAIN, chain
from forebay.bench.figures import GIB, MIB, Figure
from forebay.bench.plan import Plan, pinned
from forebay.bench.processes import BenchError, Daemon, Worker
from forebay.bench.timing import Pair, by_turns, each, percentile, take_latency, typical
from forebay.client import Client, Namespace, SegmentTable
from forebay.transports.codec import encode_reply, encode_request
from forebay.transports.messages import (
    BOOT_ID_BYTES,
    LookupReply,
    LookupRequest,
    PingReply,
    PingRequest,
    Reply,
    Request,
)

RESIDENT_BLOCKS = 100_000
CHAINS = 10
CHAIN_BLOCKS = RESIDENT_BLOCKS // CHAINS
LOOKUPS = {1: 200, 100: 200, 1000: 100, 10_000: 20}
"""Hashes of a lookup -> calls in a repetition."""
PRESENT_BLOCKS = 1000
BUSY_BYTES = 64 * MIB

ECHO_NAMES = ("lookup_1000_echo_ratio", "lookup_1000_short_echo_ratio")
LOOKUP_NAMES = (*(f"lookup_{count}_ms" for count in LOOKUPS), *ECHO_NAMES)
BUSY_NAMES = ("lookup_1000_busy_p99_ratio", "lookup_1000_busy4_p99_ratio")
PRESENT_NAMES = ("store_present_us_per_block", "store_present_bytes")


def ping(plan: Plan) -> Iterator[Figure]:
    """A ping against a bare echo of messages as long."""
    with pinned(plan.cores.client):
        daemon = Daemon(plan.directory / "ping", 64 * MIB, cores=plan.cores.daemon)
        with daemon.populated(), daemon.client() as client, Echo(daemon.directory, plan.cores.daemon) as echo:
            bare = echo.caller(*_lengths(PingRequest(), PingReply()))
            calls, repetitions = plan.pick(300, 1000), plan.pick(15, 30)
            pair = by_turns(typical(bare, calls), typical(client.ping, calls), repetitions, take=take_latency)
    best = pair.measured.best_s, pair.bound.best_s
    note = f"ping {best[0] * 1e6:.1f} us, echo {best[1] * 1e6:.1f} us"
    yield Figure("ping_ratio", pair.time_ratio, "x echo", best[1] * 1e6, pair.time_ratio, _in_us(pair), note)


def index(plan: Plan) -> Iterator[Figure]:
    """Everything that wants 1e5 resident blocks."""
    settings = {"leases.slab_idle_s": 3600}  # the index's slabs stay its own while others store
    daemon = Daemon(plan.directory / "index", 5 * GIB // 4, cores=plan.cores.daemon, settings=settings)
    with daemon.populated():
        with (
            pinned(plan.cores.client),
            daemon.client() as client,
            Echo(daemon.directory, plan.cores.daemon) as echo,
        ):
            namespace = client.open_namespace(INDEX.spec)
            chains = fill(client, namespace)
            if plan.wants(*LOOKUP_NAMES):
                yield from _lookups(plan, client, namespace, chains, echo)
            if plan.wants(*PRESENT_NAMES):
                yield from _present(plan, client, namespace, chains[0], daemon)
        if plan.wants(*BUSY_NAMES):
            yield from _busy(plan, daemon, chains)


def fill(client: Client, namespace: Namespace, batch: int = 1000) -> list[list[bytes]]:
    """Make RESIDENT_BLOCKS blocks resident, their bytes left as they are; returns their chains."""
    chains = [chain(f"index {number}", CHAIN_BLOCKS) for number in range(CHAINS)]
    for hashes in chains:
        parent = b""
        for first in range(0, len(hashes), batch):
            part = hashes[first : first + batch]
            with client.reserve(namespace, part, parent) as reservation:
                committed = reservation.commit()
            if committed != len(part):
                raise BenchError(f"filling the index: {committed} of {len(part)} blocks were committed")
            parent = part[-1]
    return chains


def _lookups(
    plan: Plan, client: Client, namespace: Namespace, chains: list[list[bytes]], echo: Echo
) -> Iterator[Figure]:
    for count, calls in LOOKUPS.items():
        name = f"lookup_{count}_ms"
        if not plan.wants(name, *(ECHO_NAMES if count == 1000 else ())):
            continue
        plan.progress(f"lookup of {count}")
        request, reply = (
            LookupRequest(1, b"".join(chains[0][:count])),
            LookupReply(count, (("host", count),), 0, "", count),
        )
        asked, answered = _lengths(request, reply)
        work = typical(_looker(client, namespace, chains, count), calls)
        bare = typical(echo.caller(asked, asked), calls)
        pair = by_turns(bare, work, plan.pick(10, 25), take=take_latency)
        ms, bound_ms = pair.measured.best_s * 1e3, pair.bound.best_s * 1e3
        yield Figure(name, ms, "ms", bound_ms, pair.time_ratio, _in_us(pair), "bound: raw echo of the request")
        if count == 1000:
            yield _echo_ratio(ECHO_NAMES[0], pair)
            bare = typical(echo.caller(asked, answered), calls)
            yield _echo_ratio(ECHO_NAMES[1], by_turns(bare, work, plan.pick(10, 25), take=take_latency))


def _echo_ratio(name: str, pair: Pair) -> Figure:
    ms, bound_ms = pair.measured.best_s * 1e3, pair.bound.best_s * 1e3
    note = f"lookup {ms:.3f} ms, echo {bound_ms:.3f} ms"
    return Figure(name, pair.time_ratio, "x echo", bound_ms, pair.time_ratio, _in_us(pair), note)


def _looker(client: Client, namespace: Namespace, chains: list[list[bytes]], count: int) -> Callable[[], None]:
    """A function that looks up `count` resident hashes of the next chain, and raises when they are not all found."""
    parts = cycle([hashes[:count] for hashes in chains])

    def look() -> None:
        found = client.lookup(namespace, next(parts)).blocks
        if found != count:
            raise BenchError(f"a lookup found {found} of {count} resident blocks")

    return look


def _present(plan: Plan, client: Client, namespace: Namespace, hashes: list[bytes], daemon: Daemon) -> Iterator[Figure]:
    """Time, and proof that nothing is copied: the same store out of memory that no process may read."""
    plan.progress("stores of present blocks")
    part = hashes[:PRESENT_BLOCKS]
    table = SegmentTable.of(np.zeros((len(part), INDEX.block_bytes), np.uint8))
    look = _looker(client, namespace, [hashes], len(part))

    def store() -> None:
        result = client.store(namespace, part, table)
        if result.present != len(part) or result.bytes:
            raise BenchError(f"{result.present} of {len(part)} stored blocks were present")

    pair = by_turns(typical(look, 50), typical(store, 50), plan.pick(10, 25), take=take_latency)
    us, bound_us = (series.best_s * 1e6 / len(part) for series in (pair.measured, pair.bound))
    samples = _in_us(pair)
    note = f"{len(part)} blocks a store; bound: a lookup of them"
    yield Figure("store_present_us_per_block", us, "us", bound_us, us / bound_us, samples, note)
    with Worker(0, daemon, plan.cores.client) as worker:
        answer = worker.ask("present", layout=INDEX.name, label="index 0", blocks=len(part))
    if answer["present"] != len(part):
        raise BenchError(f"only {answer['present']} of {len(part)} blocks were present")
    yield Figure("store_present_bytes", answer["bytes"], "bytes", note="copied, out of memory mapped unreadable")


def _busy(plan: Plan, daemon: Daemon, chains: list[list[bytes]]) -> Iterator[Figure]:
    """Lookups beside others that store and fetch without a pause.

    The others have cores of their own, apart from the daemon's: what is measured is what their requests cost the
    lookups, not how the kernel shares out too few cores.
    """
    with pinned(plan.cores.busy_client), daemon.client() as client:
        look = _looker(client, client.open_namespace(INDEX.spec), chains, 1000)
        for name, others in zip(BUSY_NAMES, (1, 4), strict=True):
            if plan.wants(name):
                plan.progress(f"lookups beside {others} busy clients")
                calls = plan.pick(2500, 10_000) // (1 if others == 1 else 2)
                workers = [Worker(number, daemon, plan.cores.others) for number in range(others)]
                try:
                    yield _beside(name, workers, look, calls)
                finally:
                    for worker in workers:
                        worker.stop()


def _beside(name: str, workers: list[Worker], look: Callable[[], None], calls: int) -> Figure:
    for worker in workers:
        worker.ask("attach", layout=PLAIN[0].name, total_bytes=BUSY_BYTES)
    idle = each(look, calls // 2)
    for worker in workers:
        worker.tell("churn")
    each(look, calls // 10)
    busy = each(look, calls)
    for worker in workers:
        worker.tell("stop")
    moved = sum(worker.hear()["bytes"] for worker in workers)
    idle_ms, busy_ms = median(idle) * 1e3, percentile(busy, 99) * 1e3
    note = (
        f"p99 {busy_ms:.2f} ms (p50 {median(busy) * 1e3:.2f}) beside {len(workers)}, idle p50 {idle_ms:.3f} ms;"
        f" the others moved {moved / GIB:.1f} GiB"
    )
    spread = [percentile(busy, percent) * 1e3 for percent in (50, 90, 95, 99, 99.9, 100)]
    samples = {"busy_ms_p50_90_95_99_999_max": spread}
    return Figure(name, busy_ms / idle_ms, "x idle p50", idle_ms, busy_ms / idle_ms, samples, note)


def _lengths(request: Request, reply: Reply) -> tuple[int, int]:
    """Bytes on the wire, both ways."""
    return len(encode_request(1, bytes(16), request)), len(encode_reply(1, bytes(BOOT_ID_BYTES), reply))


def _in_us(pair: Pair) -> dict[str, list[float]]:
    return {
        "measured_us": pair.measured.scaled(lambda seconds: seconds * 1e6),
        "bound_us": pair.bound.scaled(lambda seconds: seconds * 1e6),
    }
