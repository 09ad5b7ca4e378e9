"""What the store decides about slabs becomes memory, generations and notices, or is taken back."""

from __future__ import annotations

import errno
import itertools
import mmap
from dataclasses import dataclass, field

import pytest

from forebay.daemon.live_slabs import CarriedOut, LiveSlabs
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Scope
from forebay.kvstore.store import Store, StoreConfig
from forebay.transports.shm import GenerationView, create_memfd

SLAB_BYTES = 4 * 4096
SPEC = NamespaceSpec("m", "r", "uint8", 16, (4096,))
HASHES = [bytes([number]) * 32 for number in range(1, 13)]


@dataclass
class FakeTier:
    """Memfds by physical slab; opening fails while `broken`."""

    broken: bool = False
    fds: dict[int, int] = field(default_factory=dict)

    def open_slab(self, slab: int) -> None:
        if self.broken:
            raise OSError(errno.ENOMEM, "out of memory")
        assert slab not in self.fds
        self.fds[slab] = create_memfd("test", SLAB_BYTES)

    def close_slab(self, slab: int) -> None:
        del self.fds[slab]

    def slab_fd(self, slab: int) -> int:
        return self.fds[slab]

    def memory_number(self, slab: int) -> int:
        return 1000 + self.fds[slab]


@pytest.fixture
def tier() -> FakeTier:
    return FakeTier()


@pytest.fixture
def store() -> Store:
    counter = itertools.count(1)
    made = Store(StoreConfig(3 * SLAB_BYTES, SLAB_BYTES), lambda: next(counter))
    made.open_session(1, 0)
    return made


def _carry_out(slabs: LiveSlabs, store: Store) -> CarriedOut:
    return slabs.carry_out(store.drain_effects())


def _generations(slabs: LiveSlabs, ns: int, slab: int) -> list[int]:
    view = GenerationView(slabs.handles(ns, slab)[1], SLAB_BYTES // 4096)
    return [view.get(slot) for slot in range(SLAB_BYTES // 4096)]


def test_opened_slab_has_memory_and_the_generations_the_store_hands_out(store: Store, tier: FakeTier) -> None:
    slabs = LiveSlabs(tier)
    ns = store.open_namespace(1, SPEC).ns
    reserved = store.reserve(1, ns, b"", HASHES[:6], 0.0)
    _carry_out(slabs, store)
    assert sorted(tier.fds) == [0, 1]
    table = _generations(slabs, ns, 0) + _generations(slabs, ns, 1)
    assert [table[slot] for slot in reserved.slots] == list(reserved.generations)


def test_removed_block_has_a_new_generation_and_a_retired_slab_only_new_ones(store: Store, tier: FakeTier) -> None:
    """A reader that mapped the table before sees both."""
    slabs = LiveSlabs(tier)
    ns = store.open_namespace(1, SPEC).ns
    reserved = store.reserve(1, ns, b"", HASHES[:4], 0.0)
    _carry_out(slabs, store)
    store.commit(1, reserved.reservation_id, [], 0.0)
    reader = GenerationView(slabs.handles(ns, 0)[1], 4)
    store.evict(1, ns, Scope.BLOCKS, HASHES[3:4])
    _carry_out(slabs, store)
    moved = [
        reader.get(slot) != generation for slot, generation in zip(reserved.slots, reserved.generations, strict=True)
    ]
    assert moved == [False, False, False, True]
    store.evict(1, ns, Scope.NAMESPACE, [])
    done = _carry_out(slabs, store)
    assert [(event.ns, event.slab) for event in done.retired] == [(ns, 0)]
    assert all(
        reader.get(slot) != generation for slot, generation in zip(reserved.slots, reserved.generations, strict=True)
    )
    assert tier.fds == {}


def test_table_cannot_be_mapped_writable_by_who_receives_it(store: Store, tier: FakeTier) -> None:
    slabs = LiveSlabs(tier)
    ns = store.open_namespace(1, SPEC).ns
    store.reserve(1, ns, b"", HASHES[:1], 0.0)
    _carry_out(slabs, store)
    with pytest.raises(PermissionError):
        mmap.mmap(slabs.handles(ns, 0)[1], 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def test_slab_without_memory_is_reported_and_given_back(store: Store, tier: FakeTier) -> None:
    slabs = LiveSlabs(tier)
    ns = store.open_namespace(1, SPEC).ns
    tier.broken = True
    store.reserve(1, ns, b"", HASHES[:2], 0.0)
    done = _carry_out(slabs, store)
    assert [error.errno for _, error in done.failed] == [errno.ENOMEM]
    for opened, _ in done.failed:
        store.slab_failed(opened.ns, opened.slab)
    _carry_out(slabs, store)
    assert store.check() == []
    assert store.stats().tiers[0].slabs_assigned == 0
    tier.broken = False
    store.reserve(1, ns, b"", HASHES[:2], 0.0)
    assert _carry_out(slabs, store).failed == []
    assert len(tier.fds) == 1
