"""What is in the nvme tier's folder and what is not: the cap holds, a crash leaves nothing behind, and a file that is
not beyond doubt the configured one is told of and not touched.
"""

from __future__ import annotations

import hashlib
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forebay.kvstore.outcome import Scope
from forebay.tiers.nvme_format import HEADER_COPY_OFFSET
from support.ledger import Ledger, Verdict
from support.live import eventually
from support.nvme_file import find_slots, set_format_version, write_at
from support.nvme_live import BLOCKS, Engine, NvmeDaemon, chain

SMALL = 8 << 20
EXTENT_TREE_BYTES = 64 << 10
"""What the file system itself may need to note where the file lies."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


@contextmanager
def _measured(path: Path, sizes: list[tuple[int, int]]) -> Iterator[None]:
    """Note a file's length and its disk space over and over; from its making on, if it is not there yet."""
    over = threading.Event()

    def measure() -> None:
        while not over.wait(0.002):
            if path.exists():
                found = path.stat()
                sizes.append((found.st_size, found.st_blocks * 512))

    watcher = threading.Thread(target=measure)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _fill(engine: Engine, daemon: NvmeDaemon, first: int) -> None:
    """Store until the tier has had to let blocks go."""
    for number in range(first, first + 200):
        assert engine.store(number).rejected == 0
        engine.persist(number)
        tier = daemon.nvme()
        if tier["slots_resident"] + BLOCKS > tier["slots_total"] and tier["slabs_assigned"] == tier["slabs_total"]:
            return
    raise AssertionError(f"the tier does not fill up: {daemon.nvme()}")


def test_file_never_exceeds_its_cap_and_what_a_crash_left_is_used_again() -> None:
    """Killed amid writes in every round; each time the tier fills up again, to the last few slots."""
    sizes: list[tuple[int, int]] = []
    ledger = Ledger(1)
    with NvmeDaemon(nvme_bytes=SMALL, host_bytes="4MiB") as daemon, _measured(daemon.data_files[0], sizes):
        for life in range(3):
            if life:
                daemon.start()
                daemon.restored()
            with Engine(daemon, ledger) as engine:
                _fill(engine, daemon, 1000 * life)
                tier = daemon.nvme()
                assert tier["slots_resident"] >= 0.97 * tier["slots_total"], tier
                assert daemon.problems() == ()
                for number in range(10):
                    engine.store(1000 * life + 500 + number)
                    engine.persist(1000 * life + 500 + number, timeout_ms=0)
                daemon.kill()
        names = {each.name for each in daemon.paths[0].iterdir()}
        assert names == {"blocks.dat", "index"}, names
        assert daemon.paths[0].stat().st_mode & 0o777 == 0o700
        assert daemon.data_files[0].stat().st_mode & 0o777 == 0o600
    assert len(sizes) > 100
    assert max(size for size, _ in sizes) <= SMALL
    assert max(space for _, space in sizes) <= SMALL + EXTENT_TREE_BYTES


def test_second_daemon_on_a_path_runs_without_the_tier_and_says_so() -> None:
    ledger = Ledger(2)
    with NvmeDaemon() as first, Engine(first, ledger) as engine:
        engine.store_durably([1])
        with NvmeDaemon(paths=first.paths) as second, Engine(second, Ledger(3)) as other:
            [reason] = second.status()["not_ready"]
            assert "in use by another daemon" in reason
            assert str(first.paths[0]) in reason
            assert "in use by another daemon" in second.log()
            assert other.store(1).committed == BLOCKS
            assert other.fetch(1) == Verdict(BLOCKS, 0, 0)
            assert other.persist(1, timeout_ms=100).durable == 0
            assert second.problems() == ()
        engine.store_durably([2])
        first.restart()
        first.restored()
        with Engine(first, ledger) as again:
            assert again.fetch_all([1, 2]) == Verdict(2 * BLOCKS, 0, 0)


def _is_foreign(path: Path) -> None:
    path.write_bytes(b"this is somebody's archive\n" * 10_000)


def _is_newer(path: Path) -> None:
    set_format_version(path, 2)


def _is_older(path: Path) -> None:
    set_format_version(path, 0)


def _has_lost_its_headers(path: Path) -> None:
    for offset in (0, HEADER_COPY_OFFSET):
        write_at(path, offset, bytes(4096))


def _is_longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _is_a_folder(path: Path) -> None:
    path.rename(path.with_name("kept"))
    path.mkdir()


def _is_a_link(path: Path) -> None:
    path.rename(path.with_name("kept"))
    path.symlink_to(path.with_name("kept"))


def _is_open_to_all(path: Path) -> None:
    path.parent.chmod(0o777)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "foreign": (_is_foreign, "does not begin as a forebay data file"),
    "newer": (_is_newer, "version 2"),
    "older": (_is_older, "version 0"),
    "headers_lost": (_has_lost_its_headers, "does not begin as a forebay data file"),
    "longer": (_is_longer, "bytes, and its header says"),
    "folder": (_is_a_folder, "directory"),
    "link": (_is_a_link, "symbolic link"),
    "writable_by_all": (_is_open_to_all, "can be written by others"),
}


