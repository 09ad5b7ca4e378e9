"""The operating system's files and the simulated ones agree on all that the tiers use, so tests on either count."""

from __future__ import annotations

import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from forebay.tiers.files import Files, OsFiles
from support.sim_files import SimFiles

PAGE = 4096
FLAGS = os.O_RDWR | os.O_CREAT


@pytest.fixture(params=["os", "simulated"])
def files(request: pytest.FixtureRequest) -> Files:
    return OsFiles() if request.param == "os" else SimFiles(random.Random(0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "blocks.dat"


def aligned(pages: int) -> memoryview:
    return memoryview(mmap.mmap(-1, pages * PAGE))


def test_new_file_is_empty_until_allocated_and_reads_as_zeros(files: Files, path: Path) -> None:
    fd = files.open(path, FLAGS | os.O_EXCL)
    assert files.size(fd) == 0
    files.allocate(fd, 0, 8 * PAGE)
    files.allocate(fd, 0, PAGE)
    assert files.size(fd) == 8 * PAGE
    buffer = bytearray(b"x" * PAGE)
    assert files.preadv(fd, [buffer], 7 * PAGE) == PAGE
    assert buffer == bytes(PAGE)
    files.close(fd)


def test_buffers_are_written_and_filled_in_order(files: Files, path: Path) -> None:
    fd = files.open(path, FLAGS)
    assert files.pwritev(fd, [b"one", bytearray(b"two"), memoryview(b"three")], 4090) == 11
    assert files.size(fd) == 4101
    parts = [bytearray(4), bytearray(100)]
    assert files.preadv(fd, parts, 4090) == 11
    assert (parts[0], parts[1][:7]) == (b"onet", b"wothree")
    assert files.preadv(fd, parts, 5000) == 0
    files.sync(fd)
    files.advise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    files.close(fd)


def test_two_descriptors_see_one_file_and_its_contents_outlive_them(files: Files, path: Path) -> None:
    first, second = files.open(path, FLAGS), files.open(path, os.O_RDWR)
    files.pwritev(first, [b"seen"], 0)
    for fd in (first, second):
        files.close(fd)
    third = files.open(path, os.O_RDONLY)
    buffer = bytearray(4)
    files.preadv(third, [buffer], 0)
    assert buffer == b"seen"
    with pytest.raises(OSError) as refused:  # noqa: PT011 - the errno is compared
        files.pwritev(third, [b"no"], 0)
    assert refused.value.errno == errno.EBADF
    files.close(third)


def test_lock_belongs_to_a_descriptor_until_it_closes(files: Files, path: Path) -> None:
    first, second = files.open(path, FLAGS), files.open(path, FLAGS)
    files.lock(first)
    files.lock(first)
    with pytest.raises(BlockingIOError):
        files.lock(second)
    files.close(first)
    files.lock(second)
    files.close(second)


def test_open_says_what_is_wrong(files: Files, path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.open(path, os.O_RDWR)
    files.close(files.open(path, FLAGS))
    with pytest.raises(FileExistsError):
        files.open(path, FLAGS | os.O_EXCL)


def test_direct_io_moves_whole_pages(files: Files, path: Path) -> None:
    try:
        fd = files.open(path, FLAGS | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"no O_DIRECT in {path.parent}: {error}")
    memory = aligned(2)
    memory[:] = b"p" * len(memory)
    assert files.pwritev(fd, [memory[:PAGE], memory[PAGE:]], PAGE) == 2 * PAGE
    assert files.preadv(fd, [memory], 0) == 2 * PAGE
    assert memory[:PAGE] == bytes(PAGE)
    files.close(fd)


def test_free_space_and_filesystem_are_known(files: Files, tmp_path: Path) -> None:
    assert files.statvfs_free_bytes(tmp_path) > 0
    assert files.filesystem(tmp_path).kind
