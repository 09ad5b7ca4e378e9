"""Shared memory: sizes that cannot change, and a generation table that only its daemon can write."""

from __future__ import annotations

import fcntl
import mmap
import os

import pytest

from forebay.kvstore.errors import Corrupt, LayoutError
from forebay.transports import shm


@pytest.fixture
def memfd():
    fd = shm.create_memfd("test", 1 << 16)
    yield fd
    os.close(fd)


def test_a_memfd_is_zeroed_takes_no_page_and_does_not_survive_exec(memfd: int) -> None:
    found = os.fstat(memfd)
    assert (found.st_size, found.st_blocks) == (1 << 16, 0)
    assert not os.get_inheritable(memfd)
    with shm.map_shared(memfd, 1 << 16, writable=False) as mapped:
        assert mapped[:] == bytes(1 << 16)


def test_nobody_can_resize_a_memfd(memfd: int) -> None:
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(memfd, size)


def test_two_mappings_of_a_memfd_are_the_same_memory(memfd: int) -> None:
    with (
        shm.map_shared(memfd, 1 << 16, writable=True) as writer,
        shm.map_received(memfd, 1 << 16, writable=False) as reader,
    ):
        writer[5000:5005] = b"block"
        assert reader[5000:5005] == b"block"


def test_a_received_descriptor_that_could_shrink_is_refused() -> None:
    fd = os.memfd_create("loose", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(Corrupt):
        shm.map_received(fd, 4096, writable=False)
    os.close(fd)


def test_a_received_descriptor_that_is_too_small_is_refused(memfd: int) -> None:
    with pytest.raises(Corrupt):
        shm.map_received(memfd, (1 << 16) + 1, writable=False)


def test_a_received_descriptor_that_is_no_memfd_is_refused() -> None:
    reader, writer = os.pipe()
    with pytest.raises(Corrupt):
        shm.map_received(reader, 4096, writable=False)
    os.close(reader)
    os.close(writer)


def test_huge_pages_that_are_not_to_be_had_are_an_os_error() -> None:
    try:
        fd = shm.create_memfd("huge", 2 << 20, huge_page_bytes=2 << 20)
    except OSError as error:
        assert error.errno  # noqa: PT017  # either answer is right here
    else:
        assert os.fstat(fd).st_size == 2 << 20
        os.close(fd)


def test_a_peer_sees_what_the_daemon_writes_into_the_table() -> None:
    table = shm.GenerationTable(700)
    view = shm.GenerationView(table.fd, 700)
    table.set(699, 41)
    assert table.bump(699) == view.get(699) == view.words[699] == 42
    assert _set_and_get(table, view, 3, (1 << 63) + 5) == (1 << 63) + 5
    assert view.buffer[699 * 8 : 700 * 8] == (42).to_bytes(8, "little")
    table.bump_all()
    assert [view.get(slot) for slot in (0, 698, 699)] == [1, 1, 43]
    view.close()
    table.close()
    table.close()


def _set_and_get(table: shm.GenerationTable, view: shm.GenerationView, slot: int, value: int) -> int:
    table.set(slot, value)
    return view.get(slot)


def test_a_peer_can_map_the_table_read_only_and_in_no_other_way() -> None:
    table = shm.GenerationTable(10)
    with pytest.raises(PermissionError):
        mmap.mmap(table.fd, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(table.fd, b"\1", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(table.fd, 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(table.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    reopened = os.open(f"/proc/self/fd/{table.fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        shm.map_shared(reopened, 4096, writable=True)
    os.close(reopened)
    view = shm.GenerationView(table.fd, 10)
    with pytest.raises(TypeError, match="read-only"):
        view.words[0] = 1
    view.close()
    table.set(9, 7)  # the daemon's own mapping still writes
    assert table.get(9) == 7
    table.close()


def test_a_view_outlives_the_daemons_table() -> None:
    table = shm.GenerationTable(10)
    table.set(1, 5)
    view = shm.GenerationView(table.fd, 10)
    table.close()
    assert view.get(1) == 5
    view.close()


def test_tables_are_whole_pages() -> None:
    assert [shm.table_bytes(slots) for slots in (1, 512, 513)] == [4096, 4096, 8192]


def test_a_table_of_no_slots_is_refused() -> None:
    with pytest.raises(LayoutError):
        shm.GenerationTable(0)
