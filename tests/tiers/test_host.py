"""The host tier keeps its cap, hands out populated memory in the background, and says what it did not get."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tests.tiers.contract import SLABS, TierContract
from tests.tiers.fakes import FailingMemory, FakeMachine, ViewedHostTier

from forebay.tiers.base import Tier
from forebay.tiers.host import HostTier
from forebay.tiers.memory import PIECE_BYTES

MIB = 1 << 20
SLAB = 2 * MIB
MakeTier = Callable[..., ViewedHostTier]


@pytest.fixture
def make() -> Iterator[MakeTier]:
    """Tiers of four slabs on a machine without huge pages; all closed afterwards."""
    made: list[ViewedHostTier] = []

    def make_tier(**settings: object) -> HostTier:
        arguments = {"machine": FakeMachine(), "populate_threads": 2, **settings}
        made.append(ViewedHostTier(SLABS * SLAB, SLAB, **arguments))  # type: ignore[arg-type]
        return made[-1]

    yield make_tier
    for tier in made:
        tier.close(10.0)


class TestHostTier(TierContract):
    @pytest.fixture(params=[True, False], ids=["populate", "no populate"])
    def tier(self, request: pytest.FixtureRequest, make: MakeTier) -> ViewedHostTier:
        return make(populate=request.param)


def wait_until(true: Callable[[], bool]) -> None:
    """Give the background threads up to 20 s."""
    deadline_s = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline_s, "it never happened"
        os.sched_yield()


def memfds() -> dict[int, int]:
    """Inode -> bytes taken, of each slab memfd this process holds."""
    taken = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if "forebay-slab" in os.readlink(f"/proc/self/fd/{name}"):
                status = os.fstat(int(name))
                taken[status.st_ino] = status.st_blocks * 512
        except OSError:  # closed meanwhile
            continue
    return taken


def populating_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("populate-")]


def test_host_tier_is_a_tier_to_the_type_checker(make: MakeTier) -> None:
    tier: Tier = make()
    assert tier.name == "host"


@pytest.mark.parametrize(
    ("capacity", "slab", "text"),
    [(SLAB, 4095, "multiple"), (SLAB, 0, "multiple"), (SLAB - 1, SLAB, "holds no slab")],
)
def test_sizes_that_make_no_slab_are_refused(capacity: int, slab: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        HostTier(capacity, slab)


def test_capacity_is_whole_slabs() -> None:
    tier = HostTier(SLABS * SLAB + SLAB - 1, SLAB)
    assert tier.describe().capacity_bytes == SLABS * SLAB


# --- populating ---


def test_start_returns_while_memory_is_still_being_populated(make: MakeTier) -> None:
    memory = FailingMemory()
    memory.hold.clear()
    tier = make(memory=memory)
    tier.start()  # populate cannot end before `hold` is set
    assert tier.describe().populated_bytes == 0
    tier.open_slab(0)
    tier.view(0)[:4] = b"used"
    memory.hold.set()
    wait_until(lambda: tier.describe().populated_bytes == SLABS * SLAB)
    assert bytes(tier.view(0)[:4]) == b"used"


def test_opened_slab_is_populated_memory_from_stock(make: MakeTier) -> None:
    tier = make()
    tier.start()
    wait_until(lambda: tier.describe().populated_bytes == SLABS * SLAB)
    tier.open_slab(3)
    assert os.fstat(tier.slab_fd(3)).st_blocks * 512 == SLAB


def test_populated_memory_is_handed_out_before_memory_in_the_making(make: MakeTier) -> None:
    class OnceFast(FailingMemory):
        def populate(self, address: int, length: int) -> None:
            if self.calls["populate"] == 1:
                self.hold.clear()
            super().populate(address, length)

    memory = OnceFast()
    tier = make(memory=memory, populate_threads=1)
    tier.start()
    wait_until(lambda: memory.calls["populate"] == 2)  # the first is done, the second is held up
    tier.open_slab(0)
    assert os.fstat(tier.slab_fd(0)).st_blocks * 512 == SLAB
    memory.hold.set()


def test_stock_is_refilled_after_a_slab_was_closed(make: MakeTier) -> None:
    tier = make()
    tier.start()
    for slab in range(SLABS):
        tier.open_slab(slab)
    tier.close_slab(2)
    wait_until(lambda: tier.describe().populated_bytes == SLABS * SLAB)


def test_without_populate_memory_is_taken_on_first_use(make: MakeTier) -> None:
    tier = make(populate=False)
    tier.start()
    tier.open_slab(0)
    assert os.fstat(tier.slab_fd(0)).st_blocks == 0
    assert not populating_threads()


def test_tier_larger_than_the_machine_is_not_populated(make: MakeTier) -> None:
    tier = make(machine=FakeMachine(available=SLAB))
    tier.start()
    assert not populating_threads()
    assert "make it smaller" in tier.describe().warnings[0]


def test_tier_that_fits_alone_but_not_beside_the_drives_io_is_not_populated(make: MakeTier) -> None:
    room = FakeMachine(available=SLABS * SLAB + 1000)
    tier = make(machine=room, beside_bytes=1001)
    tier.start()
    assert not populating_threads()
    assert "and the drives' I/O 1001, and" in tier.describe().warnings[0]
    assert make(machine=room, beside_bytes=1000).describe().warnings == ()


def test_populating_threads_prefer_the_node(make: MakeTier) -> None:
    memory = FailingMemory()
    tier = make(memory=memory, machine=FakeMachine(nodes=(0, 1)), numa_node=1)
    tier.start()
    wait_until(lambda: tier.describe().populated_bytes == SLABS * SLAB)
    assert memory.nodes == (1,)
    assert tier.describe().numa_node == 1


# --- the cap ---


def test_cap_is_never_exceeded_while_slabs_come_and_go(make: MakeTier) -> None:
    tier = make()
    tier.start()
    for turn in range(200):
        slab = turn % SLABS
        if turn >= SLABS:
            tier.close_slab(slab)
        tier.open_slab(slab)
        tier.view(slab)[:] = b"x" * SLAB
        live = memfds()
        assert len(live) <= SLABS
        assert sum(live.values()) <= SLABS * SLAB


def test_memory_is_back_after_close_slab_although_a_client_maps_it(make: MakeTier) -> None:
    tier = make(populate=False)
    tier.open_slab(0)
    tier.view(0)[:] = b"x" * SLAB
    client = os.dup(tier.slab_fd(0))
    assert os.fstat(client).st_blocks * 512 == SLAB
    tier.close_slab(0)
    assert os.fstat(client).st_blocks == 0
    assert os.pread(client, SLAB, 0) == bytes(SLAB)
    os.close(client)


def test_slab_closed_while_it_is_populated_takes_no_page_afterwards(make: MakeTier) -> None:
    memory = FailingMemory()
    tier = make(memory=memory, populate_threads=1)
    memory.hold.clear()
    tier.start()
    wait_until(lambda: memory.calls["populate"] == 1)
    tier.open_slab(0)  # the spare in the thread's hands
    client = os.dup(tier.slab_fd(0))
    closing = threading.Thread(target=tier.close_slab, args=(0,))
    closing.start()
    memory.hold.set()
    closing.join(20)
    wait_until(lambda: tier.describe().populated_bytes == SLABS * SLAB)
    assert os.fstat(client).st_blocks == 0
    os.close(client)


# --- faults ---


@pytest.mark.parametrize(("call", "number"), [("create", errno.EMFILE), ("create", errno.ENOMEM)])
def test_machine_that_gives_no_memfd_leaves_the_tier_down_with_the_reason(
    make: MakeTier, call: str, number: int
) -> None:
    memory = FailingMemory(**{call: number})
    tier = make(memory=memory)
    tier.start()
    assert not tier.describe().up
    assert os.strerror(number) in tier.describe().reason
    with pytest.raises(OSError, match=os.strerror(number)):
        tier.open_slab(0)
    memory.errors.clear()
    tier.open_slab(0)
    assert tier.describe().up


def test_descriptor_shortage_in_the_background_ends_populating_not_the_tier(make: MakeTier) -> None:
    memory = FailingMemory()
    memory.hold.clear()
    tier = make(memory=memory, populate_threads=1)
    tier.start()
    wait_until(lambda: memory.calls["populate"] == 1)
    memory.errors["create"] = errno.EMFILE
    memory.hold.set()
    wait_until(lambda: bool(tier.describe().warnings))
    assert "populating stopped: " in tier.describe().warnings[0]
    assert tier.describe().up
    tier.open_slab(0)  # the one in stock


def test_memory_shortage_while_populating_gives_back_what_was_taken(make: MakeTier) -> None:
    tier = make(memory=FailingMemory(populate=errno.ENOMEM))
    tier.start()
    wait_until(lambda: bool(tier.describe().warnings) and not memfds())
    assert "Cannot allocate memory" in tier.describe().warnings[0]
    tier.open_slab(0)
    assert tier.describe().up


def test_hugetlb_pool_that_ran_dry_is_replaced_by_the_next_page_kind(make: MakeTier) -> None:
    memory = FailingMemory(create_hugetlb=errno.ENOMEM)
    tier = make(memory=memory, machine=FakeMachine(hugetlb=SLABS * SLAB), populate=False)
    assert tier.describe().pages == "hugetlb"
    tier.open_slab(0)
    info = tier.describe()
    assert (info.pages, info.slabs_by_pages) == ("4k", (("4k", 1),))
    assert "run dry" in info.warnings[0]


def test_page_kinds_are_counted(make: MakeTier) -> None:
    tier = make(memory=FailingMemory(), machine=FakeMachine(hugetlb=SLABS * SLAB), populate=False)
    tier.open_slab(0)
    tier.open_slab(1)
    assert tier.describe().slabs_by_pages == (("hugetlb", 2),)


def test_failed_punch_is_warned_about(make: MakeTier) -> None:
    tier = make(memory=FailingMemory(punch=errno.EPERM), populate=False)
    tier.open_slab(0)
    tier.close_slab(0)
    assert "unmapped" in tier.describe().warnings[0]
    tier.open_slab(0)


# --- locking ---


def test_slabs_are_locked_up_to_the_limit(make: MakeTier) -> None:
    tier = make(memory=FailingMemory(), machine=FakeMachine(swap=1, lock_limit=3 * SLAB + 1))
    tier.start()
    wait_until(lambda: tier.describe().populated_bytes == SLABS * SLAB)
    assert tier.describe().locked_bytes == 3 * SLAB
    assert "RLIMIT_MEMLOCK" in tier.describe().warnings[0]


def test_lock_given_back_by_a_closed_slab_goes_to_the_next(make: MakeTier) -> None:
    tier = make(memory=FailingMemory(), lock="on")
    tier.start()
    wait_until(lambda: tier.describe().locked_bytes == SLABS * SLAB)
    tier.open_slab(0)
    tier.close_slab(0)
    wait_until(lambda: tier.describe().locked_bytes == SLABS * SLAB)


def test_failed_lock_populates_without(make: MakeTier) -> None:
    tier = make(memory=FailingMemory(lock=errno.EAGAIN), lock="on")
    tier.start()
    wait_until(lambda: tier.describe().populated_bytes == SLABS * SLAB)
    assert tier.describe().locked_bytes == 0
    assert "not locked" in tier.describe().warnings[0]


def test_lock_without_populate_is_warned_about(make: MakeTier) -> None:
    assert "not locked" in make(lock="on", populate=False).describe().warnings[0]


# --- the end ---


def test_close_stops_between_two_pieces(make: MakeTier) -> None:
    memory = FailingMemory()
    memory.hold.clear()
    tier = HostTier(4 * PIECE_BYTES, 4 * PIECE_BYTES, populate_threads=1, machine=FakeMachine(), memory=memory)
    tier.start()
    wait_until(lambda: memory.calls["populate"] == 1)
    closing = threading.Thread(target=tier.close, args=(20.0,))
    closing.start()
    wait_until(lambda: not tier.describe().up)
    memory.hold.set()
    closing.join(20)
    assert memory.calls["populate"] == 1
    assert not memfds()


def test_close_does_not_wait_beyond_its_deadline_for_a_stuck_thread(make: MakeTier) -> None:
    memory = FailingMemory()
    memory.hold.clear()
    tier = make(memory=memory)
    tier.start()
    wait_until(lambda: memory.calls["populate"] >= 1)
    began_s = time.monotonic()
    tier.close(0.05)
    assert time.monotonic() - began_s < 5
    memory.hold.set()
    tier.close(10.0)
    assert not memfds()


def test_close_leaves_its_bytes_to_a_client_in_the_middle_of_a_copy(make: MakeTier) -> None:
    tier = make()
    tier.start()
    tier.open_slab(0)
    tier.view(0)[:4] = b"kept"
    client = os.dup(tier.slab_fd(0))
    tier.close(10.0)
    assert os.pread(client, 4, 0) == b"kept"
    os.close(client)


def test_closed_tier_holds_no_descriptor_and_no_thread(make: MakeTier) -> None:
    tier = make()
    tier.start()
    tier.open_slab(0)
    tier.close(10.0)
    assert not memfds()
    assert not populating_threads()
