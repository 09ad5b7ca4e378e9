"""The child that reads an index: frames in order of depth, exit status, and what it refuses."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
from tests.tiers.nvme_rig import OWNER, name

from forebay.kvstore.errors import Corrupt
from forebay.tiers.nvme_format import LAST_FILE, DriveHeader, encode_last, encode_record, slot_key, slot_place
from forebay.tiers.nvme_index import Batch, Index
from forebay.tiers.nvme_jobs import SlabOwner
from forebay.tiers.nvme_walk import (
    BLOCKS,
    END,
    FRAME,
    FRAME_BLOCKS_MAX,
    PROBLEM,
    SLABS,
    frames,
    main,
    walk_index,
)
from support.lmdb_pages import MAIN_ROOT_AT, PAGE, TXNID_AT, entries_of, newest_meta, sub_databases
from support.nvme_file import write_at

HEADER = DriveHeader(bytes(16), 64 << 20, 4, 1)


def fill(path: Path, depths: list[int], slab: int = 0, owner: SlabOwner = OWNER) -> Index:
    """One block a slot, of the given depths, with hashes as long as the owner's."""
    index = Index(path, HEADER)
    batch = Batch()
    batch.set_slab(slab, (owner, 1))
    for slot, depth in enumerate(depths):
        key, width = slot_key(slab, slot), owner.hash_bytes
        parent = name(slot)[:width] if depth else b""
        batch.say(key, encode_record(key, name(slot)[:width], parent, depth, 1, 0))
    index.apply(batch, whole=True)
    return index


def kinds(path: Path) -> list[tuple[int, int, int, int]]:
    found = []
    for frame in frames(walk_index(path, HEADER)):
        kind, hash_len, parent_len, count, length = FRAME.unpack_from(frame)
        assert len(frame) == FRAME.size + length
        found.append((kind, hash_len, parent_len, count))
    return found


def test_empty_index_is_sound(tmp_path: Path) -> None:
    fill(tmp_path / "index", []).close()
    assert kinds(tmp_path / "index") == [(SLABS, 0, 0, 1), (END, 0, 0, 0)]


def test_frames_ascend_in_depth_and_share_what_has_one_shape(tmp_path: Path) -> None:
    fill(tmp_path / "index", [2, 0, 1, 0, 3]).close()
    assert kinds(tmp_path / "index")[1:-1] == [(BLOCKS, 32, 0, 2), (BLOCKS, 32, 32, 3)]


def test_chains_in_a_row_are_told_so_and_the_rest_by_depth(tmp_path: Path) -> None:
    """Slots: a chain of three but for its second block, another chain of three, then that second block and two more."""
    chains = {each: [name(3 * at + depth) for depth in range(3)] for at, each in enumerate("abc")}
    placed = [("a", 0), ("a", 2), ("b", 0), ("b", 1), ("b", 2), ("a", 1), ("c", 2), ("c", 1), ("c", 0)]
    index = Index(tmp_path / "index", HEADER)
    batch = Batch()
    batch.set_slab(0, (OWNER, 1))
    for slot, (chain, depth) in enumerate(placed):
        key, parent = slot_key(0, slot), chains[chain][depth - 1] if depth else b""
        batch.say(key, encode_record(key, chains[chain][depth], parent, depth, 1, 0))
    index.apply(batch, whole=True)
    index.close()
    told = []
    for frame in frames(walk_index(tmp_path / "index", HEADER)):
        kind, _, _, count, _ = FRAME.unpack_from(frame)
        if kind == BLOCKS:
            told += [placed[slot_place(frame[FRAME.size + 8 * at :][:8])[1]] for at in range(count)]
    assert told == [
        *[("a", 0), ("b", 0), ("c", 0)],
        *[("b", 1), ("b", 2), ("a", 1), ("c", 1)],
        *[("a", 2), ("c", 2)],
    ]


def test_frames_are_bounded(tmp_path: Path) -> None:
    count = 2 * FRAME_BLOCKS_MAX + 10
    fill(tmp_path / "index", [1] * count).close()
    assert [frame[3] for frame in kinds(tmp_path / "index")[1:-1]] == [FRAME_BLOCKS_MAX, FRAME_BLOCKS_MAX, 10]


def test_hashes_of_other_lengths_have_frames_of_their_own(tmp_path: Path) -> None:
    short = SlabOwner(1, bytes(32), 0, 1, 8000, 8192, 16, 16, "short")
    fill(tmp_path / "index", [0, 1, 2]).close()
    fill(tmp_path / "index", [0, 1], slab=1, owner=short).close()
    assert [frame[:3] for frame in kinds(tmp_path / "index")[1:-1]] == [
        (BLOCKS, 16, 0),
        (BLOCKS, 16, 16),
        (BLOCKS, 32, 0),
        (BLOCKS, 32, 32),
    ]


def test_index_that_was_never_completed_is_refused(tmp_path: Path) -> None:
    index = Index(tmp_path / "index", HEADER)
    index.apply(Batch(), whole=False)
    index.close()
    with pytest.raises(Corrupt, match="does not say"):
        walk_index(tmp_path / "index", HEADER)


def test_index_of_another_drive_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "index", [0]).close()
    with pytest.raises(Corrupt, match="of another drive"):
        walk_index(tmp_path / "index", DriveHeader(bytes(range(16)), 64 << 20, 4, 1))


