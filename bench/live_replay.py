"""`python -P -m forebay.bench.live_replay TRACE`: a trace through a daemon, beside a replay of the same requests.

A daemon of its own process is asked what the trace's requests would ask, by a client: look up, read what is there, and
store the rest. Blocks have 4 KiB and say whose they are, time runs faster, and the requests are sent one after the
other. What was sent when is then replayed (`replay_run`) with as many blocks of memory. Hit rates that differ are a
fault of the daemon, the client or the replay.

Exit status: 0 all targets met, 1 not so, 2 usage (a trace that is none).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forebay.bench.processes import BenchError, Daemon
from forebay.bench.replay_policies import policy_maker
from forebay.bench.replay_run import BLOCK_BYTES, replay
from forebay.bench.trace import BadTrace, Request, Trace, read_trace
from forebay.client import BlockOutcome, Client, NamespaceSpec
from forebay.kvstore.errors import ForebayError
from forebay.kvstore.shapes import SHAPES

SLAB_BYTES_MIN = 64 << 10
SLABS = 64
HOST_BYTES_MIN = 1 << 20
OCCUPANCY_MIN = 0.97
DIFFERENCE_MAX = 0.5
LOOK_EVERY = 10
"""Requests between two readings of the occupancy."""

_UNANSWERED = (BlockOutcome.UNAVAILABLE, BlockOutcome.FAILED)
_SHAPE = SHAPES["llama-3-8b"]
_never = threading.Event()
"""Is waited for where only time is."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it. Rates in percent of tokens, cold.

    Attributes:
        capacity_blocks: of memory, in both.
        occupancy: resident share of memory, the least reading once it was full; None when it never was.
        unanswered: blocks for which a store brought no outcome; `outcomes` counts the others.
        wrong: blocks read whose bytes were another block's, or that a lookup promised and nobody could read.
        late_s: the most that a request was behind its time.
    """

    requests: int
    capacity_blocks: int
    live_percent: float
    replay_percent: float
    occupancy: float | None
    unanswered: int
    wrong: int
    late_s: float
    outcomes: dict[str, int]

    @property
    def ok(self) -> bool:
        full = self.occupancy is None or self.occupancy >= OCCUPANCY_MIN
        same = abs(self.live_percent - self.replay_percent) <= DIFFERENCE_MAX
        return full and same and not self.unanswered and not self.wrong


def compare(
    trace: Trace,
    host_percent: float,
    directory: Path,
    *,
    policy: str = "hazard",
    seconds: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Run the trace within about `seconds` (0: as fast as it goes), then its replay.

    Raises BenchError, ForebayError.
    """
    host_bytes = max(HOST_BYTES_MIN, int(host_percent / 100 * trace.unique_blocks) * BLOCK_BYTES)
    slab_bytes = max(SLAB_BYTES_MIN, 1 << (host_bytes // SLABS).bit_length() - 1)
    host_bytes = max(HOST_BYTES_MIN, host_bytes // slab_bytes * slab_bytes)
    settings = {"host.slab_bytes": slab_bytes, "host.eviction": policy}
    with Daemon(directory, host_bytes, settings=settings) as daemon:
        daemon.populated()
        with daemon.client() as client:
            run = _Live(client)
            for number, request in enumerate(_paced(trace, seconds, run)):
                run.ask(request)
                if number % LOOK_EVERY == 0:
                    run.look()
                progress(number + 1, len(trace.requests))
            capacity = run.look()
    sent = replace(trace, requests=tuple(run.sent))
    again = replay(sent, policy, policy_maker(policy, sent, _SHAPE), capacity, shape=_SHAPE)
    return Comparison(
        requests=len(run.sent),
        capacity_blocks=capacity,
        live_percent=100 * run.hit_tokens / max(1, run.asked_tokens),
        replay_percent=again.token_hit_percent,
        occupancy=min(run.occupancies, default=None),
        unanswered=run.unanswered,
        wrong=run.wrong,
        late_s=run.late_s,
        outcomes=dict(run.outcomes),
    )


def _paced(trace: Trace, seconds: float, run: _Live) -> Iterator[Request]:
    """The requests, each when its time has come."""
    first = trace.requests[0].now_s
    scale = seconds / max(1e-9, trace.requests[-1].now_s - first)
    begun = time.monotonic()
    for request in trace.requests:
        ahead_s = begun + (request.now_s - first) * scale - time.monotonic()
        if ahead_s > 0:
            _never.wait(ahead_s)
        elif seconds:
            run.late_s = max(run.late_s, -ahead_s)
        yield request


class _Live:
    """The client's side, and what is counted; `sent` are the requests at the times at which they went out."""

    def __init__(self, client: Client) -> None:
        self._client = client
        spec = NamespaceSpec("replayed", "", "uint8", 512, (BLOCK_BYTES,))
        self._ns = client.open_namespace(spec)
        self.sent: list[Request] = []
        self.hit_tokens = self.asked_tokens = self.unanswered = self.wrong = 0
        self.late_s = 0.0
        self.outcomes: Counter[str] = Counter()
        self.occupancies: list[float] = []
        self._was_full = False

    def ask(self, request: Request) -> None:
        names, client = request.names, self._client
        self.sent.append(replace(request, now_s=time.monotonic()))
        found = client.lookup(self._ns, names).blocks
        self.hit_tokens += min(found * self._ns.block_tokens, request.tokens)
        self.asked_tokens += request.tokens
        payload = _payload(names)
        if found:
            there = np.zeros((found, BLOCK_BYTES), np.uint8)
            read = client.fetch(self._ns, names[:found], there).blocks
            self.wrong += found - int((there[:read] == payload[:read]).all(axis=1).sum())
        outcomes = client.store(self._ns, names, payload).outcomes
        self.unanswered += sum(outcome in _UNANSWERED for outcome in outcomes) + len(names) - len(outcomes)
        self.outcomes.update(outcome.name.lower() for outcome in outcomes)

    def look(self) -> int:
        """Read how full memory is, from the first block that had to go on; returns what it holds, in blocks."""
        store = self._client.status()["store"]
        tier, counters = store["tiers"][0], store["counters"]
        per_slab = tier["slab_bytes"] // BLOCK_BYTES
        if tier["slabs_assigned"]:
            per_slab = tier["slots_total"] // tier["slabs_assigned"]
        capacity = int(tier["slabs_total"]) * int(per_slab)
        if self._was_full or counters["evicted_blocks"] or counters["bypassed_blocks"]:
            self._was_full = True
            self.occupancies.append(tier["resident_bytes"] / tier["capacity_bytes"])
        return int(capacity)


def _payload(names: Sequence[bytes]) -> NDArray[np.uint8]:
    """Blocks, each full of its name."""
    whole = b"".join(name * (BLOCK_BYTES // len(name)) for name in names)
    return np.frombuffer(whole, np.uint8).reshape(len(names), BLOCK_BYTES).copy()


def told(each: Comparison) -> str:
    """The comparison in words."""
    full = "never full" if each.occupancy is None else f"occupancy {100 * each.occupancy:.1f} % at least"
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(each.outcomes.items()))
    return (
        f"{each.requests} requests, {each.capacity_blocks} blocks of memory: token hits {each.live_percent:.2f} % by "
        f"the daemon, {each.replay_percent:.2f} % replayed; {full}, {each.unanswered} stores unanswered, {each.wrong} "
        f"blocks wrong, at most {each.late_s:.2f} s late\nblocks stored: {outcomes}\n{'ok' if each.ok else 'FAILS'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -P -m forebay.bench.live_replay",
        description="Drive a daemon of its own through recorded requests and compare with their replay.",
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="Mooncake's JSON lines, plain or gzip")
    parser.add_argument("--host", type=float, default=5.0, metavar="PERCENT", help="of the distinct blocks (5)")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="only the first N (0: all)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="in which all of it is sent (60)")
    parser.add_argument("--policy", choices=("hazard", "lru"), default="hazard")
    parsed = parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(prefix="forebay-live-"))
    try:
        trace = read_trace(parsed.trace)
        if parsed.requests:
            trace = first_of(trace, parsed.requests)
        done = compare(
            trace, parsed.host, directory / "daemon", policy=parsed.policy, seconds=parsed.seconds, progress=_progress
        )
    except BadTrace as error:
        print(f"live_replay: {error}", file=sys.stderr)
        return 2
    except (BenchError, ForebayError, OSError) as error:
        print(f"live_replay: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(told(done))
    return 0 if done.ok else 1


def first_of(trace: Trace, requests: int) -> Trace:
    """Its beginning, as a trace of its own."""
    kept = trace.requests[:requests]
    return Trace(trace.name, kept, len({name for request in kept for name in request.names}))


def _progress(done: int, total: int) -> None:
    if done % 500 == 0 or done == total:
        print(f"{done}/{total} requests", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
