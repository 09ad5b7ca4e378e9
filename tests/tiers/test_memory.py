"""Slab memory: page kinds, population that never writes, sealing, locking, sizes."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiers.fakes import FailingMemory, FakeMachine, view_of

from forebay.tiers.machine import MachineMemory
from forebay.tiers.memory import (
    PIECE_BYTES,
    Memory,
    PageKind,
    SlabMemory,
    choose_nodes,
    choose_pages,
    lock_budget,
)

MIB = 1 << 20
SLAB = 2 * PIECE_BYTES
NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def never() -> bool:
    return False


def resident_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def shmem_huge_bytes() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("ShmemHugePages:"))
    return int(line.split()[1]) << 10


@pytest.fixture
def hugetlb_pool() -> Iterator[None]:
    """Reserve enough pages for one slab, for the test's duration."""
    try:
        before = NR_HUGEPAGES.read_text()
        NR_HUGEPAGES.write_text(str(int(before) + 2 * SLAB // (2 * MIB)))
    except OSError as error:
        pytest.skip(f"cannot reserve huge pages: {error}")
    try:
        if MachineMemory().free_hugetlb_bytes() < SLAB:
            pytest.skip("the kernel gave no 2 MiB huge pages")
        yield
    finally:
        NR_HUGEPAGES.write_text(before)


@pytest.fixture
def shmem_thp() -> Iterator[None]:
    """Let shared memory have transparent huge pages, for the test's duration."""
    try:
        text = SHMEM_ENABLED.read_text()
        before = text.partition("[")[2].partition("]")[0]
        SHMEM_ENABLED.write_text("advise")
    except OSError as error:
        pytest.skip(f"cannot set shmem_enabled: {error}")
    try:
        yield
    finally:
        SHMEM_ENABLED.write_text(before)


# --- the memory of one slab ---


def test_slab_memory_can_neither_grow_nor_shrink_nor_be_sealed_further() -> None:
    made = SlabMemory(Memory(), SLAB, "4k")
    seals = fcntl.fcntl(made.fd, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    for size in (SLAB - 4096, SLAB + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(made.fd, size)
    made.free()


def test_fresh_memory_takes_no_page_until_populated() -> None:
    made = SlabMemory(Memory(), SLAB, "4k")
    assert resident_bytes(made.fd) == 0
    made.populate(never)
    assert resident_bytes(made.fd) == SLAB == made.populated_bytes
    made.free()


def test_populating_leaves_what_an_engine_has_written() -> None:
    made = SlabMemory(Memory(), SLAB, "4k")
    view_of(made)[SLAB - 4 :] = b"kept"
    made.populate(never)
    assert bytes(view_of(made)[SLAB - 4 :]) == b"kept"
    made.free()


def test_kernel_without_populate_falls_back_to_fallocate() -> None:
    made = SlabMemory(FailingMemory(populate=errno.EINVAL), SLAB, "4k")
    view_of(made)[:4] = b"kept"
    made.populate(never)
    assert resident_bytes(made.fd) == SLAB
    assert bytes(view_of(made)[:4]) == b"kept"
    made.free()


def test_populating_stops_between_two_pieces() -> None:
    answers = iter([False, True])
    made = SlabMemory(Memory(), SLAB, "4k")
    made.populate(lambda: next(answers))
    assert made.populated_bytes == PIECE_BYTES == resident_bytes(made.fd)
    made.free()


def test_failed_population_is_raised_and_can_be_tried_again() -> None:
    memory = FailingMemory(populate=errno.ENOMEM)
    made = SlabMemory(memory, SLAB, "4k")
    with pytest.raises(OSError, match="memory"):
        made.populate(never)
    memory.errors.clear()
    made.populate(never)
    assert made.populated_bytes == SLAB
    made.free()


def test_freed_memory_is_back_although_a_peer_still_holds_it() -> None:
    made = SlabMemory(Memory(), SLAB, "4k")
    made.populate(never)
    peer = os.dup(made.fd)
    made.free()
    assert resident_bytes(peer) == 0
    os.close(peer)


def test_released_memory_keeps_its_bytes_for_the_peer_that_holds_it() -> None:
    made = SlabMemory(Memory(), SLAB, "4k")
    view_of(made)[:4] = b"kept"
    peer = os.dup(made.fd)
    made.release(1.0)
    assert os.pread(peer, 4, 0) == b"kept"
    os.close(peer)


def test_populating_freed_memory_takes_nothing() -> None:
    memory = FailingMemory()
    made = SlabMemory(memory, SLAB, "4k")
    made.free()
    made.populate(never)
    assert memory.calls["populate"] == 0


def test_failed_map_or_memfd_leaks_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Too many open files"):
        SlabMemory(FailingMemory(create=errno.EMFILE), SLAB, "4k")
    with pytest.raises(OSError, match="memory"):
        SlabMemory(FailingMemory(map=errno.ENOMEM), SLAB, "hugetlb")
    assert len(os.listdir("/proc/self/fd")) == before


def test_locked_memory_stays_mapped_until_freed() -> None:
    memory = FailingMemory()
    made = SlabMemory(memory, SLAB, "4k")
    made.lock = True
    made.populate(never)
    assert (memory.calls["lock"], memory.calls["map"], made.locked_bytes) == (2, 1, SLAB)
    made.free()
    assert made.locked_bytes == 0


def test_mlock_locks_for_real() -> None:
    made = SlabMemory(Memory(), MIB, "4k")
    made.lock = True
    try:
        made.populate(never)
    except OSError as error:
        pytest.skip(f"mlock of 1 MiB is not allowed here: {error}")
    status = Path("/proc/self/status").read_text()
    assert int(status.partition("VmLck:")[2].split()[0]) == 1024
    made.free()
    assert "VmLck:\t       0 kB" in Path("/proc/self/status").read_text()


# --- page kinds ---


@pytest.mark.usefixtures("hugetlb_pool")
def test_hugetlb_pages_are_reserved_when_made_and_return_when_freed() -> None:
    machine = MachineMemory()
    free = machine.free_hugetlb_bytes()
    made = SlabMemory(Memory(), SLAB, "hugetlb")
    assert machine.free_hugetlb_bytes() == free - SLAB
    made.populate(never)
    peer = os.dup(made.fd)
    made.free()
    assert machine.free_hugetlb_bytes() >= free - SLAB
    os.close(peer)
    assert machine.free_hugetlb_bytes() == free


def test_empty_hugetlb_pool_is_an_error_when_made_not_a_signal_later() -> None:
    if MachineMemory().free_hugetlb_bytes() >= SLAB:
        pytest.skip("the hugetlb pool of this machine has free pages")
    with pytest.raises(OSError, match="mmap"):
        SlabMemory(Memory(), SLAB, "hugetlb")


@pytest.mark.usefixtures("shmem_thp")
def test_thp_slab_lies_on_huge_pages() -> None:
    before = shmem_huge_bytes()
    made = SlabMemory(Memory(), SLAB, "thp")
    made.populate(never)
    got = shmem_huge_bytes() - before
    made.free()
    assert got >= SLAB // 2  # the kernel may be short of whole huge pages


HUGE = FakeMachine(hugetlb=64 * MIB, thp=True)
THP = FakeMachine(thp=True)


@pytest.mark.parametrize(
    ("wanted", "machine", "got"),
    [
        ("auto", HUGE, "hugetlb"),
        ("auto", THP, "thp"),
        ("auto", FakeMachine(), "4k"),
        ("auto", FakeMachine(hugetlb=62 * MIB), "4k"),
        ("thp", HUGE, "thp"),
        ("4k", HUGE, "4k"),
    ],
)
def test_best_page_kind_not_above_the_wanted_one_is_chosen(wanted: PageKind, machine: FakeMachine, got: str) -> None:
    assert choose_pages(wanted, 64 * MIB, 16 * MIB, machine) == (got, "")


def test_page_kind_that_cannot_be_had_is_warned_about_with_the_remedy() -> None:
    got, warning = choose_pages("hugetlb", 64 * MIB, 16 * MIB, THP)
    assert got == "thp"
    assert "32 free huge pages" in warning
    assert "vm.nr_hugepages" in warning
    got, warning = choose_pages("thp", 64 * MIB, 16 * MIB, FakeMachine())
    assert got == "4k"
    assert "shmem_enabled" in warning


def test_slabs_of_broken_huge_pages_are_on_4k() -> None:
    assert choose_pages("auto", 64 * MIB, 3 * MIB, HUGE)[0] == "4k"


# --- locking ---

SWAP = FakeMachine(swap=MIB, lock_limit=8 * MIB)


@pytest.mark.parametrize(
    ("mode", "pages", "machine", "budget"),
    [
        ("auto", "4k", FakeMachine(lock_limit=8 * MIB), 0),
        ("auto", "hugetlb", SWAP, 0),
        ("on", "hugetlb", SWAP, 0),
        ("off", "4k", SWAP, 0),
        ("auto", "4k", FakeMachine(swap=MIB), 64 * MIB),
        ("on", "4k", FakeMachine(), 64 * MIB),
        ("on", "thp", FakeMachine(lock_limit=64 * MIB), 64 * MIB),
    ],
)
def test_memory_is_locked_only_where_it_could_be_swapped(
    mode: str, pages: str, machine: FakeMachine, budget: int
) -> None:
    assert lock_budget(mode, pages, 64 * MIB, machine) == (budget, "")  # type: ignore[arg-type]


def test_small_lock_limit_is_named_with_the_need_and_the_fix() -> None:
    budget, warning = lock_budget("auto", "4k", 64 * MIB, SWAP)
    assert budget == 8 * MIB
    for word in ("RLIMIT_MEMLOCK", str(8 * MIB), str(64 * MIB), "LimitMEMLOCK=infinity", "ulimit -l"):
        assert word in warning


def test_small_lock_limit_of_an_ordinary_user_is_noticed() -> None:
    """In a child without root's exemption: the limit is read, and mlock beyond it fails."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
        os.setuid(65534)
        made = SlabMemory(Memory(), MIB, "4k")
        made.lock = True
        code = 1
        try:
            made.populate(never)
        except OSError as error:
            limit_seen = MachineMemory().lock_limit_bytes() == 64 << 10
            code = 0 if limit_seen and error.errno == errno.ENOMEM else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- NUMA nodes and sizes ---


def test_node_choice() -> None:
    two = FakeMachine(nodes=(0, 1))
    assert choose_nodes(-1, FakeMachine()) == ()
    assert choose_nodes(-1, two) == (0, 1)
    assert choose_nodes(1, two) == (1,)
    assert choose_nodes(-1, FakeMachine(nodes=(0, 1), near_gpus=(1,))) == (1,)
    assert choose_nodes(0, FakeMachine(nodes=(0, 1), near_gpus=(1,))) == (0,)
    assert choose_nodes(-1, FakeMachine(nodes=(0, 1), near_gpus=(0, 1))) == (0, 1)
    assert choose_nodes(-1, FakeMachine(nodes=(0, 1), near_gpus=(5,))) == (0, 1)
    with pytest.raises(ValueError, match=r"NUMA node 5 .* \[0, 1\]"):
        choose_nodes(5, two)


@pytest.mark.parametrize("nodes", [(0,), (0, 0)])
def test_kernel_takes_the_node_preference(nodes: tuple[int, ...]) -> None:
    """In a child, since the policy stays with the thread."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            Memory().prefer_nodes(nodes)
        except OSError as error:
            print(error, file=sys.stderr)
            code = error.errno or 1
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (errno.ENOSYS, errno.EPERM):
        pytest.skip(f"set_mempolicy is not to be had here: {os.strerror(code)}")
    assert code == 0
