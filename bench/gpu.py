"""`python -P -m forebay.bench.gpu`: what the DMA engine reaches on a GPU, each figure beside a bound of the same run.

Needs a GPU, cupy, torch for the matmul, and for the figures through the client what a daemon needs. Every figure is the
median of turns in which bound and measurement follow each other. The bytes of each series are compared before it: a
fast wrong copy has no figure. `--lmcache DIR` compares with LMCache's compiled code, from an unpacked wheel. Writes
``gpu-<device>-<date>.md`` and ``.json`` into the directory given.
"""

from __future__ import annotations

import argparse
import datetime
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from forebay.bench.figures import GIB, KIB, MIB, Figure, number, passed
from forebay.kernels.layout import Layout, Table
from forebay.transports.dma import Direction, DmaEngine, DmaOptions, Strategy, Transfer, Tuning, tuning
from forebay.transports.dma.cuda_device import CudaDevice
from forebay.transports.paths import cache_directory

TURNS = 7
TIMEOUT_S = 30.0
MATMUL_SIZE = 8192
MATMULS = 150
MATMUL_TURNS = 7


@dataclass(frozen=True, slots=True)
class Shape:
    """Blocks of one model: `segments` of `segment_bytes` each, as many as make a GiB."""

    name: str
    segments: int
    segment_bytes: int

    @property
    def block_bytes(self) -> int:
        return self.segments * self.segment_bytes

    @property
    def blocks(self) -> int:
        return GIB // self.block_bytes


LLAMA = Shape("llama", 64, 32 * KIB)  # Llama-3-8B: K and V of 32 layers, 16 tokens of 2 KiB
MLA = Shape("mla", 61, 16 * 1152)  # DeepSeek-V3: 61 layers, 16 tokens of 1 152 B

CHECKSUM_STRATEGIES = (Strategy.STAGED, Strategy.MAPPED, Strategy.DMA)
LMCACHE_S = 90.0
LMCACHE_DEFAULT = "direct"
LOG_TAIL_LINES = 4


def link_names(shape: Shape) -> tuple[str, ...]:
    return tuple(f"gpu_{d.value}_{shape.name}_{what}" for d in Direction for what in ("ratio", "cpu_s_per_gib"))


REGISTRATION_NAMES = ("gpu_register_gb_per_s", "gpu_register_first_touch_gb_per_s")
DUPLEX_NAMES = ("gpu_duplex_ratio",)
KERNEL_NAMES = ("gpu_gather_ratio", "gpu_scatter_ratio")
CHECKSUM_NAMES = tuple(f"gpu_checksum_{s.value}_{d.value}_slowdown" for s in CHECKSUM_STRATEGIES for d in Direction)
MATMUL_NAMES = tuple(
    f"gpu_matmul_{how}_{d.value}_slowdown" for d in Direction for how in ("plain", *(s.value for s in Strategy))
)
LMCACHE_NAMES = tuple(f"gpu_lmcache_{d.value}_{shape.name}_ratio" for shape in (LLAMA, MLA) for d in Direction)
CLIENT_NAMES = ("gpu_client_fetch_ratio", "gpu_client_fetch_verified_ratio", "gpu_client_store_ratio")
NAMES = (
    *(*REGISTRATION_NAMES, *link_names(LLAMA), *link_names(MLA), *DUPLEX_NAMES, *KERNEL_NAMES),
    *(*CHECKSUM_NAMES, *MATMUL_NAMES, *CLIENT_NAMES, *LMCACHE_NAMES),
)

Rates = dict[tuple[Direction, Strategy], float]
"""GB/s."""

Action = Callable[[], float]
"""Does the work once and returns the seconds it took."""


