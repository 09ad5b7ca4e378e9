"""Faults for as long as you like, on more seeds than the tests have time for; prints one line of JSON.

    python -P tests/faults/run_faults.py [--seeds N] [--kills N] [--flips N] [--first SEED]

Each loop is a function that takes the arguments and returns its part of the line. It ends with 1 if something broke,
and says on standard error what, by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "shared"))

from support.nvme_flips import FlipLoop
from support.nvme_kills import KillLoop
from support.nvme_sim import NvmeSimulation, SimResult
from support.sim_faults import SITES

# Every key of the line, in order; what no loop has filled in stays 0.
KEYS = (
    "seeds",
    "served_reads",
    "wrong_reads",
    "injected",
    "detected",
    "io_sites",
    "io_sites_failed",
    "kills",
    "durable_lost",
    "start_ms_p50",
    "index_flips",
    "index_flips_found",
)
Loop = Callable[[argparse.Namespace], tuple[dict[str, float], list[str]]]


def simulated_disk(arguments: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """The tier on a simulated disk; every fourth seed has a sound disk that only loses power."""
    if not arguments.seeds:
        return {}, []
    total, broken = SimResult(), list[str]()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        with tempfile.TemporaryDirectory(prefix="forebay-faults-") as folder:
            try:
                result = NvmeSimulation(seed, Path(folder), sound=seed % 4 == 0).run()
            except AssertionError as error:
                broken.append(f"seed {seed}: {error}")
                continue
        broken += [f"seed {seed}: {what}" for what in result.check()]
        total += result
    unfailed = total.sites_without_failure()
    broken += [f"no call of {site} failed" for site in unfailed]
    for name in ("lives", "false_alarms", "phantoms", "durable_blocks", "statuses", "ends", "sites"):
        print(f"{name}: {getattr(total, name)}", file=sys.stderr)
    figures: dict[str, float] = {
        "io_sites": len(SITES),
        "io_sites_failed": len(SITES) - len(unfailed),
        **{
            name: getattr(total, name)
            for name in ("seeds", "served_reads", "wrong_reads", "injected", "detected", "durable_lost")
        },
    }
    return figures, broken


def live_kills(arguments: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """A live daemon killed at any moment, every second time on two drives."""
    if not arguments.kills:
        return {}, []
    results = [KillLoop(arguments.first + drives, drives=drives).run(-(-arguments.kills // 2)) for drives in (1, 2)]
    served, wrong, missing = (sum(getattr(each.verdict, name) for each in results) for name in _JUDGED)
    starts_ms = [ms for each in results for ms in each.start_ms]
    for each in results:
        what = f"{each.indexes_lost} indexes deleted, {each.durable} durable blocks"
        print(f"killed while {dict(each.killed_while)}, {what}", file=sys.stderr)
    figures: dict[str, float] = {
        "served_reads": served,
        "wrong_reads": wrong,
        "durable_lost": missing,
        "kills": sum(each.kills for each in results),
        "start_ms_p50": round(statistics.median(starts_ms), 1),
    }
    broken = [problem for each in results for problem in each.problems]
    return figures, broken + [f"{wrong} wrong and {missing} lost over kills"] * bool(wrong or missing)


def index_flips(arguments: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """A live daemon started on indexes of which one bit is wrong; those that were found out are made anew."""
    if not arguments.flips:
        return {}, []
    result = FlipLoop(arguments.first).run(arguments.flips)
    served, wrong, missing = (getattr(result.verdict, name) for name in _JUDGED)
    print(f"flipped bits of an index: {dict(result.flips)}, of it made anew: {dict(result.rebuilds)}", file=sys.stderr)
    figures: dict[str, float] = {
        "served_reads": served,
        "wrong_reads": wrong,
        "durable_lost": missing,
        "index_flips": result.flips.total(),
        "index_flips_found": result.rebuilds.total(),
    }
    return figures, result.problems + [f"{wrong} wrong and {missing} lost over flips"] * bool(wrong or missing)


_JUDGED = ("served", "wrong", "missing")
LOOPS: tuple[Loop, ...] = (simulated_disk, live_kills, index_flips)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the fault loops and print one line of JSON.")
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds of the simulated disk (default 100)")
    parser.add_argument("--kills", type=int, default=100, help="how often the live daemon is killed (default 100)")
    parser.add_argument("--flips", type=int, default=200, help="how many bits of its index are flipped (default 200)")
    parser.add_argument("--first", type=int, default=1, help="the first seed (default 1)")
    arguments = parser.parse_args()
    line: dict[str, float] = dict.fromkeys(KEYS, 0)
    broken = []
    for loop in LOOPS:
        figures, found = loop(arguments)
        broken += found
        for key, figure in figures.items():
            line[key] += figure
    print(json.dumps(line))
    for what in broken:
        print(what, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
