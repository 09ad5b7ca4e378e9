"""The way back after a start: a damaged index costs time, never the daemon, never a wrong byte."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.tiers.nvme_rig import SLABS, WAIT_S, FaultyFiles, Rig, filled

from forebay.tiers import nvme_reader, nvme_restore
from forebay.tiers.nvme_drive import DATA_NAME
from forebay.tiers.nvme_format import SLABS_OFFSET
from forebay.tiers.nvme_jobs import IoStatus
from support.lmdb_pages import AIMS, aimed_bit
from support.nvme_file import flip_bit

OK = IoStatus.OK
INDEX = Path("index") / "data.mdb"
COUNT = 60
FLIPS = 10


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed drive whose index has seen several transactions, deletions too."""
    folder = tmp_path_factory.mktemp("original")
    rig = filled(folder / "drive", COUNT)
    for number in range(0, COUNT, 10):
        rig.tier.forget([(0, number)])
        rig.tier.flush()
        assert rig.write([number]) == [OK]
    rig.close()
    return folder / "drive"


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(original, tmp_path / "drive")


def check_served(path: Path) -> Rig:
    """Whatever the restore tells is served right or is a miss, and the tier works."""
    rig = Rig(path)
    rig.restore()
    assert rig.tier.describe().up
    statuses = rig.load_restored(rig.blocks)
    assert len({block[:2] for block in rig.blocks}) == len(rig.blocks)
    assert set(statuses) <= {OK}
    rig.assign(1)
    assert rig.write([3, 4], slab=1) == [OK, OK]
    return rig


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_of_the_index_harm_nobody(original: Path, tmp_path: Path, seed: int) -> None:
    """In meta pages, branches, leaves, unused space: read right, or found and rebuilt. Each on a copy of the drive."""
    rng, rebuilt = random.Random(seed), 0
    for flip in range(FLIPS):
        path = shutil.copytree(original, tmp_path / f"drive{flip}")
        flip_bit(path / INDEX, aimed_bit((path / INDEX).read_bytes(), AIMS[flip % len(AIMS)], rng))
        rig = check_served(path)
        assert rig.restored is not None
        assert rig.numbers() == list(range(COUNT))
        rebuilt += rig.restored.rebuilt
        rig.close()
        if flip % 4 == 0:
            again = Rig(path)
            assert (again.restore().problems, again.restore().blocks) == ((), COUNT + 2)
            again.close()
    assert rebuilt >= FLIPS // 2 - 1, "the flips have hit next to nothing"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"garbage" * 10_000,
        lambda data: data[: len(data) // 2],
        lambda data: bytes(len(data)),
        lambda data: data[:8192] + bytes(4096) + data[12288:],
        lambda data: data[:8192] + data[12288:16384] + data[12288:],
    ],
    ids=["empty", "garbage", "half", "zeros", "zeroed page", "misdirected page"],
)
def test_ruined_index_is_set_aside_and_made_anew(path: Path, damage: object) -> None:
    data = (path / INDEX).read_bytes()
    (path / INDEX).write_bytes(damage(data))  # type: ignore[operator]
    rig = check_served(path)
    assert rig.numbers() == list(range(COUNT))
    assert rig.restored is not None
    if rig.restored.rebuilt:
        assert str(path / "index") in rig.restored.problems[0]
        assert (path / "index.bad-1").is_dir()
    rig.close()


