"""The committer: what is durable when, what a failed batch costs, and that nothing newer is ever replaced."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from tests.tiers.nvme_rig import OWNER, Rig, filled, name

from forebay.tiers.nvme_format import DriveHeader, encode_record, slot_key
from forebay.tiers.nvme_index import Batch, Index, quarantine_index
from forebay.tiers.nvme_jobs import IoStatus, SlabOwner
from forebay.tiers.nvme_walk import walk_index

OK = IoStatus.OK
EIO = OSError(errno.EIO, "Input/output error")
HEADER = DriveHeader(bytes(16), 1 << 20, 8, 1)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = filled(tmp_path / "drive", 10)
    yield made
    made.close()


def record(slab: int, slot: int, generation: int) -> tuple[bytes, bytes]:
    key = slot_key(slab, slot)
    return key, encode_record(key, name(slot), b"", 0, generation, 0)


def committed(path: Path, *batches: Batch) -> tuple[int, int]:
    """(blocks, stale records) of an index that has seen these batches."""
    index = Index(path, HEADER)
    for batch in batches:
        index.apply(batch, whole=True)
    index.close()
    walked = walk_index(path, HEADER)
    return walked.records, walked.stale


def index_of(rig: Rig) -> Index:
    index = rig.tier._units[0].committer._index
    assert index is not None
    return index


def fail_once(index: Index, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make the next transaction raise."""
    apply = index.apply

    def failing(*arguments: Any, **named: Any) -> None:
        monkeypatch.undo()
        assert index.apply == apply
        raise error

    monkeypatch.setattr(index, "apply", failing)


# --- batches ---


def say(batch: Batch, *records: tuple[bytes, bytes]) -> None:
    for each in records:
        batch.say(*each)


def test_last_word_in_a_batch_counts(tmp_path: Path) -> None:
    batch = Batch()
    batch.set_slab(0, (OWNER, 1))
    say(batch, record(0, 1, 5), record(0, 2, 5), record(0, 3, 5))
    batch.forget([(0, 1)])
    say(batch, record(0, 1, 6))
    batch.forget([(0, 2)])
    assert committed(tmp_path / "index", batch) == (2, 0)


def test_slab_that_changes_hands_loses_its_blocks_in_and_before_the_batch(tmp_path: Path) -> None:
    first, second = Batch(), Batch()
    first.set_slab(0, (OWNER, 1))
    first.set_slab(1, (OWNER, 1))
    say(first, record(0, 1, 5), record(1, 1, 5))
    say(second, record(0, 2, 5))
    second.set_slab(0, (OWNER, 9))
    say(second, record(0, 3, 9))
    assert committed(tmp_path / "index", first, second) == (2, 0)


def test_leftover_of_an_earlier_owner_is_passed_over(tmp_path: Path) -> None:
    batch = Batch()
    batch.set_slab(0, (OWNER, 9))
    say(batch, record(0, 1, 8), record(0, 2, 9), record(3, 1, 9), record(0, 100_000, 9))
    assert committed(tmp_path / "index", batch) == (1, 3)


def test_adopted_block_never_replaces_a_newer_one(tmp_path: Path) -> None:
    first, second = Batch(), Batch()
    first.adopt_slabs([(0, OWNER, 1)])
    say(first, record(0, 1, 9))
    second.adopt_blocks([record(0, 1, 5), record(0, 2, 5)])
    assert committed(tmp_path / "index", first, second) == (2, 0)
    walked = walk_index(tmp_path / "index", HEADER)
    ((_, values),) = walked.buckets.values()
    assert record(0, 1, 9)[1] in bytes(values)


def test_adopted_block_that_is_forgotten_is_gone(tmp_path: Path) -> None:
    batch = Batch()
    batch.adopt_slabs([(0, OWNER, 1)])
    batch.adopt_blocks([record(0, 1, 5), record(0, 2, 5)])
    batch.forget([(0, 1)])
    assert committed(tmp_path / "index", batch) == (1, 0)


def test_two_quarantined_indexes_are_kept(tmp_path: Path) -> None:
    for _ in range(4):
        (tmp_path / "index").mkdir()
        quarantine_index(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.bad-3", "index.bad-4"]


# --- the committer ---


def test_failed_sync_loses_the_batch_and_what_was_written_beside_it(rig: Rig) -> None:
    """After a failed fdatasync the kernel may have dropped any page that was not on the medium."""
    rig.files.gate.clear()
    early, late = rig.write_job([20]), rig.write_job([22])
    rig.tier.write(late)
    rig.files.waiting.acquire(timeout=30)
    rig.files.syncs = [EIO]
    rig.assign(1)
    rig.tier.flush()
    rig.until(lambda: not rig.files.syncs)
    rig.files.gate.set()
    assert rig.wait(late) == [IoStatus.IO_ERROR]
    rig.tier.write(early)
    assert rig.wait(early) == [OK]
    assert rig.errors() == {}


def test_failed_sync_of_the_data_file_is_a_cause_of_its_own(rig: Rig) -> None:
    """The drive is what failed, and not the index."""
    rig.files.syncs = [EIO]
    assert rig.write([20, 21]) == [IoStatus.IO_ERROR] * 2
    assert rig.errors() == {"sync_io_error": 2}
    rig.files.syncs = [OSError(errno.ENOSPC, "No space left on device")]
    assert rig.write([20]) == [IoStatus.NO_SPACE]
    assert rig.errors() == {"sync_io_error": 2, "sync_no_space": 1}
    assert rig.write([20]) == [OK]


def test_slab_whose_assignment_failed_is_assigned_by_the_next_batch(rig: Rig, tmp_path: Path) -> None:
    rig.files.syncs = [EIO]
    rig.assign(1)
    assert rig.write([0], slab=1) in ([OK], [IoStatus.IO_ERROR])  # with the assignment, or already after it
    assert rig.write([1], slab=1) == [OK]
    rig.close()
    again = Rig(tmp_path / "drive")
    again.restore()
    assert [slab for slab, _, _ in again.slabs or ()] == [0, 1]
    assert (1, 1) in {block[:2] for block in again.blocks}
    again.close()


@pytest.mark.parametrize(
    ("error", "free_bytes", "status"),
    [
        (lmdb.Error("Input/output error"), 0, IoStatus.NO_SPACE),
        (lmdb.Error("Input/output error"), 1 << 40, IoStatus.IO_ERROR),
        (lmdb.MapFullError("full"), 1 << 40, IoStatus.NO_SPACE),
    ],
)
def test_failed_transaction_loses_its_blocks_and_the_tier_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: lmdb.Error, free_bytes: int, status: IoStatus
) -> None:
    """LMDB calls a full disk an input/output error."""
    rig.files.free_bytes = free_bytes
    fail_once(index_of(rig), monkeypatch, error)
    assert rig.write([20, 21]) == [status] * 2
    assert rig.errors() == {f"index_{status.name.lower()}": 2}
    assert rig.write([20, 21]) == [OK] * 2
    assert rig.tier.detail().drives[0].index_reason == ""


