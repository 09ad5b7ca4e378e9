"""`python -P -m forebay.bench.replay TRACE...`: recorded requests through the daemon's own store and policies.

Exit status: 0 done, 2 usage (a trace that is none, a plot that cannot be drawn), 130 interrupted. The table and the
JSON go to standard output, progress to standard error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forebay.bench.replay_plot import plot
from forebay.bench.replay_policies import NAMES, policy_maker
from forebay.bench.replay_run import GPU_FLOPS, Drive, Result, replay
from forebay.bench.trace import BadTrace, Trace, read_trace
from forebay.daemon.chart import CannotPlot, check_plot
from forebay.kvstore.admission import BURST_S, DAY_S, WriteTerms
from forebay.kvstore.shapes import SHAPES, ModelShape

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

BLOCK_TOKENS = 512
SWEEP = "1%,2%,5%,10%,20%,50%"
JSON_KEYS = (
    "trace", "policy", "capacity_percent", "capacity_blocks", "token_hit_percent", "flops_saved_percent",
    "nvme_writes_per_new_block", "occupancy_mean", "evictions",
)  # fmt: skip
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_BAR = 30
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Size:
    """A capacity: a share of the trace's distinct blocks, or bytes."""

    percent: float = 0.0
    size_bytes: int = 0

    def blocks(self, trace: Trace, block_bytes: int) -> int:
        """At least one."""
        if self.size_bytes:
            return max(1, self.size_bytes // block_bytes)
        return max(1, int(self.percent * trace.unique_blocks / 100 + 1e-9))


@dataclass(frozen=True, slots=True)
class Job:
    """One run; what a worker process is sent. `block_tokens` 0: as the trace tells."""

    trace: Path
    policy: str
    host: Size
    nvme: Size | None
    shape: ModelShape
    block_tokens: int
    warm_up: float = 0.0
    budget: Size | None = None
    terms: WriteTerms | None = None
    hints: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    nvme: Size | None = parsed.nvme
    sizes = [parsed.host] if parsed.host else parsed.capacity
    terms = WriteTerms(parsed.write_chance / 100, parsed.price_per_tb_written / 1e12, parsed.price_per_gpu_hour / 3600)
    jobs = [
        Job(
            path,
            policy,
            size,
            nvme,
            SHAPES[parsed.model],
            parsed.block_tokens,
            parsed.warm_up / 100,
            parsed.write_budget,
            terms,
            parsed.hints / 100,
        )
        for path in parsed.traces
        for policy in parsed.policy
        for size in sizes
    ]
    try:
        if parsed.plot:
            check_plot(parsed.plot)
        requests = {path: len(read_trace(path).requests) for path in parsed.traces}
        results = run(jobs, parsed.jobs, requests)
        if parsed.plot:
            plot(results, parsed.plot)
    except (BadTrace, CannotPlot, OSError) as error:
        print(f"forebay replay: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if parsed.json:
        print(json.dumps([{key: getattr(result, key) for key in JSON_KEYS} for result in results], indent=1))
    else:
        print(table(results, parsed.price_per_gpu_hour, parsed.price_per_tb_written))
    return 0


def run(jobs: Sequence[Job], processes: int, requests: Mapping[Path, int]) -> list[Result]:
    """The results in the order of the jobs; each runs in a process of its own, and no result depends on how many.

    `requests` are how many each trace has, for the progress that is told.
    """
    numbered = sorted(enumerate(jobs), key=lambda item: _cost(item[1]))
    bar = _Bar(len(jobs), sum(requests[job.trace] for job in jobs))
    if processes == 1 or len(jobs) == 1:
        results = {number: run_one(job, bar.add) for number, job in numbered}
    else:
        results = dict(_parallel(numbered, min(processes, len(jobs)), bar))
    bar.end()
    return [results[number] for number in range(len(jobs))]


def _parallel(numbered: Sequence[tuple[int, Job]], processes: int, bar: _Bar) -> Iterator[tuple[int, Result]]:
    context = multiprocessing.get_context("spawn")
    done = context.Value("Q", 0)
    with context.Pool(processes, _begin, (done,)) as pool:
        results = pool.imap_unordered(_numbered, numbered)
        while True:
            try:
                yield results.next(_LOOK_S)
            except multiprocessing.TimeoutError:
                bar.show(done.value)
            except StopIteration:
                return


_shared: list[Synchronized[int]] = []
"""In a worker process: how many requests all of them have replayed."""


def _begin(done: Synchronized[int]) -> None:
    _shared[:] = [done]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever waits for this one gets it too, and ends it


def _tell(requests: int) -> None:
    with _shared[0].get_lock():
        _shared[0].value += requests


def _numbered(item: tuple[int, Job]) -> tuple[int, Result]:
    number, job = item
    return number, run_one(job, _tell)


class _Bar:
    """Progress by requests replayed: a bar where somebody looks, a line at the end where nobody does."""

    def __init__(self, runs: int, requests: int) -> None:
        self._runs = runs
        self._requests = max(1, requests)
        self._done = 0
        self._drawn = -1
        self._watched = sys.stderr.isatty()
        self.show(0)

    def add(self, requests: int) -> None:
        self.show(self._done + requests)

    def show(self, done: int) -> None:
        self._done = done
        percent = min(100, 100 * done // self._requests)
        if self._watched and percent != self._drawn:
            self._drawn, filled = percent, _BAR * percent // 100
            bar = "#" * filled + "." * (_BAR - filled)
            print(f"\rreplay [{bar}] {percent} % of {self._runs} runs", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        self.show(self._requests)
        print("" if self._watched else f"replay: {self._runs} runs", file=sys.stderr, flush=True)


def _cost(job: Job) -> tuple[float, str]:
    """What takes longest first: small caches, in which most has to be given up; a file's runs after each other."""
    return job.host.percent or float(job.host.size_bytes), str(job.trace)


_last: list[tuple[Path, Trace]] = []
"""The trace that this process read last: its next run is most often of the same one."""


def _trace(path: Path) -> Trace:
    if not _last or _last[0][0] != path:
        _last[:] = [(path, read_trace(path))]
    return _last[0][1]


def run_one(job: Job, tell: Callable[[int], None] | None = None) -> Result:
    """`tell` is told of requests as they are done. Raises BadTrace, OSError."""
    trace = _trace(job.trace)
    block_tokens = job.block_tokens or trace.block_tokens or BLOCK_TOKENS
    block_bytes = job.shape.kv_token_bytes * block_tokens
    return replay(
        trace,
        job.policy,
        policy_maker(job.policy, trace, job.shape),
        job.host.blocks(trace, block_bytes),
        drive=_drive(job, job.nvme, trace, block_bytes) if job.nvme else None,
        shape=job.shape,
        block_tokens=block_tokens,
        warm_up=job.warm_up,
        tell=tell,
        hints=job.hints,
    )


def _drive(job: Job, size: Size, trace: Trace, block_bytes: int) -> Drive:
    """A budget in % is spread over the trace as one in bytes is over a day: its bucket holds a 24th of it."""
    blocks = size.blocks(trace, block_bytes)
    if job.budget is None:
        return Drive(blocks, 0.0, job.terms, block_bytes)
    allowed = float(job.budget.blocks(trace, block_bytes))
    if not job.budget.percent:
        return Drive(blocks, allowed, job.terms, block_bytes)
    lasts_s = max(1.0, trace.seconds)
    return Drive(blocks, allowed * DAY_S / lasts_s, job.terms, block_bytes, budget_burst_s=BURST_S * lasts_s / DAY_S)


def table(results: Sequence[Result], price_per_gpu_hour: float, price_per_tb_written: float) -> str:
    """One line a run. GPU hours are those that hits made needless, at half of the peak of an H100.

    A drive, money and a budget are shown where there are any.
    """
    has_drive, has_budget = (
        any(getattr(each, name) for each in results) for name in ("nvme_blocks", "budget_used_percent")
    )
    head = (
        f"{'trace':14} {'policy':11} {'capacity':>8} {'blocks':>8} {'token hit':>9} {'FLOPs saved':>11} "
        f"{'writes/new':>10} {'occupancy':>9} {'lost':>9} {'unwritten':>9} {'demoted':>9} {'bypassed':>9} "
        f"{'declined':>9} {'GPU-h saved':>11}"
    )
    head += f" {'nvme':>8}" if has_drive else ""
    head += f" {'$ saved':>9}" if price_per_gpu_hour else ""
    head += f" {'$ writes':>9}" if price_per_tb_written else ""
    lines = [head + (" budget used" if has_budget else "")]
    for each in results:
        hours = each.flops_saved / GPU_FLOPS / 3600
        reasons = " ".join(
            f"{each.evictions[name]:9}" for name in ("lost", "unwritten", "demoted", "bypassed", "declined")
        )
        lines.append(
            f"{each.trace[:14]:14} {each.policy:11} {each.capacity_percent:7.2f}% {each.capacity_blocks:8} "
            f"{each.token_hit_percent:8.2f}% {each.flops_saved_percent:10.2f}% {each.nvme_writes_per_new_block:10.3f} "
            f"{100 * each.occupancy_mean:8.1f}% {reasons} {hours:11.2f}"
            + (f" {each.nvme_blocks:8}" if has_drive else "")
            + (f" {hours * price_per_gpu_hour:9.2f}" if price_per_gpu_hour else "")
            + (f" {each.written_bytes / 1e12 * price_per_tb_written:9.2f}" if price_per_tb_written else "")
            + (f" {each.budget_used_percent:10.1f}%" if has_budget else "")
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forebay replay",
        description="Drive the store and its eviction policies through recorded requests, on a virtual clock.",
        epilog="exit status: 0 done, 2 usage, 130 interrupted. docs/replay.md says what the figures mean.",
    )
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="Mooncake's JSON lines, plain or gzip")
    parser.add_argument(
        "--policy", type=_policies, default=("hazard", "lru"), metavar="NAME,...", help=f"of {', '.join(NAMES)}"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--capacity", type=_sizes, default=_sizes(SWEEP), metavar="SIZE,...",
        help=f"a run for each: 5%% of the trace's distinct blocks, or 64GiB (default {SWEEP.replace('%', '%%')})",
    )  # fmt: skip
    sizes.add_argument("--host", type=_size, metavar="SIZE", help="one size of the host tier instead")
    parser.add_argument("--nvme", type=_size, metavar="SIZE", help="an nvme tier below it")
    parser.add_argument(
        "--write-chance",
        type=_percent,
        default=0.0,
        metavar="PERCENT",
        help="write only what is asked for again with that chance at least (0: as the prices say, all without)",
    )
    parser.add_argument(
        "--write-budget",
        type=_size,
        metavar="SIZE",
        help="bytes that may be written to it in a day; with %%, of the trace's distinct blocks while it lasts",
    )
    parser.add_argument(
        "--price-per-tb-written", type=float, default=0.0, metavar="USD", help="of wear, beside that of a GPU"
    )
    parser.add_argument(
        "--model",
        choices=sorted(SHAPES),
        default="llama-3-70b",
        help="its shape turns bytes into blocks and tokens into work",
    )
    parser.add_argument(
        "--block-tokens", type=_whole, default=0, metavar="N", help="in a block of the trace (what it tells, or 512)"
    )
    parser.add_argument(
        "--warm-up", type=_percent, default=0.0, metavar="PERCENT", help="leading requests left out of the rates (0)"
    )
    parser.add_argument(
        "--hints",
        type=_share,
        default=0.0,
        metavar="PERCENT",
        help="requests after which the client says which of their blocks nobody will ask for again (0 to 100)",
    )
    parser.add_argument("--price-per-gpu-hour", type=float, default=0.0, metavar="USD", help="show what hits saved")
    parser.add_argument("--json", action="store_true", help="a list of objects, one a run")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="hit rate over capacity: .svg, or .png (matplotlib)")
    parser.add_argument(
        "--jobs", type=_whole, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)"
    )
    return parser


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown policy {unknown[0]!r}; known: {', '.join(NAMES)}")
    return names


def _sizes(text: str) -> list[Size]:
    return [_size(part) for part in text.split(",")]


def _size(text: str) -> Size:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(%|[KMGT]iB|B|)", text.strip())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write one like 5% or 64GiB")
    number, unit = float(match[1]), match[2]
    return Size(percent=number) if unit == "%" else Size(size_bytes=max(1, int(number * _UNITS[unit])))


def _percent(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]+)?)%?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage below 100")
    return float(match[1])


def _share(text: str) -> float:
    return 100.0 if text in ("100", "100%") else _percent(text)


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 1_000_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
