"""A seeded run of the NVMe tier on a simulated disk: writes, loads, cancels, kills, power cuts, damaged indexes.

One life after the other the tier is started on what the last one left, told to do things, and ended somehow. Every
block that a load serves is compared with the only bytes it can be; every page the disk gave wrong to such a load must
have been noticed. The LMDB index is a real file, since it cannot be led through the seam: between two lives it is
deleted, cut short, bit-flipped or replaced by an older copy. What the threads of the tier do first is not seeded, so a
run repeats in its kind, not call by call.
"""

from __future__ import annotations

import mmap
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from forebay.tiers.nvme import NvmeTier
from forebay.tiers.nvme_drive import DATA_NAME, INDEX_NAME
from forebay.tiers.nvme_format import (
    LAST_FILE,
    PAGE,
    SLABS_OFFSET,
    file_bytes,
    slab_offset,
    slot_offset,
    slots_per_slab,
)
from forebay.tiers.nvme_index import INDEX_FILE
from forebay.tiers.nvme_jobs import (
    IoStatus,
    JobDone,
    LoadJob,
    NvmeOptions,
    RestoredBlock,
    RestoredBlocks,
    RestoreDone,
    RestoredSlabs,
    SlabOwner,
    WriteJob,
)
from support.ledger import Ledger
from support.nvme_model import Block, Model, Place, Shape
from support.sim_faults import SITES, Fault, FaultPlan, SiteCount
from support.sim_files import SimFiles

DRIVES = 2
SLAB_BYTES = 128 << 10
SLABS_PER_DRIVE = 6
HEADER_BYTES = 160
"""The bytes of a slot header, checksum included; a flip behind them, in the rest of the page, means nothing."""
JOB_BLOCKS = 12
VIEW_BYTES = 8192
VIEWS = 512
DEADLINE_S = 30.0
BAD = frozenset({IoStatus.BAD_HEADER, IoStatus.BAD_PAYLOAD, IoStatus.OTHER_BLOCK})

SOUND = FaultPlan()
ROUGH = FaultPlan(
    eio_read=0.01,
    short_read=0.01,
    flip_read=0.02,
    flip_media=0.01,
    eio_write=0.01,
    enospc_write=0.01,
    short_write=0.01,
    torn_write=0.02,
    lost_write=0.02,
    misdirected_write=0.02,
    eio_sync=0.02,
    eio_advise=0.05,
    eio_statvfs=0.05,
    silent_from_byte=SLABS_OFFSET,
)
HOSTILE_START = replace(
    ROUGH,
    eio_open=0.15,
    lock_held=0.15,
    eio_size=0.15,
    enospc_allocate=0.15,
    eio_filesystem=0.3,
    eio_advise=0.3,
    eio_statvfs=0.3,
    silent_from_byte=0,
)


FIRST_FAILURES = (
    ("open", Fault.EIO),
    ("lock", Fault.HELD),
    ("size", Fault.EIO),
    ("allocate", Fault.ENOSPC),
    ("statvfs_free_bytes", Fault.EIO),
    ("filesystem", Fault.EIO),
    ("sync", Fault.EIO),
)
"""One of these meets the very first start: making a file is rare, and its calls would hardly fail by chance."""


@dataclass(frozen=True, slots=True)
class SimResult:
    """Figures of one run, or of several added up; `check` says what is wrong with them."""

    seeds: int = 0
    lives: int = 0
    served_reads: int = 0
    wrong_reads: int = 0
    injected: int = 0
    """Pages that a load of the block last written there was given wrong, in bytes that mean something."""
    detected: int = 0
    false_alarms: int = 0
    """Durable blocks called damaged though the disk gave every page of them right."""
    phantoms: int = 0
    """Blocks told after a restart that were never written there."""
    durable_blocks: int = 0
    """Durable when a life ended after which nothing excuses their loss."""
    durable_lost: int = 0
    sites: dict[str, SiteCount] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """All that counts above and should not have, in words."""

    def __add__(self, other: SimResult) -> SimResult:
        added: dict[str, Any] = {}
        for name in (each.name for each in fields(self)):
            mine, others = getattr(self, name), getattr(other, name)
            added[name] = _added(mine, others) if isinstance(mine, dict) else mine + others
        return SimResult(**added)

    def sites_without_failure(self) -> list[str]:
        return [site for site in SITES if site not in self.sites or not self.sites[site].raised]

    def check(self) -> list[str]:
        """What this run shows to be broken, in words; empty if nothing."""
        if self.detected == self.injected:
            return list(self.problems)
        return [*self.problems, f"detected {self.detected} of {self.injected} corrupt pages read"]