def test_environment_that_lmdb_gives_up_is_opened_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a meta page that could not be written: nothing works any more in that environment."""

    def refusing(batch: Batch, *, whole: bool) -> None:
        raise lmdb.PanicError("Update of meta page failed or environment had fatal error")

    monkeypatch.setattr(index_of(rig), "apply", refusing)
    assert rig.write([20]) == [IoStatus.IO_ERROR]
    assert rig.write([20]) == [OK]


def test_unforeseen_error_loses_the_batch_and_not_the_thread(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(index_of(rig), monkeypatch, ValueError("a bug"))
    assert rig.write([20]) == [IoStatus.IO_ERROR]
    assert rig.write([20]) == [OK]


def test_a_thousand_slabs_of_a_namespace_are_given_up_without_a_look_at_all_their_records() -> None:
    """What a slab costs does not grow with the number of records of the others."""

    class Counted(dict[bytes, dict[bytes, bytes | None]]):
        def __iter__(self) -> Iterator[bytes]:
            raise AssertionError("all records were looked at")

        items = values = keys = __iter__  # type: ignore[assignment]

    batch = Batch()
    batch.forget((slab, slot) for slab in range(1000) for slot in range(10))
    batch.records = Counted(batch.records)
    for slab in range(1000):
        batch.set_slab(slab, None)
    assert not batch.records


def test_deletion_in_a_failed_transaction_is_done_by_the_next(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fail_once(index_of(rig), monkeypatch, lmdb.Error("Input/output error"))
    rig.tier.forget([(0, 3)])
    rig.tier.flush()
    rig.until(lambda: rig.tier.detail().drives[0].index == "failing")
    assert rig.write([20]) == [OK]
    rig.close()
    again = Rig(tmp_path / "drive")
    again.restore()
    assert again.numbers() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 20]
    again.close()


def test_index_that_cannot_be_opened_costs_writes_only_until_it_can(tmp_path: Path) -> None:
    blocked = tmp_path / "drive" / "index"
    blocked.parent.mkdir(mode=0o700)
    blocked.touch()
    rig = Rig(tmp_path / "drive")
    rig.restore()
    rig.assign()
    assert rig.write([1]) == [IoStatus.IO_ERROR]
    blocked.unlink()
    assert rig.write([2]) == [OK]
    rig.close()
    again = Rig(tmp_path / "drive")
    assert again.restore().rebuilt  # the first batch, which made the index whole, was lost
    assert 2 in again.numbers()
    again.close()


def test_what_is_written_waits_for_no_company_but_for_the_drive_to_rest(tmp_path: Path) -> None:
    """What is not committed holds memory that the next writes need."""
    rig = filled(tmp_path / "drive", 1, index_batch_s=0.05)
    committer = rig.tier._units[0].committer
    with committer._changed:
        committer._health.calls_left += 1  # company on its way, for ever
    try:
        assert rig.write([1]) == [OK]
    finally:
        committer._health.calls_left -= 1
    rig.close()


def test_flush_ends_the_wait_for_company(tmp_path: Path) -> None:
    rig = filled(tmp_path / "drive", 1, index_batch_s=1000.0)
    rig.tier._units[0].committer._hurry = False  # a flush that came after its batch is meant for the next
    job = rig.write_job([1])
    rig.tier.write(job)
    rig.until(lambda: rig.tier.detail().written_blocks == 2)
    assert job.job_id not in rig.done
    rig.tier.flush()
    assert rig.wait(job) == [OK]
    rig.close()


def test_many_owners_come_back_each_as_he_was(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "drive")
    rig.restore()
    owners = [SlabOwner(uid, bytes([uid]) * 32, 0, 1, 4000, 4096, 16 + uid, 16, f"model {uid}") for uid in range(5)]
    for slab, owner in enumerate(owners):
        rig.assign(slab, owner, 100 + slab)
    rig.close()
    again = Rig(tmp_path / "drive")
    again.restore()
    assert again.slabs == [(slab, owner, 100 + slab) for slab, owner in enumerate(owners)]
    again.close()
