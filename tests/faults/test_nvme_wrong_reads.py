"""A drive that gives back other bytes than were written: every one of them is a miss, counted by its cause.

The daemon is stopped, its data file edited, and the daemon started again, which is all that a bad drive can do to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from support.ledger import Ledger, Verdict
from support.nvme_file import FoundSlot, find_slots, flip_bit, read_at, swap, write_at
from support.nvme_flips import LEAST_SHARE, FlipLoop, served_in_all
from support.nvme_live import BLOCK_BYTES, BLOCKS, SPEC, Engine, NvmeDaemon, chain

FLIPS = 10


@dataclass(frozen=True)
class Damage:
    """An edit of some of a chain's slots; which of them are bad then, and how they are counted."""

    edit: Callable[[Path, list[FoundSlot]], None]
    bad: tuple[int, ...]
    cause: str
    counter: str


def _flip_payload(path: Path, slots: list[FoundSlot]) -> None:
    flip_bit(path, 8 * (slots[3].payload_offset + BLOCK_BYTES - 1) + 7)


def _flip_header(path: Path, slots: list[FoundSlot]) -> None:
    flip_bit(path, 8 * (slots[4].offset + 60))


def _wipe_header(path: Path, slots: list[FoundSlot]) -> None:
    write_at(path, slots[1].offset, bytes(4096))


def _swap_payloads(path: Path, slots: list[FoundSlot]) -> None:
    swap(path, slots[2].payload_offset, slots[5].payload_offset, BLOCK_BYTES)


def _swap_slots(path: Path, slots: list[FoundSlot]) -> None:
    swap(path, slots[0].offset, slots[7].offset, slots[0].stride)


def _copy_slot(path: Path, slots: list[FoundSlot]) -> None:
    write_at(path, slots[6].offset, read_at(path, slots[5].offset, slots[5].stride))


def _tear_payload(path: Path, slots: list[FoundSlot]) -> None:
    write_at(path, slots[7].payload_offset + 8192, bytes(BLOCK_BYTES - 8192))


DAMAGES = {
    "payload bit": Damage(_flip_payload, (3,), "load_bad_payload", "corrupt_blocks"),
    "header bit": Damage(_flip_header, (4,), "load_bad_header", "corrupt_blocks"),
    "header wiped": Damage(_wipe_header, (1,), "load_bad_header", "corrupt_blocks"),
    "payloads swapped": Damage(_swap_payloads, (2, 5), "load_bad_payload", "corrupt_blocks"),
    "slots swapped": Damage(_swap_slots, (0, 7), "load_other_block", "stale_blocks"),
    "slot misdirected": Damage(_copy_slot, (6,), "load_other_block", "stale_blocks"),
    "payload torn": Damage(_tear_payload, (7,), "load_bad_payload", "corrupt_blocks"),
}
NUMBERS = {name: number for number, name in enumerate(DAMAGES, 1)}
SOUND, OTHER_DTYPE = 100, 101


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return Ledger(7)


@pytest.fixture(scope="module")
def daemon(ledger: Ledger) -> Iterator[NvmeDaemon]:
    """Restarted after its file was damaged; the chains' blocks are on the drive only, but for the damaged ones."""
    with NvmeDaemon() as running:
        with Engine(running, ledger) as engine:
            engine.store_durably([*NUMBERS.values(), SOUND, OTHER_DTYPE])
        running.kill()
        [path] = running.data_files
        slots = find_slots(path)
        for name, damage in DAMAGES.items():
            damage.edit(path, [slots[block] for block in chain(NUMBERS[name])])
        running.start()
        running.restored()
        yield running


def _counted(daemon: NvmeDaemon, damage: Damage) -> tuple[int, int]:
    return daemon.errors().get(damage.cause, 0), daemon.store()["counters"][damage.counter]


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_block_is_a_miss_and_the_blocks_before_it_are_right(
    daemon: NvmeDaemon, ledger: Ledger, name: str
) -> None:
    number, damage = NUMBERS[name], DAMAGES[name]
    first, bad = damage.bad[0], len(damage.bad)
    errors, counted = _counted(daemon, damage)
    with Engine(daemon, ledger) as engine:
        assert engine.client.lookup(engine.ns, chain(number)).blocks == BLOCKS
        found = engine.fetch(number)
        assert (found.served, found.wrong) == (first, 0)
        assert _counted(daemon, damage) == (errors + bad, counted + bad)
        assert engine.client.lookup(engine.ns, chain(number)).blocks == first
        assert engine.store(number).committed == bad, "what is sound was not kept"
        assert engine.fetch(number) == Verdict(BLOCKS, 0, 0)
    assert daemon.problems() == ()