@pytest.fixture(scope="module")
def used() -> Iterator[NvmeDaemon]:
    """A daemon that is not running, with a chain on its drive."""
    with NvmeDaemon(nvme_bytes=SMALL) as daemon:
        with Engine(daemon, Ledger(4)) as engine:
            engine.store_durably([1])
        daemon.kill()
        yield daemon


def _copies(daemon: NvmeDaemon, paths: Iterable[Path]) -> list[Path]:
    for path in paths:
        subprocess.run(["cp", "-a", "--sparse=always", str(daemon.paths[0]), str(path)], check=True)
    return list(paths)


def _digests(paths: Iterable[Path]) -> dict[Path, str]:
    return {path: _digest(path) for folder in paths for path in folder.rglob("*") if path.is_file()}


def _serves_without_the_tier(daemon: NvmeDaemon) -> None:
    with Engine(daemon, Ledger(5)) as engine:
        assert engine.store(1).committed == BLOCKS
        assert engine.fetch(1) == Verdict(BLOCKS, 0, 0)
        assert engine.persist(1, timeout_ms=0).durable == 0
    assert daemon.problems() == ()
    assert daemon.stop() == 0


def test_files_that_are_not_ours_are_told_of_and_not_touched(used: NvmeDaemon, tmp_path: Path) -> None:
    """Each on a drive of its own of one daemon, which then has none that it may use."""
    paths = _copies(used, [tmp_path / case for case in REFUSED])
    for path in paths:
        REFUSED[path.name][0](path / "blocks.dat")
    before = _digests(paths)
    with NvmeDaemon(nvme_bytes=SMALL, paths=paths) as daemon:
        drives = {Path(each["path"]).name: each for each in daemon.status()["nvme"]["drives"]}
        [not_ready] = daemon.status()["not_ready"]
        for path in paths:
            words, reason = REFUSED[path.name][1], drives[path.name]["reason"]
            assert words in reason
            assert str(path) in reason
            assert reason in not_ready
            assert reason in daemon.log()
            assert not drives[path.name]["up"]
        _serves_without_the_tier(daemon)
    assert _digests(paths) == before


@pytest.mark.parametrize(
    ("setting", "size", "words"),
    [
        ("nvme.slab_bytes", 2 << 20, "slabs of 1048576 bytes"),
        ("nvme.bytes", 2 * SMALL, "restore the old sizes"),
        ("nvme.bytes", SMALL // 2, "restore the old sizes"),
    ],
)
def test_file_of_other_sizes_is_told_of_and_not_touched(
    used: NvmeDaemon, tmp_path: Path, setting: str, size: int, words: str
) -> None:
    paths = _copies(used, [tmp_path / "copy"])
    before = _digests(paths)
    with NvmeDaemon({setting: size}, nvme_bytes=SMALL, paths=paths) as daemon:
        [reason] = daemon.status()["not_ready"]
        assert words in reason
        assert str(paths[0]) in reason
        assert reason.removeprefix("tier nvme is down: ") in daemon.log()
        _serves_without_the_tier(daemon)
    assert _digests(paths) == before


def test_folder_that_was_moved_is_as_good_as_before(used: NvmeDaemon, tmp_path: Path) -> None:
    [moved] = _copies(used, [tmp_path / "elsewhere"])
    with NvmeDaemon(nvme_bytes=SMALL, paths=[moved]) as daemon, Engine(daemon, Ledger(4)) as engine:
        daemon.restored()
        assert engine.fetch(1) == Verdict(BLOCKS, 0, 0)
        assert not daemon.status()["nvme"]["rebuilt"]


def test_truncated_file_costs_the_blocks_beyond_its_end_alone() -> None:
    ledger = Ledger(6)
    with NvmeDaemon(nvme_bytes=SMALL) as daemon:
        with Engine(daemon, ledger) as engine:
            engine.store_durably(range(1, 30))
        daemon.kill()
        [path] = daemon.data_files
        size = path.stat().st_size
        places = find_slots(path)
        end = sorted(slot.offset for slot in places.values())[len(places) // 2]
        with path.open("r+b") as file:
            file.truncate(end)
        daemon.start()
        daemon.restored()
        assert path.stat().st_size == size
        with Engine(daemon, ledger) as engine:
            for number in range(1, 30):
                lost = [at for at, name in enumerate(chain(number)) if places[name].offset + places[name].stride > end]
                found = engine.fetch(number)
                assert (found.served, found.wrong) == (min(lost, default=BLOCKS), 0)
        assert daemon.problems() == ()


def test_removed_blocks_stay_away_after_a_clean_stop() -> None:
    with NvmeDaemon(nvme_bytes=SMALL) as daemon:
        with Engine(daemon, Ledger(8)) as engine:
            engine.store_durably([1, 2])
            assert engine.client.evict(engine.ns, chain(1), Scope.PREFIX).removed == BLOCKS
        assert daemon.stop() == 0
        daemon.start()
        daemon.restored()
        with Engine(daemon, Ledger(8)) as engine:
            assert engine.client.lookup(engine.ns, chain(1)).blocks == 0
            assert engine.fetch(2) == Verdict(BLOCKS, 0, 0)
        eventually(lambda: daemon.store()["leases"] == 0, "nothing is held")