class Rig:
    """A device, an engine with all host slots registered, and paged memory of twice as many blocks as are moved."""

    def __init__(self, shape: Shape, host: mmap.mmap, options: DmaOptions) -> None:
        import cupy

        self.shape, self.cupy = shape, cupy
        self.device = CudaDevice(0)
        self.engine = DmaEngine(self.device, options)
        slots = np.frombuffer(host, np.uint8, GIB)
        self.address = int(slots.ctypes.data)
        self.slots = slots[: shape.blocks * shape.block_bytes].reshape(shape.blocks, shape.block_bytes)
        self.engine.pinned.add(self.address, GIB, writable=True, owner=slots)
        if not self.engine.pinned.wait(60) or self.engine.pinned.status().refused:
            raise RuntimeError(f"the slots cannot be pinned: {self.engine.pinned.status()}")
        pool = 2 * shape.blocks
        self.paged = [cupy.empty((pool, shape.segment_bytes), cupy.uint8) for _ in range(shape.segments)]
        bases = np.array([segment.data.ptr for segment in self.paged], np.int64)
        sizes = np.full(shape.segments, shape.segment_bytes, np.int64)
        self.layout = Layout.of(bases, sizes, sizes)
        random = np.random.default_rng(5)
        self.ids = random.permutation(pool)[: shape.blocks].astype(np.int64)
        self.places = self.address + random.permutation(shape.blocks).astype(np.int64) * shape.block_bytes
        self.flat = cupy.empty(self.bytes, cupy.uint8)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.other = cupy.cuda.Stream(non_blocking=True)
        self.cpu_s: dict[tuple[Direction, Strategy], list[float]] = {}
        self.rates: Rates = {}

    @property
    def bytes(self) -> int:
        return self.shape.blocks * self.shape.block_bytes

    def begin(self, direction: Direction, strategy: Strategy, *, checksums: bool = False) -> Transfer:
        move = self.engine.load if direction is Direction.LOAD else self.engine.store
        return move(self.layout, self.ids, self.places, strategy=strategy, checksums=checksums)

    def moving(self, direction: Direction, strategy: Strategy, *, checksums: bool = False) -> Action:
        def action() -> float:
            began, cpu = time.perf_counter(), time.thread_time()
            self.begin(direction, strategy, checksums=checksums).wait(TIMEOUT_S)
            self.cpu_s.setdefault((direction, strategy), []).append(time.thread_time() - cpu)
            return time.perf_counter() - began

        return action

    def plain(self, direction: Direction, stream: Any = None) -> Action:
        """One pinned cudaMemcpyAsync of the same bytes."""
        runtime, on = self.cupy.cuda.runtime, stream or self.stream
        load = direction is Direction.LOAD
        sides = (self.flat.data.ptr, self.address) if load else (self.address, self.flat.data.ptr)
        kind = runtime.memcpyHostToDevice if load else runtime.memcpyDeviceToHost

        def action() -> float:
            began = time.perf_counter()
            runtime.memcpyAsync(*sides, self.bytes, kind, on.ptr)
            on.synchronize()
            return time.perf_counter() - began

        return action

    def check(self, direction: Direction, strategy: Strategy) -> None:
        """Fill the source anew, poison the destination, move, and compare every byte."""
        cupy, shape = self.cupy, self.shape
        random = np.random.default_rng(time.monotonic_ns())
        order = [(int(place) - self.address) // shape.block_bytes for place in self.places]
        if direction is Direction.LOAD:
            noise = np.frombuffer(random.bytes(shape.block_bytes + shape.blocks), np.uint8)
            for index, slot in enumerate(self.slots):
                slot[:] = noise[index : index + shape.block_bytes]
            for segment in self.paged:
                segment.fill(0xA5)
        else:
            pages = np.frombuffer(random.bytes(self.paged[0].nbytes), np.uint8).reshape(self.paged[0].shape)
            for index, segment in enumerate(self.paged):
                segment.set(np.roll(pages, index, axis=0))
            self.slots[:] = 0xA5
        cupy.cuda.Device().synchronize()
        self.begin(direction, strategy).wait(TIMEOUT_S)
        for index, segment in enumerate(self.paged):
            offset = index * self.shape.segment_bytes
            there = cupy.asnumpy(segment)[self.ids]
            here = self.slots[order, offset : offset + self.shape.segment_bytes]
            if not np.array_equal(there, here):
                raise RuntimeError(f"wrong bytes: {direction.value} by {strategy.value}, segment {index}")


@contextmanager
def rig(shape: Shape, host: mmap.mmap, options: DmaOptions | None = None) -> Iterator[Rig]:
    """A rig whose GPU memory is given back at the end."""
    made = Rig(shape, host, options or DmaOptions())
    try:
        yield made
    finally:
        made.engine.close(TIMEOUT_S)
        made.paged.clear()
        del made.flat
        made.cupy.get_default_memory_pool().free_all_blocks()


def in_turns(*actions: Action, turns: int = TURNS) -> list[list[float]]:
    """Seconds of each action, turn by turn; one turn is a rehearsal and does not count."""
    rounds = [[action() for action in actions] for _ in range(turns + 1)]
    return [list(column) for column in zip(*rounds[1:], strict=True)]


def turn_ratio(bound: Sequence[float], measured: Sequence[float]) -> float:
    """The median over turns of the rate measured as a share of the bound's."""
    return median(b / m for b, m in zip(bound, measured, strict=True))


def gb_per_s(moved: int, seconds: Sequence[float]) -> float:
    return moved / median(seconds) / 1e9


def links(made: Rig) -> Iterator[Figure]:
    """Each direction alone: every strategy beside one plain copy. Leaves the strategies' rates in `made.rates`."""
    for direction in Direction:
        strategies = list(Strategy)
        for strategy in strategies:
            made.check(direction, strategy)
        made.cpu_s.clear()
        bound, *series = in_turns(made.plain(direction), *(made.moving(direction, s) for s in strategies))
        ratios = {s: turn_ratio(bound, seconds) for s, seconds in zip(strategies, series, strict=True)}
        best = max(ratios, key=ratios.__getitem__)
        made.rates |= {(direction, s): gb_per_s(made.bytes, each) for s, each in zip(strategies, series, strict=True)}
        rates = ", ".join(f"{s.value} {made.rates[direction, s]:.1f} GB/s ({ratios[s]:.3f})" for s in strategies)
        name = f"gpu_{direction.value}_{made.shape.name}"
        limit = gb_per_s(made.bytes, bound)
        note = f"{best.value}; {rates}; plain copy {limit:.1f} GB/s"
        yield Figure(f"{name}_ratio", ratios[best], "x plain copy", limit, ratios[best], note=note)
        cpu = {s: median(made.cpu_s[direction, s]) * GIB / made.bytes for s in strategies}
        note = "of the moving thread, polling included; " + ", ".join(f"{s.value} {cpu[s]:.4f}" for s in strategies)
        yield Figure(f"{name}_cpu_s_per_gib", cpu[best], "s/GiB", note=note)


def duplex(made: Rig) -> Iterator[Figure]:
    """Both directions at once, beside both plain copies at once."""

    def both(*actions: Action) -> Action:
        def action() -> float:
            threads = [threading.Thread(target=work) for work in actions]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(TIMEOUT_S)
            return time.perf_counter() - began

        return action

    bound_action = both(made.plain(Direction.LOAD, made.stream), made.plain(Direction.STORE, made.other))
    pairs = [Strategy.DMA, Strategy.STAGED, Strategy.MAPPED]
    moving = [both(*(made.moving(direction, strategy) for direction in Direction)) for strategy in pairs]
    bound, *series = in_turns(bound_action, *moving)
    ratios = {s: turn_ratio(bound, seconds) for s, seconds in zip(pairs, series, strict=True)}
    best = max(ratios, key=ratios.__getitem__)
    limit = gb_per_s(2 * made.bytes, bound)
    rates = ", ".join(f"{s.value} {ratios[s]:.3f}" for s in pairs)
    yield Figure("gpu_duplex_ratio", ratios[best], "x plain copies", limit, ratios[best], note=f"{best.value}; {rates}")


def kernels(made: Rig) -> Iterator[Figure]:
    """The kernels alone, device memory on both sides, all multiprocessors, beside a device-to-device copy."""
    cupy, runtime = made.cupy, made.cupy.cuda.runtime
    count = made.shape.blocks
    second = cupy.empty(made.bytes, cupy.uint8)
    slots = made.flat.data.ptr + np.arange(count, dtype=np.uint64) * np.uint64(made.shape.block_bytes)
    ids_there, slots_there = cupy.asarray(made.ids.astype(np.uint64)), cupy.asarray(slots)
    packed = cupy.asarray(made.layout.packed())
    entry = Table(packed.data.ptr, made.layout)

    def timed(start: Callable[[], None]) -> Action:
        def action() -> float:
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record(made.stream)
            start()
            end.record(made.stream)
            end.synchronize()
            return float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3

        return action

    def copy() -> None:
        kind = runtime.memcpyDeviceToDevice
        runtime.memcpyAsync(second.data.ptr, made.flat.data.ptr, made.bytes, kind, made.stream.ptr)

    def kernel(move: Callable[..., None]) -> Callable[[], None]:
        where = (entry, ids_there.data.ptr, slots_there.data.ptr, count)
        return lambda: move(*where, width=16, stream=made.stream.ptr)

    both = (made.device.kernels.gather, made.device.kernels.scatter)
    cupy.cuda.Device().synchronize()
    bound, *series = in_turns(timed(copy), *(timed(kernel(move)) for move in both))
    limit = gb_per_s(made.bytes, bound)
    for name, seconds in zip(("gather", "scatter"), series, strict=True):
        ratio = turn_ratio(bound, seconds)
        note = f"{gb_per_s(made.bytes, seconds):.0f} GB/s copied, device-to-device copy {limit:.0f}"
        yield Figure(f"gpu_{name}_ratio", ratio, "x device copy", limit, ratio, note=note)


def checksums(made: Rig) -> Iterator[Figure]:
    """What the checksum in the copy costs."""
    for strategy in CHECKSUM_STRATEGIES:
        for direction in Direction:
            plain, summed = in_turns(made.moving(direction, strategy), made.moving(direction, strategy, checksums=True))
            slower = median(s / p for s, p in zip(summed, plain, strict=True)) - 1
            note = f"{gb_per_s(made.bytes, summed):.1f} GB/s with, {gb_per_s(made.bytes, plain):.1f} without"
            yield Figure(f"gpu_checksum_{strategy.value}_{direction.value}_slowdown", slower, "share", note=note)


def beside(made: Rig) -> Iterator[Figure]:
    """A matmul loop beside a continuous load or store, by strategy, and beside one plain copy after the other.

    Each is compared with the same loop alone just before and just after it: a GPU at its power limit changes its clock
    within seconds, by more than is measured here.
    """
    import torch

    sides = [torch.randn((MATMUL_SIZE, MATMUL_SIZE), dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    out = torch.empty_like(sides[0])

    def matmuls() -> float:
        event: Any = torch.cuda.Event
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(MATMULS):
            torch.matmul(*sides, out=out)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def slowdown(name: str, move: Action) -> Figure:
        slower, rates = [], []
        before = matmuls()
        for _ in range(MATMUL_TURNS):
            with continuously(move) as moves:
                began, first = time.perf_counter(), len(moves)
                seconds = matmuls()
                rates.append((len(moves) - first) * made.bytes / (time.perf_counter() - began) / 1e9)
            after = matmuls()
            slower.append(2 * seconds / (before + after) - 1)
            before = after
        spread = f"{100 * min(slower):.1f} to {100 * max(slower):.1f} %"
        note = f"{spread} over {MATMUL_TURNS} turns; meanwhile about {median(rates):.0f} GB/s moved"
        return Figure(name, median(slower), "share", note=note)

    for _ in range(MATMUL_TURNS):
        matmuls()  # until clock and power have settled
    for direction in Direction:
        yield slowdown(f"gpu_matmul_plain_{direction.value}_slowdown", made.plain(direction))
        for strategy in Strategy:
            name = f"gpu_matmul_{strategy.value}_{direction.value}_slowdown"
            yield slowdown(name, made.moving(direction, strategy))


@contextmanager
def continuously(move: Action) -> Iterator[list[float]]:
    """Move in another thread, again and again; the list grows by the seconds of each. Raises what a move raises."""
    stop = threading.Event()
    moves: list[float] = []

    def work() -> None:
        while not stop.is_set():
            moves.append(move())

    with ThreadPoolExecutor(1) as thread:
        moving = thread.submit(work)
        try:
            yield moves
        finally:
            stop.set()
            moving.result(TIMEOUT_S)


def registration(made: Rig) -> Iterator[Figure]:
    """How fast host memory is pinned, its pages resident or not."""
    status = made.engine.pinned.status()
    note = "cudaHostRegister of a memfd whose pages are resident, one thread"
    yield Figure("gpu_register_gb_per_s", status.pinned / status.seconds / 1e9, "GB/s", note=note)
    fresh = np.frombuffer(host_memory(resident=False), np.uint8)
    address = int(fresh.ctypes.data)
    made.engine.pinned.add(address, GIB, writable=True, owner=fresh)
    if not made.engine.pinned.wait(60):
        raise RuntimeError("pinning takes too long")
    seconds = made.engine.pinned.status().seconds - status.seconds
    made.engine.pinned.remove(address)
    note = "the same, first touched by it"
    yield Figure("gpu_register_first_touch_gb_per_s", GIB / seconds / 1e9, "GB/s", note=note)


def lmcache_command(wheel: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "forebay.bench.gpu_lmcache", "--lmcache", str(wheel)]


def ask_lmcache(command: Sequence[str], timeout_s: float = LMCACHE_S) -> dict[str, Any]:
    """What LMCache's copies reach, from a process that they may end; see `gpu_lmcache`.

    Raises RuntimeError, or ValueError when its last line is no object, where there is nothing.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"LMCache's copies took more than {timeout_s:g} s") from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        tail = " / ".join(done.stderr.splitlines()[-LOG_TAIL_LINES:])
        raise RuntimeError(f"LMCache's copies ended with status {done.returncode}: {tail}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if answer["reason"]:
        raise RuntimeError(f"LMCache's copies cannot be run here: {answer['reason']}")
    return answer


def beside_lmcache(rates: Mapping[str, Rates], command: Sequence[str]) -> Iterator[Figure]:
    """forebay's fastest strategy over LMCache's fastest path, a GiB each; the one run follows the other.

    Without any one of LMCache's paths its fastest is not known, and there is no value.

    Args:
        rates: what `links` measured of each shape, by its name.
    """
    answer = ask_lmcache(command)
    for shape in (LLAMA, MLA):
        errors = answer["errors"].get(shape.name, {})
        for direction in Direction:
            ours = {s.value: rate for (d, s), rate in rates[shape.name].items() if d is direction}
            theirs = {path: rate[direction.value] for path, rate in answer["rates"].get(shape.name, {}).items()}
            sides = [f"forebay {_listed(ours)}", f"LMCache {_listed(theirs)}"]
            if LMCACHE_DEFAULT in theirs:
                sides.append(f"its default is {LMCACHE_DEFAULT}")
            note = "; ".join([*sides, *(f"{path} failed: {error}" for path, error in errors.items())])
            known = bool(ours and theirs) and not errors
            limit = max(theirs.values()) if known else None
            ratio = max(ours.values()) / limit if limit else None
            name = f"gpu_lmcache_{direction.value}_{shape.name}_ratio"
            yield Figure(name, ratio, "x LMCache", limit, ratio, note=note)


def _listed(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()) + " GB/s" if rates else "not measured"


def tuned(made: Rig) -> Tuning:
    return tuning.measure(made.engine, made.device, made.device.key)


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def host_memory(*, resident: bool = True) -> mmap.mmap:
    """A GiB of shared memory, as a daemon's slabs are."""
    descriptor = os.memfd_create("forebay-bench")
    os.ftruncate(descriptor, GIB)
    memory = mmap.mmap(descriptor, GIB, mmap.MAP_SHARED | (mmap.MAP_POPULATE if resident else 0))
    os.close(descriptor)
    if resident:
        np.frombuffer(memory, np.uint8)[:: 4 * KIB] = 1
    return memory


def report(directory: Path, device: str, figures: Sequence[Figure], rows: Tuning, seconds: float) -> Path:
    """Write both files; returns the readable one."""
    stem = f"gpu-{''.join(c if c.isalnum() else '-' for c in device.lower())}-{_today()}"
    directory.mkdir(parents=True, exist_ok=True)
    document = {
        "device": device,
        "date": _today(),
        "command": "python -P -m forebay.bench.gpu",
        "figures": {figure.name: figure.document() for figure in figures},
        "tuning": rows.document(),
    }
    (directory / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    lines = [f"# The DMA engine on a {device}", ""]
    lines += [f"`python -P -m forebay.bench.gpu`, {document['date']}, {rows.device}; it took {seconds:.0f} s.", ""]
    lines += ["| figure | value | unit | bound | target | ok | note |", "|---|---|---|---|---|---|---|"]
    for figure in figures:
        verdict = {None: "", True: "ok", False: "FAILS"}[figure.ok]
        cells = (
            f"`{figure.name}`",
            number(figure.value),
            figure.unit,
            number(figure.bound),
            figure.target or "",
            verdict,
        )
        note = " ".join(figure.note.replace("|", "/").split())
        lines.append(f"| {' | '.join(map(str, cells))} | {note} |")
    lines += ["", "Strategies tried on scattered blocks of 32 segments, GB/s, and which is chosen:", ""]
    lines += ["| direction | segment | moved | dma | staged | mapped | chosen |", "|---|---|---|---|---|---|---|"]
    for row in rows.rows:
        rates = " | ".join(f"{row.rates[strategy.value] / 1e9:.1f}" for strategy in Strategy)
        sizes = f"{row.segment_bytes // KIB} KiB | {row.moved_bytes // MIB} MiB"
        lines.append(f"| {row.direction.value} | {sizes} | {rates} | {row.best.value} |")
    path = directory / f"{stem}.md"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def through_client(made: Rig) -> Iterator[Figure]:
    """The same by way of a daemon; its packages are imported only here."""
    from forebay.bench import gpu_client

    yield from gpu_client.through_client(made)


SECTIONS: tuple[tuple[tuple[str, ...], Callable[[Rig], Iterator[Figure]]], ...] = (
    (REGISTRATION_NAMES, registration),
    (link_names(LLAMA), links),
    (DUPLEX_NAMES, duplex),
    (KERNEL_NAMES, kernels),
    (CHECKSUM_NAMES, checksums),
    (MATMUL_NAMES, beside),
    (CLIENT_NAMES, through_client),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="forebay.bench.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="where the results go")
    parser.add_argument("--lmcache", type=Path, metavar="DIR", help="compare with this unpacked wheel of LMCache 0.5.6")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    memory = host_memory()
    figures: list[Figure] = []
    rates: dict[str, Rates] = {}
    with rig(LLAMA, memory) as made:
        device = made.device.name
        rows = tuned(made)
        for names, section in SECTIONS:
            figures += measured(names, section(made))
        rates[LLAMA.name] = made.rates
    with rig(MLA, memory) as made:
        figures += measured(link_names(MLA), links(made))
        rates[MLA.name] = made.rates
    if options.lmcache is not None:
        figures += measured(LMCACHE_NAMES, beside_lmcache(rates, lmcache_command(options.lmcache)))
    path = report(options.output, device, figures, rows, time.monotonic() - began)
    tuning.save(rows, cache_directory())
    print(path.read_text("utf-8"))
    return 0 if passed(figures) else 1


def measured(names: Sequence[str], section: Iterable[Figure]) -> list[Figure]:
    """A section's figures; those of `names` that it fails to measure have no value and say why, the others stay."""
    figures: list[Figure] = []
    try:
        for figure in section:
            print(f"{figure.name} {number(figure.value)} {figure.note}", flush=True)
            figures.append(figure)
    except Exception as error:  # noqa: BLE001  # the other sections' figures are still wanted
        note = f"{type(error).__name__}: {error}"
        missing = [name for name in names if name not in {figure.name for figure in figures}]
        print(f"not measured: {', '.join(missing)}: {note}", file=sys.stderr, flush=True)
        figures += [Figure(name, None, "", note=note) for name in missing]
    return figures


if __name__ == "__main__":
    sys.exit(main())