def test_sound_chain_beside_the_damage_is_whole(daemon: NvmeDaemon, ledger: Ledger) -> None:
    with Engine(daemon, ledger) as engine:
        assert engine.fetch(SOUND) == Verdict(BLOCKS, 0, 0)


def test_same_hashes_under_another_dtype_are_misses(daemon: NvmeDaemon) -> None:
    with Engine(daemon, Ledger(7)) as engine:
        other = engine.client.open_namespace(replace(SPEC, dtype="int8"))
        memory = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
        assert engine.client.lookup(other, chain(OTHER_DTYPE)).blocks == 0
        assert engine.client.fetch(other, chain(OTHER_DTYPE), memory).blocks == 0
        assert not memory.any()


def _replace(engine: Engine) -> None:
    """Remove chain 1, and store it with this engine's bytes; both known to the index on disk."""
    assert engine.client.evict(engine.ns, chain(1)).removed in (0, BLOCKS)
    engine.store_durably([1])


@pytest.mark.parametrize("restarted", [False, True], ids=["same life", "earlier life"])
def test_slot_that_shows_an_older_image_is_a_miss(restarted: bool) -> None:
    """The image is whole, of the same block and the same place: its generation gives it away."""
    replayed = 4
    old, new = Ledger(1), Ledger(2)
    with NvmeDaemon() as daemon:
        [path] = daemon.data_files
        with Engine(daemon, old) as engine:
            _replace(engine)
            _replace(engine)
            before = find_slots(path)[chain(1)[replayed]]
            image = read_at(path, before.offset, before.stride)
            if restarted:
                assert engine.client.evict(engine.ns, chain(1)).removed == BLOCKS
        if restarted:
            assert daemon.stop() == 0
            daemon.start()
            daemon.restored()
        with Engine(daemon, new) as engine:
            _replace(engine)
        daemon.kill()
        assert find_slots(path)[chain(1)[replayed]].offset == before.offset, "it lies elsewhere: nothing to replay"
        write_at(path, before.offset, image)
        daemon.start()
        daemon.restored()
        with Engine(daemon, new) as engine:
            found = engine.fetch(1)
            assert (found.served, found.wrong) == (replayed, 0)
        assert daemon.store()["counters"]["stale_blocks"] == 1
        assert daemon.errors() == {"load_other_block": 1}


def test_flipped_bits_of_the_index_lose_nothing_and_kill_nobody() -> None:
    result = FlipLoop(seed=1).run(FLIPS)
    print(f"flips {dict(result.flips)}, indexes made anew {dict(result.rebuilds)}, {result.verdict}")
    assert result.problems == []
    assert result.flips.total() >= FLIPS
    assert result.share >= LEAST_SHARE
    assert result.verdict.wrong == result.verdict.missing == 0
    assert result.verdict.served == served_in_all(FLIPS)


def test_index_that_is_gone_is_made_anew_and_blocks_are_served_meanwhile() -> None:
    ledger = Ledger(3)
    with NvmeDaemon() as daemon:
        with Engine(daemon, ledger) as engine:
            engine.store_durably(range(20))
        daemon.kill()
        (daemon.paths[0] / "index" / "data.mdb").unlink()
        daemon.start()
        with Engine(daemon, ledger) as engine:
            assert engine.store(50).committed == BLOCKS, "stores wait for the index"
            assert engine.fetch(50) == Verdict(BLOCKS, 0, 0)
            daemon.restored()
            assert engine.fetch_all(range(20)) == Verdict(20 * BLOCKS, 0, 0)
            engine.store_durably([50])
        assert daemon.status()["nvme"]["rebuilt"]
        assert "is missing" in daemon.log()
        daemon.restart()
        daemon.restored()
        assert not daemon.status()["nvme"]["rebuilt"], "the new index was not kept"
        with Engine(daemon, ledger) as engine:
            assert engine.fetch_all([*range(20), 50]) == Verdict(21 * BLOCKS, 0, 0)
        assert daemon.problems() == ()
