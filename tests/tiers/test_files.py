"""The seam to the operating system: positions, locks between descriptors, and what a path lies on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay.tiers.files import OsFiles, is_virtual

files = OsFiles()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = files.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    yield opened
    files.close(opened)


def test_buffers_are_written_and_read_in_order(fd: int) -> None:
    assert files.pwritev(fd, [b"abc", b"defg"], 10) == 7
    first, second = bytearray(4), bytearray(8)
    assert files.preadv(fd, [first, second], 10) == 7  # short: the file ends
    assert first + second == b"abcdefg" + bytes(5)
    files.sync(fd)


def test_allocated_bytes_take_space_and_read_as_zeros(fd: int) -> None:
    files.allocate(fd, 0, 1 << 20)
    assert files.size(fd) == 1 << 20
    assert os.fstat(fd).st_blocks * 512 >= 1 << 20
    buffer = bytearray(b"x" * 100)
    assert files.preadv(fd, [buffer], 4096) == 100
    assert buffer == bytes(100)


def test_second_descriptor_cannot_lock(fd: int, tmp_path: Path) -> None:
    files.lock(fd)
    other = files.open(tmp_path / "data", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        files.lock(other)
    files.close(other)


def test_descriptor_is_not_inherited(fd: int) -> None:
    assert not os.get_inheritable(fd)


def test_root_lies_on_the_system_disk_and_shared_memory_does_not() -> None:
    assert files.filesystem(Path("/")).is_system_disk
    if not Path("/dev/shm").is_mount():
        pytest.skip("no tmpfs on /dev/shm")
    found = files.filesystem(Path("/dev/shm"))
    assert (found.kind, found.is_system_disk) == ("tmpfs", False)


def test_virtual_disks_are_told_by_their_bus_and_so_is_what_stands_on_them(tmp_path: Path) -> None:
    """As /sys/dev/block has it: links to folders of devices, a partition's below its disk's."""
    places = {
        "vda1": "devices/platform/virtio3/block/vda/vda1",
        "sda": "devices/pci0000:00/0000:00:02.0/virtio12/host2/target2:0:0/2:0:0:0/block/sda",
        "nvme0n1": "devices/pci0000:00/0000:01:00.0/nvme/nvme0/nvme0n1",
        "dm-0": "devices/virtual/block/dm-0",
        "md1": "devices/virtual/block/md1",
    }
    for name, place in places.items():
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / name).symlink_to(place)
    for above, below in (("dm-0", "md1"), ("md1", "vda1"), ("md1", "nvme0n1")):
        slaves = tmp_path / places[above] / "slaves"
        slaves.mkdir(exist_ok=True)
        (slaves / below).symlink_to(tmp_path / places[below])
    found = {name for name in places if is_virtual(tmp_path / name)}
    assert found == {"vda1", "sda", "dm-0", "md1"}
    assert not is_virtual(tmp_path / "none")


def test_free_bytes_are_those_of_the_filesystem(tmp_path: Path) -> None:
    assert 0 < files.statvfs_free_bytes(tmp_path) < 1 << 60