def _added(mine: dict, others: dict) -> dict:  # type: ignore[type-arg]
    total = dict(mine)
    for key, value in others.items():
        if isinstance(value, SiteCount) and key in total:
            pairs = zip(_numbers(total[key]), _numbers(value), strict=True)
            total[key] = SiteCount(*(left + right for left, right in pairs))
        else:
            total[key] = total[key] + value if key in total else value
    return total


def _numbers(count: SiteCount) -> tuple[int, int, int, int]:
    return (count.calls, count.raised, count.short, count.lied)


def shapes() -> list[Shape]:
    """Blocks that fill their slot and blocks that do not; slots of one page and of two."""
    sizes = [(4096, 4096), (3000, 4096), (8192, 8192)]
    return [
        Shape(
            SlabOwner(1000 + position, bytes([position]) * 32, 0, 1, payload, slot, 32, 16, f"model-{position}"),
            payload,
            slots_per_slab(SLAB_BYTES, slot),
        )
        for position, (payload, slot) in enumerate(sizes)
    ]


class NvmeSimulation:
    """One seed. `run` does all of it; the rest is its parts."""

    def __init__(self, seed: int, folder: Path, *, sound: bool = False, loads: int = 300) -> None:
        """With `sound` the disk only ever loses power. About `loads` load jobs in all."""
        self._seed = seed
        self._rng = random.Random(seed)
        self._folder = folder
        self._sound = sound
        self._index_lies = () if sound else ("flip", "older")
        self._loads_left = loads
        self._paths = tuple(folder / f"drive{number}" for number in range(DRIVES))
        self._files = SimFiles(random.Random(seed))
        self._shapes = shapes()
        self._ledger = Ledger(seed)
        self._model = Model()
        self._memory = memoryview(mmap.mmap(-1, VIEWS * VIEW_BYTES))
        self._views = [self._memory[start : start + VIEW_BYTES] for start in range(0, len(self._memory), VIEW_BYTES)]
        self._free_views = list(self._views)
        self._jobs: dict[int, _Job] = {}
        self._next_job = 0
        self._next_hash = 0
        self._generation = 0
        self._woken = threading.Event()
        self._skew_s = 0.0
        self._tier: NvmeTier
        self._restore: _Restore | None = None
        self._older_index: Path | None = None
        self._reads_seen = 0
        self._writers: dict[tuple[Path, int], Block] = {}
        """Whose write to a page was the last, whatever shape its slab had then: only of that block a page is wrong."""
        self._wrong_by_page: dict[tuple[Path, int], list[int]] = {}
        self._count: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        self._problems: list[str] = []
        self.story: list[str] = []
        """What happened to whole lives, for whoever looks into a seed."""

    def run(self) -> SimResult:
        excused = True
        try:
            while self._loads_left > 0:
                self._live(excused)
                excused = self._end_life()
            self._live(excused)
        finally:
            self._tier.close(DEADLINE_S)
        return self._result()

    # --- a life ----------------------------------------------------------------------------------------------------

    def _live(self, excused: bool) -> None:
        self._start(excused)
        self._sweep()
        if not self._sound:
            self._files.plan = self._rng.choice([SOUND, ROUGH, ROUGH])
        for _ in range(self._rng.randint(5, 40)):
            self._rng.choices(
                [self._assign, self._retire, self._write, self._load, self._load_stale, self._forget],
                [2, 0.3, 6, 6, 1, 1],
            )[0]()
            if self._rng.random() < 0.7:
                self._settle()
        if self._rng.random() < 0.5:
            self._settle()
            self._sweep()

    def _start(self, excused: bool) -> None:
        """Start until the tier is up; on a disk that fails in the middle of it, once more on one that does not."""
        hostile = not self._sound and self._rng.random() < 0.6
        self._files.plan = replace(HOSTILE_START, direct=self._rng.random() < 0.5) if hostile else SOUND
        if not self._sound and not self._count["lives"]:
            site, fault = FIRST_FAILURES[self._seed % len(FIRST_FAILURES)]
            self._files.plan, hostile = FaultPlan(at=((site, 1, fault),)), True
        self._begin()
        if hostile and not self._whole():
            self._refused_start()
            excused = True
        if not self._whole():
            assert self._header_is_damaged(), f"a drive refuses without a cause: {self._reasons()}"
            self._tier.close(DEADLINE_S)
            self._wipe()
            excused = True
            self._begin()
        assert self._whole(), self._reasons()
        self._finish_start(excused or hostile)

    def _refused_start(self) -> None:
        """A drive was left out, which renumbers the slabs of the others: end this life at once, begin a sound one."""
        self._note("refused start")
        restore = self._restore
        if restore is not None and self._tier.describe().up and self._rng.random() < 0.5:
            self._until(lambda: restore.done, "the restore")
        if self._rng.random() < 0.5:
            self._tier.close(DEADLINE_S)
        old = self._tier
        self._files = self._rng.choice([self._files.process_kill, self._files.power_cut])()
        old.close(DEADLINE_S)
        self._files.plan = SOUND
        self._begin()

    def _begin(self) -> None:
        self._count["lives"] += 1
        self._woken.clear()
        self._restore = _Restore()
        options = NvmeOptions(
            paths=self._paths,
            bytes_per_path=file_bytes(SLAB_BYTES, SLABS_PER_DRIVE),
            slab_bytes=SLAB_BYTES,
            queue_depth=4,
            staging=self._rng.choice(["always", "never"]),
            index_batch_s=0.001,
        )
        self._tier = NvmeTier(options, files=self._files, wake=self._woken.set, clock=self._clock)
        self._tier.start()

    def _finish_start(self, excused: bool) -> None:
        """Wait for the restore and compare what it told with what was written."""
        restore = self._restore
        assert restore is not None
        self._until(lambda: restore.done or not self._tier.describe().up, "the restore")
        assert self._tier.first_generation > self._generation or not self._tier.describe().up, (
            "a generation comes again"
        )
        self._generation = max(self._generation, self._tier.first_generation)
        damaged = self._damaged_places()
        before = set(self._model.durable)
        by_owner = {shape.owner: shape for shape in self._shapes}
        slabs = {slab: by_owner[owner] for slab, owner, _ in restore.slabs}
        phantoms, missing = self._model.restored(slabs, restore.blocks)
        self._count_problem("phantoms", [f"{told[:2]} generation {told[5]:x}" for told in phantoms])
        if not excused:
            self._count["durable_blocks"] += len(before - damaged)
            lost = sorted(missing - damaged)
            self._count_problem("durable_lost", [f"{place} {self._model.latest[place]}" for place in lost])

    def _end_life(self) -> bool:
        """End the life in some way and perhaps damage the index; whether lost blocks are excused by that."""
        end = self._rng.choice(["close", "kill", "power cut"])
        self._note(end)
        if end == "close":
            self._tier.close(DEADLINE_S)
            self._settle()
            self._files.plan = SOUND
            self._files = self._files.process_kill()
        else:
            self._poll()
            indexes = [path / INDEX_NAME / name for name in (LAST_FILE, INDEX_FILE) for path in self._paths]
            contents = [_steady_copy(path) for path in indexes]
            self._files = self._files.process_kill() if end == "kill" else self._files.power_cut()
            self._tier.close(DEADLINE_S)
            if self._rng.random() < 0.5:
                self._note("index: as at the kill")
                for path, content in zip(indexes, contents, strict=True):
                    if content:
                        path.write_bytes(content)
        self._abandon_jobs()
        return self._trouble_index()

    def _trouble_index(self) -> bool:
        trouble = self._rng.choice(["none", "none", "none", "delete", "truncate", *self._index_lies])
        self._note(f"index: {trouble}")
        index = self._rng.choice(self._paths) / INDEX_NAME
        data = index / INDEX_FILE
        older = self._older_index
        if not data.exists():
            return True
        if trouble == "delete":
            shutil.rmtree(index)
        elif trouble == "truncate":
            with data.open("r+b") as file:
                file.truncate(self._rng.randrange(data.stat().st_size))
        elif trouble == "flip":
            self._flip(data)
        elif trouble == "older" and older is not None:
            index = self._paths[int(older.name.rpartition("-")[2])] / INDEX_NAME
            shutil.rmtree(index, ignore_errors=True)
            shutil.copytree(older, index)
        if older is None or self._rng.random() < 0.5:
            self._keep_index()
        return trouble in ("flip", "older")

    def _flip(self, data: Path) -> None:
        """One bit, in the part of the file that holds something."""
        with data.open("r+b") as file:
            content = file.read()
            byte = self._rng.randrange(max(1, len(content.rstrip(b"\0"))))
            file.seek(byte)
            file.write(bytes([content[byte] ^ 1 << self._rng.randrange(8)]))

    def _keep_index(self) -> None:
        number = self._rng.randrange(DRIVES)
        if (self._paths[number] / INDEX_NAME).exists():
            self._older_index = Path(tempfile.mkdtemp(dir=self._folder)) / f"older-{number}"
            shutil.copytree(self._paths[number] / INDEX_NAME, self._older_index)

    def _wipe(self) -> None:
        """Begin anew on empty drives."""
        self._note("wiped")
        self._files = self._files.process_kill()
        for path in self._paths:
            shutil.rmtree(path, ignore_errors=True)
            self._files.remove(path / DATA_NAME)
        self._older_index = None
        self._model = Model()
        self._writers.clear()
        self._generation = 0

    # --- what the owner does ---------------------------------------------------------------------------------------

    def _assign(self) -> None:
        free = [slab for slab in range(self._tier.slabs) if slab not in self._model.slabs]
        if free:
            slab, shape = self._rng.choice(free), self._rng.choice(self._shapes)
            self._model.assign(slab, shape)
            self._tier.assign_slab(slab, shape.owner, self._next_generation())

    def _retire(self) -> None:
        slabs = self._model.idle_slabs()
        if slabs:
            slab = self._rng.choice(slabs)
            self._model.retire(slab)
            self._tier.retire_slab(slab)

    def _write(self) -> None:
        shape = self._rng.choice(self._shapes)
        places = self._some(self._model.places(shape))
        if not places:
            return
        if self._rng.random() < 0.7:
            self._tier.forget(places)
        blocks = [self._new_block(shape) for _ in places]
        views = self._take_views(len(places))
        for place, block, view in zip(places, blocks, views, strict=True):
            self._model.write(place, block)
            path, pages = self._pages_of(place, shape)
            self._writers.update(((path, page), block) for page in pages)
            self._ledger.fill([block.hash], view[: shape.payload_bytes])
        job = _Job(shape, places, blocks, views, writes=True)
        self._tier.write(
            WriteJob(
                **self._arguments(job),
                parents=[block.parent for block in blocks],
                depths=[block.depth for block in blocks],
            )
        )
        self._perhaps_cancel()

    def _load(self) -> None:
        shape = self._rng.choice(self._shapes)
        self._load_places(self._some([place for place in self._model.places(shape) if place in self._model.believed]))

    def _load_places(self, places: list[Place]) -> None:
        if places:
            blocks = [self._model.believed[place] for place in places]
            self._begin_load(blocks[0].shape, places, blocks)

    def _load_stale(self) -> None:
        """Load what was overwritten, or never there."""
        shape = self._rng.choice(self._shapes)
        places = self._some(self._model.places(shape))
        if places:
            blocks = []
            for place in places:
                known = [block for block in self._model.history.get(place, {}).values() if block.shape == shape]
                blocks.append(self._rng.choice(known) if known else self._new_block(shape))
            self._begin_load(shape, places, blocks)

    def _begin_load(self, shape: Shape, places: list[Place], blocks: list[Block]) -> None:
        self._loads_left -= 1
        views = self._take_views(len(places))
        for view in views:
            view[:] = bytes(len(view))
        self._model.busy.update(places)
        self._tier.load(LoadJob(**self._arguments(_Job(shape, places, blocks, views, writes=False))))
        self._perhaps_cancel()

    def _sweep(self) -> None:
        """Load all that is believed to be there."""
        for shape in self._shapes:
            places = [place for place in self._model.places(shape) if place in self._model.believed]
            for start in range(0, len(places), JOB_BLOCKS):
                self._load_places(places[start : start + JOB_BLOCKS])
                if len(self._jobs) > 8:
                    self._settle()
        self._settle()

    def _forget(self) -> None:
        places = self._some(self._model.places(self._rng.choice(self._shapes)))
        self._model.drop(places)
        self._tier.forget(places)

    def _perhaps_cancel(self) -> None:
        if self._rng.random() < 0.05:
            self._tier.cancel(self._rng.randrange(self._next_job))
        if self._rng.random() < 0.05:
            self._tier.flush()

    def _some(self, places: list[Place]) -> list[Place]:
        """A few of them; often neighbours, which the tier may read in one go."""
        count = min(len(places), self._rng.randint(1, JOB_BLOCKS))
        if self._rng.random() < 0.5:
            start = self._rng.randint(0, len(places) - count) if places else 0
            return places[start : start + count]
        return self._rng.sample(places, count)

    def _new_block(self, shape: Shape) -> Block:
        self._next_hash += 1
        block_hash = self._next_hash.to_bytes(32, "big")
        depth = self._rng.randrange(4)
        parent = self._rng.randbytes(32) if depth else b""
        return Block(block_hash, parent, depth, self._next_generation(), shape)

    def _next_generation(self) -> int:
        self._generation += 1
        return self._generation

    def _take_views(self, count: int) -> list[memoryview]:
        if len(self._free_views) < count:
            self._settle()
        return [self._free_views.pop() for _ in range(count)]

    def _arguments(self, job: _Job) -> dict[str, Any]:
        """Enter the job; what both kinds of job are made of."""
        self._next_job += 1
        self._jobs[self._next_job] = job
        return {
            "job_id": self._next_job,
            "slot_bytes": job.shape.slot_bytes,
            "payload_bytes": job.shape.payload_bytes,
            "namespace_id": job.shape.owner.namespace_id(),
            "slabs": [slab for slab, _ in job.places],
            "slots": [slot for _, slot in job.places],
            "hashes": [block.hash for block in job.blocks],
            "generations": [block.generation for block in job.blocks],
            "views": [view[: job.shape.slot_bytes] for view in job.views],
        }

    # --- what comes back -------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        self._until(lambda: not self._jobs, f"{len(self._jobs)} jobs")

    def _until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        self._poll()
        while not done():
            assert self._woken.wait(deadline - time.monotonic()), f"nothing came of {what} in {DEADLINE_S} s"
            self._poll()

    def _poll(self) -> None:
        self._woken.clear()
        for event in self._tier.completed():
            if isinstance(event, JobDone):
                self._job_done(self._jobs.pop(event.job_id), event)
            elif self._restore is not None:
                self._restore.take(event)

    def _job_done(self, job: _Job, done: JobDone) -> None:
        statuses = [IoStatus(status) for status in done.statuses]
        assert len(statuses) == len(job.places) == len(done.checksums)
        kind = "write" if job.writes else "load"
        self._statuses.update(f"{kind} {status.name}" for status in statuses)
        if IoStatus.DOWN in statuses:
            self._skew_s += 120.0  # longer than any back-off
        if job.writes:
            for place, status in zip(job.places, statuses, strict=True):
                self._model.written(place, status is IoStatus.OK)
        else:
            self._note_corrupt_reads()
            for place, block, view, status in zip(job.places, job.blocks, job.views, statuses, strict=True):
                self._judge(place, block, view[: job.shape.payload_bytes], status)
        self._free_views += job.views

    def _judge(self, place: Place, block: Block, payload: memoryview, status: IoStatus) -> None:
        """One block of a load: were its bytes right, and was everything noticed that the disk gave wrong?"""
        self._model.busy.discard(place)
        served = status is IoStatus.OK
        if served and self._ledger.compare([block.hash], [payload]).wrong:
            self._problems.append(f"life {self._count['lives']}: wrong bytes at {place} for {block}")
        path, pages = self._pages_of(place, block.shape)
        seen = missed = 0
        for position, page in enumerate(pages):
            meaningful = _meaningful_bytes(position, block.shape)
            seen += sum(first < meaningful for first in self._wrong_by_page.pop((path, page), ()))
            missed += 0 <= self._files.last_read_wrong(path, page) < meaningful
        if all(self._writers.get((path, page)) is block for page in pages):
            self._count["injected"] += seen
            self._count["detected"] += seen - (missed if served else 0)
            if place in self._model.durable and not seen and status in BAD:
                self._count_problem("false_alarms", [f"{place} {status.name} {block}"])
        if status in BAD and self._model.believed.get(place) == block:
            self._model.drop([place])

    def _note_corrupt_reads(self) -> None:
        """Sort by page what the disk gave wrong since the last time: where in the page, read by read."""
        reads = self._files.corrupt_reads(self._reads_seen)
        for read in reads:
            self._wrong_by_page.setdefault((read.path, read.page), []).append(read.first_byte)
        self._reads_seen += len(reads)

    def _abandon_jobs(self) -> None:
        """The process that would have heard of them is gone."""
        self._jobs.clear()
        self._free_views = list(self._views)
        self._wrong_by_page.clear()
        self._reads_seen = len(self._files.corrupt_reads())

    def _note(self, what: str) -> None:
        self._ends[what] += 1
        self.story.append(f"life {self._count['lives']}: {what}")

    def _count_problem(self, kind: str, cases: list[str]) -> None:
        self._count[kind] += len(cases)
        self._problems += (f"life {self._count['lives']}: {kind}: {case}" for case in cases)

    # --- places ----------------------------------------------------------------------------------------------------

    def _pages_of(self, place: Place, shape: Shape) -> tuple[Path, range]:
        """The file and the pages of a slot, its header page first."""
        slab, slot = place
        first = slot_offset(SLAB_BYTES, shape.slot_bytes, slab // DRIVES, slot) // PAGE
        return self._paths[slab % DRIVES] / DATA_NAME, range(first, first + 1 + shape.slot_bytes // PAGE)

    def _damaged_places(self) -> set[Place]:
        """Believed places that the disk damaged, by themselves or with the header of their slab."""
        damaged = set()
        wrong = {path / DATA_NAME: self._files.wrong_pages(path / DATA_NAME) for path in self._paths}
        for place, block in self._model.believed.items():
            path, pages = self._pages_of(place, block.shape)
            slab_page = slab_offset(SLAB_BYTES, place[0] // DRIVES) // PAGE
            if not wrong[path].isdisjoint([slab_page, *pages]):
                damaged.add(place)
        return damaged

    def _header_is_damaged(self) -> bool:
        """Of some drive, in both copies."""
        return any({0, 1} <= self._files.wrong_pages(path / DATA_NAME) for path in self._paths)

    def _whole(self) -> bool:
        """All drives are up."""
        return self._tier.describe().up and all(drive.up for drive in self._tier.detail().drives)

    def _reasons(self) -> list[str]:
        return [self._tier.describe().reason, *(drive.reason for drive in self._tier.detail().drives)]

    def _clock(self) -> float:
        return time.monotonic() + self._skew_s

    def _result(self) -> SimResult:
        total = self._ledger.total
        return SimResult(
            seeds=1,
            served_reads=total.served,
            wrong_reads=total.wrong,
            sites=self._files.sites(),
            statuses=dict(self._statuses),
            ends=dict(self._ends),
            problems=tuple(self._problems),
            **{name: self._count[name] for name in _COUNTED},
        )


_COUNTED = ("lives", "injected", "detected", "false_alarms", "phantoms", "durable_blocks", "durable_lost")


@dataclass(frozen=True, slots=True)
class _Job:
    shape: Shape
    places: list[Place]
    blocks: list[Block]
    views: list[memoryview]
    writes: bool


class _Restore:
    """What a start has told so far."""

    def __init__(self) -> None:
        self.slabs: list[tuple[int, SlabOwner, int]] = []
        self.blocks: list[RestoredBlock] = []
        self.done = False

    def take(self, event: RestoredSlabs | RestoredBlocks | RestoreDone) -> None:
        if isinstance(event, RestoredSlabs):
            self.slabs += event.slabs
        elif isinstance(event, RestoredBlocks):
            self.blocks += event.blocks
        else:
            self.done = True


def _steady_copy(path: Path) -> bytes:
    """The bytes of a file that a thread may be writing, from a moment when it was not; empty if there is none."""
    last = None
    for _ in range(1000):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        if content == last:
            return content
        last = content
    raise AssertionError(f"{path} never stays the same")


def _meaningful_bytes(page: int, shape: Shape) -> int:
    """Of page 0 of a slot, the header, the first bytes; of the payload's last page what the payload fills."""
    return HEADER_BYTES if page == 0 else min(PAGE, shape.payload_bytes - (page - 1) * PAGE)
