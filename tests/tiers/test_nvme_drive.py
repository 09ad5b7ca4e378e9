"""A data file is made, taken, or refused with words that say what was found; never guessed at."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from tests.tiers.nvme_rig import SLAB, SLABS, FaultyFiles

from forebay.kvstore.errors import Busy, Corrupt, Forbidden, LayoutError, TierFull
from forebay.tiers.files import FilesystemInfo
from forebay.tiers.nvme_drive import DATA_NAME, LIFETIME_STEP_BYTES, Drive, open_drive, open_existing
from forebay.tiers.nvme_format import HEADER_COPY_OFFSET, PAGE, WRITTEN_OFFSETS, encode_drive, file_bytes

FILE_BYTES = file_bytes(SLAB, SLABS)


def take(path: Path, files: FaultyFiles | None = None, slab_bytes: int = SLAB, slabs: int = SLABS) -> Drive:
    return open_drive(files or FaultyFiles(), path, slab_bytes=slab_bytes, slabs=slabs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "drive"


@pytest.fixture
def made(path: Path) -> Path:
    """A path with a data file that has seen one life and is closed again."""
    drive = take(path)
    drive.begin_life(1)
    drive.close()
    return path


def flip(path: Path, offset: int) -> None:
    data = path / DATA_NAME
    with data.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_new_file_is_whole_and_ours_alone(path: Path) -> None:
    drive = take(path)
    found = (path / DATA_NAME).stat()
    assert found.st_size == FILE_BYTES
    assert found.st_blocks * 512 >= FILE_BYTES
    assert found.st_mode & 0o777 == 0o600
    assert path.stat().st_mode & 0o777 == 0o700
    assert drive.is_new
    drive.close()


def test_file_comes_back_as_the_same_drive_one_epoch_later(path: Path) -> None:
    first = take(path)
    first.begin_life(1)
    first.close()
    second = take(path)
    assert second.drive_id == first.drive_id
    assert second.header.epoch == 1
    assert not second.is_new
    second.close()


def test_second_daemon_is_refused(path: Path) -> None:
    drive = take(path)
    with pytest.raises(Busy, match="in use by another daemon"):
        take(path)
    drive.close()
    take(path).close()


@pytest.mark.parametrize(("slab_bytes", "slabs"), [(SLAB, SLABS + 1), (SLAB, SLABS - 1), (2 * SLAB, 3)])
def test_changed_capacity_is_refused_and_nothing_is_touched(made: Path, slab_bytes: int, slabs: int) -> None:
    before = (made / DATA_NAME).stat()
    with pytest.raises(LayoutError, match="was made with 7 slabs of 1048576 bytes"):
        take(made, slab_bytes=slab_bytes, slabs=slabs)
    assert (made / DATA_NAME).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("found", [b"something else" * 1000, b"short", bytes(5000) + b"short"])
def test_foreign_file_is_refused_and_not_touched(path: Path, found: bytes) -> None:
    path.mkdir(mode=0o700)
    (path / DATA_NAME).write_bytes(found)
    with pytest.raises(Corrupt, match="is not touched"):
        take(path)
    assert (path / DATA_NAME).read_bytes() == found


def test_other_version_is_refused_by_its_number(made: Path) -> None:
    for page in (0, HEADER_COPY_OFFSET):
        flip(made, page + 8)
    with pytest.raises(LayoutError, match="version 0, and this forebay reads version 1"):
        take(made)


@pytest.mark.parametrize("page", [0, HEADER_COPY_OFFSET])
def test_one_torn_header_is_survived(made: Path, page: int) -> None:
    """They are rewritten one after the other: a power cut damages one at most."""
    flip(made, page + 50)
    drive = take(made)
    drive.begin_life(2)
    drive.close()
    data = (made / DATA_NAME).read_bytes()
    copies = [data[offset : offset + PAGE] for offset in (0, HEADER_COPY_OFFSET)]
    assert copies == [encode_drive(drive.header)] * 2


def test_two_torn_headers_are_not(made: Path) -> None:
    for page in (0, HEADER_COPY_OFFSET):
        flip(made, page + 50)
    with pytest.raises(Corrupt, match="header is damaged"):
        take(made)


def test_epoch_is_the_newer_of_the_two(made: Path) -> None:
    """A power cut between the two writes: the copy was written first."""
    drive = take(made)
    page = bytearray(encode_drive(drive.header))
    drive.begin_life(5)
    drive.close()
    with (made / DATA_NAME).open("r+b") as file:
        file.write(page)
    drive = take(made)
    assert drive.header.epoch == 5
    drive.close()


def test_creation_that_was_cut_short_is_taken_up(path: Path) -> None:
    """First nothing but an empty file, then a header without the space behind it."""
    path.mkdir(mode=0o700)
    (path / DATA_NAME).touch()
    take(path).close()
    os.truncate(path / DATA_NAME, 2 * PAGE)
    take(path).close()
    assert (path / DATA_NAME).stat().st_size == FILE_BYTES


def test_space_without_a_header_is_a_creation_that_was_cut_short(path: Path) -> None:
    """A power cut may keep the file's length and lose its first bytes."""
    path.mkdir(mode=0o700)
    (path / DATA_NAME).touch()
    os.truncate(path / DATA_NAME, FILE_BYTES)
    drive = take(path)
    assert drive.is_new
    drive.close()
    assert (path / DATA_NAME).stat().st_size == FILE_BYTES