def test_damaged_record_is_refused(tmp_path: Path) -> None:
    index = fill(tmp_path / "index", [0, 1])
    with index._env.begin(write=True) as txn:
        value = bytearray(bytes(txn.get(slot_key(0, 1), db=index._slots) or b""))
        value[30] ^= 1
        txn.put(slot_key(0, 1), bytes(value), db=index._slots)
    index.close()
    with pytest.raises(Corrupt, match="record is damaged"):
        walk_index(tmp_path / "index", HEADER)


def test_slab_beyond_the_drive_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "index", [0], slab=4).close()
    with pytest.raises(Corrupt, match="beyond the drive"):
        walk_index(tmp_path / "index", HEADER)


def arguments(path: Path) -> list[str]:
    return [str(path / "index"), str(path / "copy"), HEADER.drive_id.hex(), str(HEADER.slab_bytes), str(HEADER.slabs)]


def test_child_leaves_a_copy_that_holds_the_same(tmp_path: Path) -> None:
    fill(tmp_path / "index", [0, 1, 2]).close()
    output = io.BytesIO()
    assert main(arguments(tmp_path), output) == 0
    assert output.getvalue().endswith(FRAME.pack(END, 0, 0, 0, 0))
    assert walk_index(tmp_path / "copy", HEADER).records == 3


def test_child_tells_what_is_wrong_and_fails(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "data.mdb").write_bytes(b"no index" * 1000)
    output = io.BytesIO()
    assert main(arguments(tmp_path), output) == 1
    kind, _, _, _, length = FRAME.unpack_from(output.getvalue())
    assert kind == PROBLEM
    assert output.getvalue()[FRAME.size :][:length].startswith(b"InvalidError")


def test_walk_of_nothing_is_an_error_of_lmdb(tmp_path: Path) -> None:
    with pytest.raises(lmdb.Error):
        walk_index(tmp_path / "index", HEADER)


def test_child_loads_neither_sockets_nor_the_tier() -> None:
    """It starts in tens of milliseconds, and cannot hurt what it does not have."""
    code = (
        "import sys, forebay.tiers.nvme_walk\n"
        "loaded = {'zmq', 'msgpack', 'psutil', 'forebay.tiers.nvme', 'forebay.transports'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- flipped bits that LMDB does not notice ---


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two transactions after the one that made it; the last changes records and leaves their number."""
    path = tmp_path_factory.mktemp("twice")
    index = fill(path / "index", [0] * 9)
    for generation in (2, 3):
        batch = Batch()
        for slot in range(5):
            key = slot_key(0, slot)
            batch.say(key, encode_record(key, name(slot), b"", 0, generation, 0))
        index.apply(batch, whole=False)
    index.close()
    return path


def changed(source: Path, target: Path, at: int, content: bytes) -> list[str]:
    """The arguments for a copy of the index whose file has these bytes there."""
    shutil.copytree(source / "index", target / "index")
    write_at(target / "index" / "data.mdb", at, content)
    return arguments(target)


def refusal(args: list[str]) -> str:
    """What the child says of an index that it refuses."""
    output = io.BytesIO()
    assert main(args, output) == 1
    kind, _, _, _, length = FRAME.unpack_from(output.getvalue())
    assert kind == PROBLEM
    return output.getvalue()[FRAME.size :][:length].decode()


@pytest.mark.parametrize("bit", range(3, 64))
def test_earlier_tree_that_a_flipped_bit_makes_the_newest_is_refused(twice: Path, tmp_path: Path, bit: int) -> None:
    """It is whole and consistent, and lacks the blocks of the last transaction, which were reported durable."""
    data = (twice / "index" / "data.mdb").read_bytes()
    at = (1 - newest_meta(data)) * PAGE + TXNID_AT
    number = int.from_bytes(data[at : at + 8], "little") ^ 1 << bit
    said = refusal(changed(twice, tmp_path, at, number.to_bytes(8, "little")))
    assert said == "Corrupt: the index is of transaction 2, the last was 3"


def test_earlier_tree_under_the_newest_number_is_refused(twice: Path, tmp_path: Path) -> None:
    data = (twice / "index" / "data.mdb").read_bytes()
    newest = newest_meta(data)
    at, older = newest * PAGE + MAIN_ROOT_AT, (1 - newest) * PAGE + MAIN_ROOT_AT
    assert "of transaction 2, the last was 3" in refusal(changed(twice, tmp_path, at, data[older : older + 8]))


def test_earlier_records_of_the_same_number_are_refused(twice: Path, tmp_path: Path) -> None:
    """Only the sum tells them apart: every record is sound, the keys are right, and as many as they should be."""
    data = (twice / "index" / "data.mdb").read_bytes()
    newest = newest_meta(data)
    now, before = (sub_databases(data, meta)[b"slots"] for meta in (newest, 1 - newest))
    older = data[before.start : before.start + before.length]
    assert entries_of(data, now) == entries_of(data, before)
    assert older != data[now.start : now.start + now.length]
    said = refusal(changed(twice, tmp_path, now.start, older))
    assert said == "Corrupt: records of the index are missing, or older than its last transaction"


def test_index_without_the_number_of_its_last_transaction_is_refused(twice: Path, tmp_path: Path) -> None:
    args = changed(twice, tmp_path, 0, b"")
    (tmp_path / "index" / LAST_FILE).unlink()
    assert "missing or damaged" in refusal(args)


def test_index_that_is_ahead_of_its_number_is_sound(twice: Path, tmp_path: Path) -> None:
    """Killed between the commit and the note of it."""
    args = changed(twice, tmp_path, 0, b"")
    (tmp_path / "index" / LAST_FILE).write_bytes(encode_last(2))
    assert main(args, io.BytesIO()) == 0
