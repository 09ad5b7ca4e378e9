"""`python -P -m forebay.bench`: run the sections that the wanted figures need, print a table or one JSON object.

Exit status: 0 every figure with a target met it, 1 not so, 2 usage, 130 interrupted. A section that fails leaves its
figures without a value and the others untouched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from forebay.bench import control, copies, footprint, nvme, nvme_beside, nvme_restart
from forebay.bench.engine_memory import PAGED, PLAIN, UNALIGNED, Layout
from forebay.bench.figures import TARGETS, Figure, passed, table, to_json
from forebay.bench.plan import Plan
from forebay.bench.processes import BenchError, Cores
from forebay.kvstore.errors import ForebayError

NVME_PATH = Path("/var/tmp")  # noqa: S108  # mkdtemp makes a directory of our own in it
"""Where the nvme tier is measured unless told otherwise: seldom in memory, unlike /tmp."""


@dataclass(frozen=True, slots=True)
class Section:
    """Figures that share a daemon; some only when there is time or when they are asked for by name."""

    figures: tuple[str, ...]
    measure: Callable[[Plan], Iterator[Figure]]
    in_quick: bool = True


def _copies(layout: Layout, *, in_quick: bool = True) -> Section:
    return Section(copies.layout_names(layout), partial(copies.one_client, layout=layout), in_quick)


SECTIONS = (
    Section(("ping_ratio",), control.ping),
    Section((*control.LOOKUP_NAMES, *control.PRESENT_NAMES, *control.BUSY_NAMES), control.index),
    Section(("start_ms",), footprint.start),
    Section((*footprint.IDLE_NAMES, "rss_bytes_per_block"), footprint.resting),
    Section(("fill_ratio", "unanswered_stores"), footprint.full_tier),
    *map(_copies, (*PLAIN, PAGED)),
    *(_copies(layout, in_quick=False) for layout in UNALIGNED),
    Section(copies.client_names(), copies.many_clients, in_quick=False),
)
NVME_SECTIONS = (
    Section(nvme.LARGE_NAMES, nvme.large),
    Section(nvme.SMALL_NAMES, nvme.small),
    Section((nvme_beside.NAME,), nvme_beside.host),
    Section(nvme_restart.NAMES, nvme_restart.restart),
)


@dataclass(frozen=True, slots=True)
class Suite:
    """Sections that are run together, and the seconds after which no run goes on: what is not measured then fails."""

    sections: tuple[Section, ...]
    quick_s: int
    full_s: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for section in self.sections for name in section.figures)


SUITES = {"": Suite(SECTIONS, 47, 460), "nvme": Suite(NVME_SECTIONS, 180, 600)}
NAMES = tuple(name for suite in SUITES.values() for name in suite.names)


class OutOfTime(BenchError):
    """The whole run took too long."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; see the module's text for the status."""
    parsed = _parser().parse_args(arguments)
    suite = SUITES[parsed.suite]
    unknown = sorted(set(parsed.only or ()) - set(suite.names))
    if unknown:
        print(f"forebay bench: unknown figure {unknown[0]!r}; known: {', '.join(suite.names)}", file=sys.stderr)
        return 2
    chosen = [name for each in suite.sections if each.in_quick or not parsed.quick for name in each.figures]
    directory = Path(tempfile.mkdtemp(prefix="forebay-bench-"))
    drive = Path(tempfile.mkdtemp(prefix="forebay-bench-", dir=parsed.path or NVME_PATH)) if parsed.suite else None
    plan = Plan(
        parsed.quick, directory, Cores.here(), frozenset(parsed.only or chosen), _Progress(), drive, parsed.path
    )
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(plan.pick(suite.quick_s, suite.full_s))
    try:
        figures = list(run(plan, suite.sections))
    except KeyboardInterrupt:
        return 130
    finally:
        signal.alarm(0)
        if drive is not None:
            shutil.rmtree(drive, ignore_errors=True)
        if parsed.keep_runtime:
            plan.progress(f"logs and sockets are in {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    print(to_json(figures) if parsed.json else table(figures))
    plan.progress("done")
    return 0 if passed(figures) else 1


def run(plan: Plan, sections: Sequence[Section] = SECTIONS) -> Iterator[Figure]:
    """The wanted figures, in order; those that could not be measured have no value and the reason as note."""
    out_of_time = False
    for section in sections:
        missing = [name for name in section.figures if name in plan.wanted]
        if not missing:
            continue
        failure = "out of time" if out_of_time else ""
        try:
            for figure in section.measure(plan) if not out_of_time else ():
                if figure.name in missing:
                    missing.remove(figure.name)
                    yield figure
        except (BenchError, ForebayError, OSError) as error:
            failure = str(error)
            out_of_time = isinstance(error, OutOfTime)
            plan.progress(f"failed: {failure}")
        left_out = [name for name in missing if failure or name in TARGETS or not plan.quick]
        yield from (Figure(name, None, "", note=f"not measured: {failure or 'left out'}") for name in left_out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="forebay bench",
        description="Measure a daemon of its own on this machine, each figure beside its bound.",
        epilog="exit status: 0 all targets met, 1 not so, 2 usage. docs/benchmarks.md says what the figures mean.",
    )
    parser.add_argument(
        "suite",
        nargs="?",
        choices=sorted(SUITES),
        default="",
        metavar="nvme",
        help="the nvme tier, instead of the rest",
    )
    parser.add_argument("--quick", action="store_true", help="at most 50 s; fewer repetitions and sizes")
    parser.add_argument("--json", action="store_true", help="one JSON object: figure name -> its value and the rest")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these figures alone")
    parser.add_argument(
        "--path",
        type=_directory,
        metavar="DIR",
        help="nvme: measure the drive of this directory, one of nvme.paths say, and leave what was measured there in "
        f"bandwidth.json; otherwise that of {NVME_PATH}",
    )
    parser.add_argument("--keep-runtime", action="store_true", help="leave the daemons' logs behind and say where")
    return parser


def _directory(text: str) -> Path:
    path = Path(text)
    if not os.access(path, os.W_OK | os.X_OK) or not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory that can be written to")
    return path


class _Progress:
    """Lines on standard error, with the seconds gone."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"bench: {time.monotonic() - self._started:5.1f} s  {text}", file=sys.stderr, flush=True)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTime("out of time")


if __name__ == "__main__":
    sys.exit(main())