def test_zeros_with_something_behind_them_are_not_ours(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / DATA_NAME).write_bytes(bytes(PAGE * 3) + b"somebody's" + bytes(PAGE))
    with pytest.raises(Corrupt, match="not touched"):
        take(path)


class DeafFiles(FaultyFiles):
    """A kernel that takes no hints and cannot say what a place is."""

    def advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        raise OSError(errno.EINVAL, "no hints")

    def filesystem(self, path: Path) -> FilesystemInfo:
        raise OSError(errno.EIO, "no answer")


def test_hint_that_is_not_taken_costs_nothing(path: Path) -> None:
    files = DeafFiles()
    files.direct = False
    drive = take(path, files)
    drive.write_slab_page(0, b"x" * PAGE)
    drive.sync()
    assert drive.read_slab_page(0) == b"x" * PAGE
    drive.close()


def test_longer_file_than_its_header_says_is_refused(made: Path) -> None:
    os.truncate(made / DATA_NAME, FILE_BYTES + 1)
    with pytest.raises(LayoutError, match="not touched"):
        take(made)


def test_full_disk_is_noticed_before_anything_is_allocated(path: Path) -> None:
    files = FaultyFiles()
    files.free_bytes = 100_000
    with pytest.raises(TierFull, match="has 100000 bytes free"):
        take(path, files)
    files.free_bytes = None
    take(path, files).close()


def test_moved_path_is_the_same_drive(made: Path, tmp_path: Path) -> None:
    made.rename(tmp_path / "elsewhere")
    drive = take(tmp_path / "elsewhere")
    assert drive.header.epoch == 1
    drive.close()


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o775])
@pytest.mark.parametrize("linked", [False, True])
def test_directory_that_others_can_write_to_is_refused(path: Path, tmp_path: Path, mode: int, linked: bool) -> None:
    """By itself, or at the end of a link."""
    path.mkdir()
    path.chmod(mode)
    given = tmp_path / "given"
    given.symlink_to(path)
    with pytest.raises(Forbidden, match=f"{given if linked else path} has mode 0{mode:o} and can be written by others"):
        take(given if linked else path)
    path.chmod(0o755)
    take(given if linked else path).close()