def test_ruined_index_that_cannot_be_set_aside_is_not_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDB may abort the process over it. What is on the drive is served, and nothing of it overwritten."""

    def failing(directory: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (path / INDEX).write_bytes(b"\xaa" * 65536)
    monkeypatch.setattr(nvme_restore, "quarantine_index", failing)
    rig = Rig(path)
    assert any("could not be set aside" in problem for problem in rig.restore().problems)
    assert rig.numbers() == list(range(COUNT))
    assert set(rig.load_restored(rig.blocks)) == {OK}
    rig.assign(1)
    assert rig.write([3], slab=1) == [IoStatus.IO_ERROR]
    assert rig.tier._units[0].committer._index is None
    rig.close()
    monkeypatch.undo()
    again = Rig(path)
    assert again.restore().rebuilt
    assert set(range(COUNT)) <= set(again.numbers())
    again.close()


def test_index_of_another_drive_is_not_believed(path: Path, tmp_path: Path) -> None:
    filled(tmp_path / "other", 3).close()
    shutil.rmtree(path / "index")
    shutil.copytree(tmp_path / "other" / "index", path / "index")
    rig = check_served(path)
    assert rig.numbers() == list(range(COUNT))
    rig.close()


def test_older_index_than_its_drive_serves_nothing_wrong(path: Path) -> None:
    """Somebody put back a copy: places that were written since answer as other blocks."""
    shutil.copytree(path / "index", path.parent / "old")
    rig = Rig(path)
    rig.restore()
    generation = rig.tier.first_generation
    assert rig.write([5], generations=[generation]) == [OK]
    rig.close()
    shutil.rmtree(path / "index")
    shutil.copytree(path.parent / "old", path / "index")
    again = Rig(path)
    again.restore()
    statuses = dict(zip((block[1] for block in again.blocks), again.load_restored(again.blocks)))
    assert statuses.pop(5) is IoStatus.OTHER_BLOCK
    assert set(statuses.values()) == {OK}
    again.close()


def damage_slab_header(path: Path) -> None:
    with (path / DATA_NAME).open("r+b") as file:
        file.seek((1 << 20) + 60)
        file.write(b"\xff")


def test_damaged_slab_header_costs_a_rebuild_its_blocks_and_is_named(path: Path) -> None:
    damage_slab_header(path)
    shutil.rmtree(path / "index")
    rig = Rig(path)
    done = rig.restore()
    assert done.blocks == 0
    assert any("header of slab 0 is damaged" in problem for problem in done.problems)
    rig.close()


def test_slab_header_follows_the_index_at_the_next_start(path: Path) -> None:
    """The index does not need it; a later rebuild would."""
    damage_slab_header(path)
    rig = Rig(path)
    assert rig.restore().blocks == COUNT
    rig.close()
    shutil.rmtree(path / "index")
    again = Rig(path)
    assert again.restore().blocks == COUNT
    again.close()


def test_interrupted_rebuild_is_begun_again(path: Path) -> None:
    """An index knows all or says so: half of one would lose blocks that were reported durable."""
    shutil.rmtree(path / "index")
    rig = Rig(path)
    rig.tier._units[0].restore._stopping.set()
    rig.tier.close(30)
    again = Rig(path)
    assert again.restore().blocks == COUNT
    again.close()


# --- a child that misbehaves ---


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run this instead of the reader of the index."""
    monkeypatch.setattr(nvme_reader, "_WALKER", (sys.executable, "-c", code))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", "ended in the middle"),
        ("raise SystemExit(3)", "ended in the middle"),
        ("import os; os.write(1, bytes(range(1, 255)))", "frame too long"),
        ("import os; os.write(1, bytes.fromhex('090000000000000000000000'))", "unknown frame"),
        ("import os; os.write(1, bytes.fromhex('030000000000000000000000')); raise SystemExit(1)", "ended with 1"),
        ("import os; os.write(1, bytes.fromhex('010000000500000001000000') + b'x')", "makes no sense"),
        ("import os; os.write(1, bytes.fromhex('020101000500000001000000') + b'x')", "0 blocks in a frame of 5"),
        ("import os; os.write(1, bytes.fromhex('02010100010000000d000000') + bytes(13))", "makes no sense"),
    ],
    ids=["abort", "exit", "garbage", "unknown", "no slabs", "short slabs", "no blocks", "part of a block"],
)
def test_anything_but_a_clean_answer_leads_to_a_rebuild(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    child(monkeypatch, code)
    rig = check_served(path)
    assert rig.restored is not None
    assert rig.restored.rebuilt
    assert said in rig.restored.problems[0]
    assert rig.numbers() == list(range(COUNT))
    rig.close()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_what_stops_the_daemon_does_not_end_the_child(path: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    """A service manager signals every process of the unit: a sound index must not be taken for a broken one."""
    code = (
        "import sys, os, signal\n"
        "from forebay.tiers import nvme_walk as walk\n"
        f"os.kill(os.getpid(), signal.{number})\n"
        "sys.exit(walk.main(sys.argv[1:], sys.stdout.buffer))\n"
    )
    child(monkeypatch, code)
    rig = Rig(path)
    assert rig.restore().problems == ()
    rig.close()


def test_slabs_of_a_drive_are_told_however_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = filled(tmp_path / "drive", 1)
    for slab in range(1, SLABS):
        rig.assign(slab)
    rig.close()
    monkeypatch.setattr(nvme_reader, "_BODY_BYTES_MAX", 1000)
    again = Rig(tmp_path / "drive")
    assert again.restore().problems == ()
    assert again.slabs is not None
    assert len(again.slabs) == SLABS
    again.close()


def test_silent_child_is_given_up_at_the_deadline(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import signal; signal.pause()")
    rig = Rig(path, walk_timeout_s=0.1)
    done = rig.restore()
    assert done.rebuilt
    assert "said nothing" in done.problems[0]
    rig.close()


def test_loads_are_served_while_the_index_is_being_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import signal; signal.pause()")
    rig = Rig(path)
    assert set(rig.load(range(1, 9), generations=[1 << 32 | 1] * 8)) == {OK}
    assert rig.restored is None
    assert rig.tier.detail().drives[0].index == "loading"
    rig.close()


def test_close_does_not_wait_for_the_child(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import signal; signal.pause()")
    Rig(path).tier.close(5.0)
    monkeypatch.undo()
    rig = Rig(path)
    assert rig.restore().problems == ()
    rig.close()


def test_child_that_dies_after_its_first_blocks_costs_no_block_and_tells_none_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index was walked whole by then; the rest is found by the headers, and the index stays."""
    code = (
        "import io, sys, os, signal\n"
        "from forebay.tiers import nvme_walk as walk\n"
        "output = io.BytesIO()\n"
        "walk.main(sys.argv[1:], output)\n"
        "sound = output.getvalue()\n"
        "at = 0\n"
        "for _ in range(2):\n"
        "    at += walk.FRAME.size + walk.FRAME.unpack_from(sound, at)[4]\n"
        "os.write(1, sound[:at])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child(monkeypatch, code)
    rig = check_served(path)
    assert rig.restored is not None
    assert not rig.restored.rebuilt
    assert rig.restored.problems
    assert rig.numbers() == list(range(COUNT))
    rig.close()
    monkeypatch.undo()
    again = Rig(path)
    assert again.restore().problems == ()
    again.close()


def test_every_wait_for_the_child_has_a_deadline(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the drive holds it, it may never end."""
    waits: list[float | None] = []
    wait = subprocess.Popen.wait

    def noted(popen: Any, timeout: float | None = None) -> int:
        waits.append(timeout)
        return wait(popen, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", noted)
    rig = Rig(path)
    rig.restore()
    rig.close()
    assert waits
    assert None not in waits


# --- what nobody foresaw ---


def test_bug_in_a_restore_is_told_as_its_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index that nobody has walked is not opened."""

    def broken(*_: object) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(nvme_restore, "scan_slabs", broken)
    monkeypatch.setattr(nvme_reader.IndexReader, "read", broken)
    rig = Rig(path)
    done = rig.restore()
    assert [problem.rpartition(": ")[2] for problem in done.problems] == ["a bug"] * 2
    assert rig.slabs == []
    rig.assign(1)
    assert rig.write([3], slab=1) == [IoStatus.IO_ERROR]
    rig.close()


def test_bug_in_a_scan_is_told_as_its_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise ValueError("a bug")

    shutil.rmtree(path / "index")
    monkeypatch.setattr(nvme_restore, "scan_slots", broken)
    rig = Rig(path)
    assert "a bug" in rig.restore().problems[-1]
    rig.close()
    monkeypatch.undo()
    again = Rig(path)
    assert again.restore().blocks == COUNT
    again.close()


class HangingFiles(FaultyFiles):
    """One drive's reads beyond its own headers hang, once a test says so."""

    def __init__(self, hanging: Path) -> None:
        super().__init__()
        self._hanging = hanging
        self._fds: set[int] = set()
        self.let_go = threading.Event()

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        fd = super().open(path, flags, mode)
        (self._fds.add if path.parent == self._hanging else self._fds.discard)(fd)
        return fd

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if fd in self._fds and offset >= SLABS_OFFSET:
            self.let_go.wait(WAIT_S)
        return super().preadv(fd, buffers, offset)


def test_drive_that_hangs_keeps_no_other_from_coming_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    rig = Rig(one, other)
    rig.restore()
    for slab in range(2):
        rig.assign(slab)
        assert set(rig.write(range(5), slab=slab)) == {OK}
    rig.close()
    for path in (one, other):
        shutil.rmtree(path / "index")
    monkeypatch.setattr(nvme_restore, "HANG_S", 0.2)
    files = HangingFiles(one)
    again = Rig(one, other, files=files)
    done = again.restore()
    assert any(f"{one} hangs" in problem for problem in done.problems)
    assert [slab for slab, _, _ in again.slabs or ()] == [1]
    assert [block[:2] for block in again.blocks] == [(1, slot) for slot in range(5)]
    assert set(again.load_restored(again.blocks)) == {OK}
    drives = again.tier.detail().drives
    assert ("hangs" in drives[0].index_reason, drives[0].index, drives[1].index) == (True, "failing", "up")
    assert again.write([7], slab=1) == [OK]
    again.assign(0)
    assert again.write([7], slab=0) == [IoStatus.IO_ERROR]
    files.let_go.set()
    again.close()
    last = Rig(one, other)
    last.restore()
    assert {(slab, slot) for slab in range(2) for slot in range(5)} <= {block[:2] for block in last.blocks}
    last.close()


def test_copies_of_a_dead_child_are_removed(path: Path) -> None:
    (path / "index.copy-1").mkdir()
    (path / "index.copy-1" / "data.mdb").write_bytes(b"half")
    rig = Rig(path)
    rig.restore()
    rig.close()
    assert sorted(entry.name for entry in path.iterdir()) == [DATA_NAME, "index"]


def test_restore_shows_its_progress(path: Path) -> None:
    rig = Rig(path)
    rig.restore()
    detail = rig.tier.detail()
    assert (detail.restored, detail.restored_blocks, detail.restored_fraction) == (True, COUNT, 1.0)
    rig.close()