@pytest.mark.parametrize("whose", ["the directory", "the link to it"])
def test_directory_or_link_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    """Who owns the link can make it lead elsewhere."""
    path.mkdir(mode=0o700)
    real = Path.stat

    def tampered(found: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        fields = list(real(found, follow_symlinks=follow_symlinks))
        fields[stat.ST_UID] += (os.geteuid() + 1) * (follow_symlinks == (whose == "the directory"))
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", tampered)
    with pytest.raises(Forbidden, match="or what it is a link to, belongs to uid"):
        take(path)


def test_path_that_is_a_file_is_refused(path: Path) -> None:
    path.touch()
    with pytest.raises(Forbidden, match="not a directory"):
        take(path)


def test_linked_data_file_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.mkdir(mode=0o700)
    (tmp_path / "victim").write_bytes(b"precious")
    (path / DATA_NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        take(path)


def test_page_cache_is_used_where_direct_io_fails_and_is_said_so(path: Path) -> None:
    files = FaultyFiles()
    files.direct = False
    drive = take(path, files)
    assert not drive.is_direct
    assert "Invalid argument" in drive.io_reason
    assert any("page cache" in warning and "Invalid argument" in warning for warning in drive.warnings())
    drive.begin_life(1)
    assert os.POSIX_FADV_DONTNEED in files.advised
    drive.close()


def test_direct_io_is_used_where_it_works(path: Path) -> None:
    drive = take(path)
    if not drive.is_direct:
        pytest.skip(f"{drive.io_reason} on {path}")
    assert not any("page cache" in warning for warning in drive.warnings())
    drive.close()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (FilesystemInfo("tmpfs", False), "is memory"),
        (FilesystemInfo("nfs4", False), "network file system"),
        (FilesystemInfo("fuse.sshfs", False), "network file system"),
        (FilesystemInfo("ext4", True), "system's disk"),
    ],
)
def test_doubtful_place_is_warned_about(path: Path, found: FilesystemInfo, said: str) -> None:
    files = FaultyFiles()
    files.kind = found
    drive = take(path, files)
    assert any(said in warning and str(path) in warning for warning in drive.warnings())
    drive.close()


def test_good_place_is_not_warned_about(path: Path) -> None:
    files = FaultyFiles()
    files.kind = FilesystemInfo("xfs", False)
    drive = take(path, files)
    assert not drive.is_direct or drive.warnings() == ()
    drive.close()


def test_failed_sync_reaches_the_caller(path: Path) -> None:
    files = FaultyFiles()
    drive = take(path, files)
    files.syncs = [OSError(errno.EIO, "Input/output error")]
    with pytest.raises(OSError, match="Input/output"):
        drive.begin_life(1)
    drive.close()


def test_existing_drive_is_taken_with_its_own_sizes(made: Path, tmp_path: Path) -> None:
    drive = open_existing(FaultyFiles(), made)
    assert (drive.slab_bytes, drive.slabs) == (SLAB, SLABS)
    with pytest.raises(Busy):
        open_existing(FaultyFiles(), made)
    drive.close()
    with pytest.raises(FileNotFoundError):
        open_existing(FaultyFiles(), tmp_path)


# --- bytes written ---


def test_count_of_bytes_written_goes_on_in_the_next_life(made: Path) -> None:
    for life in (1, 2, 3):
        drive = take(made)
        assert drive.lifetime_written_bytes == 1000 * (life - 1)
        drive.count_written(1000)
        drive.note_written()
        drive.close()


def test_killed_daemon_forgets_less_than_a_step(made: Path) -> None:
    drive = take(made)
    drive.count_written(LIFETIME_STEP_BYTES)
    drive.count_written(LIFETIME_STEP_BYTES - 1)
    drive.close()
    drive = take(made)
    assert drive.lifetime_written_bytes == LIFETIME_STEP_BYTES
    drive.close()


@pytest.mark.parametrize(("torn", "found"), [(WRITTEN_OFFSETS[0], 1000), (WRITTEN_OFFSETS[1], 1001)])
def test_count_of_bytes_written_survives_a_torn_page(made: Path, torn: int, found: int) -> None:
    """The two places are written in turn, the second first, so the one before is whole when the last is not."""
    drive = take(made)
    for size in (1000, 1):
        drive.count_written(size)
        drive.note_written()
    drive.close()
    flip(made, torn + 40)
    drive = take(made)
    assert drive.lifetime_written_bytes == found
    drive.close()


def test_count_that_cannot_be_put_down_costs_nothing_else(made: Path) -> None:
    class ReadOnly(FaultyFiles):
        def pwritev(self, *_: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

    drive = take(made, ReadOnly())
    drive.count_written(1)
    drive.note_written()
    assert drive.lifetime_written_bytes == 1
    drive.close()
