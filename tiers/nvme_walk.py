"""Reads a drive's index in a process of its own, so that a damaged one cannot take the daemon with it.

LMDB has no checksums of pages: one flipped bit may lose records without a word, loop, or abort the process. So this
child copies the index compactly, which leaves behind the free list and whatever else is not reached from the root,
walks the copy, checks every record's own checksum, the order of the keys, their number and their sum, and only then
says what is in it. A flipped bit may also lead to the tree of an earlier transaction, which is whole in itself: hence
the number of the last one in a file beside the index. The daemon opens the copy, and the original only where the disk
has no room for one.

    python -m forebay.tiers.nvme_walk INDEX COPY DRIVE_ID SLAB_BYTES SLABS

writes frames to standard output: SLABS once, BLOCKS with parents before their children, END; or PROBLEM at any point.
Exit status 0 goes with END alone. Whatever else happens is a broken index to the parent.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import lmdb

from forebay.kvstore.errors import Corrupt
from forebay.tiers.nvme_format import (
    LAST_FILE,
    META_KEY,
    RECORD_NAMES_AT,
    STATE_KEY,
    DriveHeader,
    check_last,
    check_meta,
    check_sum,
    decode_slab_record,
    decode_state,
    record_head,
    record_struct,
    record_sum,
    slots_per_slab,
)

FRAME = struct.Struct("<BBBxII")
"""Kind, hash length, parent length, number of records, length of the body."""
TOTALS = struct.Struct("<QQ")
"""Blocks to come and blocks passed over: what the body of SLABS begins with."""
SLABS, BLOCKS, END, PROBLEM = 1, 2, 3, 4
FRAME_BLOCKS_MAX = 1000
KEY_BYTES = 8
INDEX_FILE = "data.mdb"


@dataclass(slots=True)
class Walked:
    """A sound index. `buckets` has the keys and the values of all blocks, by their place in the order of telling
    and by the lengths of their hashes: 0 for roots, 1 for what follows its parent in the next slot, else the depth.

    Bytes in a row instead of an object a record: an index has millions.
    """

    slabs: list[tuple[bytes, bytes]] = field(default_factory=list)
    buckets: dict[tuple[int, int, int], tuple[bytearray, bytearray]] = field(default_factory=dict)
    records: int = 0
    stale: int = 0
    number: int = 0
    """Of the transaction that left the index so."""
    total: int = 0
    """The sum of all records, stale ones too."""


def walk_index(directory: Path, header: DriveHeader) -> Walked:
    """Read an index whole. Raises Corrupt, lmdb.Error; may also never return or abort the process."""
    env = lmdb.open(str(directory), readonly=True, lock=False, create=False, max_dbs=3, readahead=True)
    try:
        meta, slabs, slots = (env.open_db(name, create=False) for name in (b"meta", b"slabs", b"slots"))
        with env.begin() as txn:
            check_meta(txn.get(META_KEY, db=meta), header)
            walked = Walked()
            walked.number, expected = decode_state(txn.get(STATE_KEY, db=meta))
            _walk_slots(txn, slots, walked, _walk_slabs(txn, slabs, walked, header))
            check_sum(walked.total, expected)
            return walked
    finally:
        env.close()


_Room = dict[bytes, tuple[int, int, int]]
"""By a slab's key: first generation, number of slots, length of its hashes."""


def _walk_slabs(txn: lmdb.Transaction, database: Any, walked: Walked, header: DriveHeader) -> _Room:
    room: _Room = {}
    for key, value in _ordered(txn, database):
        slab, owner, generation = decode_slab_record(key, value)
        walked.total += record_sum(value)
        if slab >= header.slabs:
            raise Corrupt(f"slab {slab} is beyond the drive's {header.slabs}")
        room[key] = generation, slots_per_slab(header.slab_bytes, owner.slot_bytes), owner.hash_bytes
        walked.slabs.append((key, value))
    return room


def _walk_slots(txn: lmdb.Transaction, database: Any, walked: Walked, room: _Room) -> None:
    """Sort the blocks into buckets; what an earlier owner of a slab left behind is counted and passed over.

    A chain is mostly written into slots in a row. Told like that, in place of all chains depth by depth, its blocks
    are neighbours in the daemon's memory too.
    """
    buckets = walked.buckets
    slab, since, end, hash_bytes, total = b"", 0, b"", 0, 0
    last = b""  # hash of the block before, where that one is told among the first
    open_shape, keys, values = (-1, -1, -1), bytearray(), bytearray()
    for key, value in _ordered(txn, database):
        head = record_head(key, value)
        if head is None:
            raise Corrupt("a block's record is damaged")
        hash_len, parent_len, depth, generation, checksum = head
        total += checksum
        if key[:4] != slab:
            slab = key[:4]
            since, slots, hash_bytes = room.get(slab, (0, 0, 0))
            end = slab + slots.to_bytes(4, "big")
        if generation < since or key >= end or hash_len != hash_bytes:
            walked.stale += 1
            continue
        names = value[RECORD_NAMES_AT:-8]
        order = 1 if parent_len and names[hash_len:] == last else depth
        last = names[:hash_len] if order <= 1 else b""
        shape = order, hash_len, parent_len
        if shape != open_shape:
            open_shape = shape
            keys, values = buckets.setdefault(shape, (bytearray(), bytearray()))
        keys += key
        values += value
    walked.total += total
    walked.records = sum(len(keys) for keys, _ in buckets.values()) // KEY_BYTES


def _ordered(txn: lmdb.Transaction, database: Any) -> Iterator[tuple[bytes, bytes]]:
    """All records; Corrupt unless their keys ascend and they are as many as the tree's root says."""
    last, count = b"", 0
    cursor: Any = txn.cursor(database)
    for key, value in cursor:
        if key <= last:
            raise Corrupt("keys out of order")
        last = key
        count += 1
        yield key, value
    expected = int(txn.stat(database)["entries"])
    if count != expected:
        raise Corrupt(f"{count} records reached of {expected}")


def frames(walked: Walked) -> Iterator[bytes]:
    """What to tell, parents before children; neighbours in that order share a frame when of one shape."""
    slabs = TOTALS.pack(walked.records, walked.stale) + b"".join(key + value for key, value in walked.slabs)
    yield FRAME.pack(SLABS, 0, 0, len(walked.slabs), len(slabs)) + slabs
    for hash_len in sorted({shape[1] for shape in walked.buckets}):
        yield from _block_frames(walked, hash_len)
    yield FRAME.pack(END, 0, 0, 0, 0)


def _block_frames(walked: Walked, hash_len: int) -> Iterator[bytes]:
    """The frames of all namespaces with hashes of one length: none of them has a parent among the others."""
    keys, values, open_parent = bytearray(), bytearray(), -1
    for shape in sorted(shape for shape in walked.buckets if shape[1] == hash_len):
        more_keys, more_values = walked.buckets.pop(shape)
        if shape[2] != open_parent:
            yield from _cut(keys, values, hash_len, open_parent, 1)
            keys, values, open_parent = bytearray(), bytearray(), shape[2]
        if keys:
            keys += more_keys
            values += more_values
        else:
            keys, values = more_keys, more_values
        yield from _cut(keys, values, hash_len, open_parent, FRAME_BLOCKS_MAX)
    yield from _cut(keys, values, hash_len, open_parent, 1)


def _cut(keys: bytearray, values: bytearray, hash_len: int, parent_len: int, least: int) -> Iterator[bytes]:
    """Take frames of up to FRAME_BLOCKS_MAX off the front while at least `least` records are there."""
    count = len(keys) // KEY_BYTES
    width = len(values) // count if count else 0
    at = 0
    while count - at >= max(1, least):
        end = min(count, at + FRAME_BLOCKS_MAX)
        body = _body(keys[at * KEY_BYTES : end * KEY_BYTES], values[at * width : end * width], hash_len, parent_len)
        yield FRAME.pack(BLOCKS, hash_len, parent_len, end - at, len(body)) + body
        at = end
    del keys[: at * KEY_BYTES], values[: at * width]


def _body(keys: bytearray, values: bytearray, hash_len: int, parent_len: int) -> bytes:
    """What a frame of blocks holds: their keys, and each as the daemon takes it, which has less time than we."""
    places = struct.unpack(f">{len(keys) // 4}I", keys)
    depths, generations, hashes, parents = zip(*record_struct(hash_len, parent_len).iter_unpack(values))
    blocks = map(
        told_struct(hash_len, parent_len).pack, places[::2], places[1::2], hashes, parents, depths, generations
    )
    return bytes(keys) + b"".join(blocks)


def told_struct(hash_len: int, parent_len: int) -> struct.Struct:
    """A block in a frame, of one shape: slab, slot, hash, parent, depth, generation."""
    return struct.Struct(f"<II{hash_len}s{parent_len}sIQ")


def copy_index(source: Path, target: Path) -> None:
    """Make a compact copy, on the medium. Raises lmdb.Error, OSError; may abort the process."""
    target.mkdir(mode=0o700)
    env = lmdb.open(str(source), readonly=True, lock=False, create=False, max_dbs=3)
    try:
        env.copy(str(target), compact=True)
    finally:
        env.close()
    fd = os.open(target / INDEX_FILE, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_last(index: Path) -> bytes:
    """What the file beside the index says; read before the index, so that a commit meanwhile cannot pass for a loss."""
    try:
        return (index / LAST_FILE).read_bytes()
    except FileNotFoundError:
        return b""


def has_room(index: Path) -> bool:
    """Whether a copy fits on the disk. On a full one the original has to do: better than to lose it."""
    found = os.statvfs(index)
    return found.f_bavail * found.f_frsize > 2 * (index / INDEX_FILE).stat().st_size


def main(arguments: list[str], output: BinaryIO) -> int:
    """Copy, walk, tell; returns the exit status."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an abort is expected now and then; its core helps nobody
    source, copy, drive_id, slab_bytes, slabs = arguments
    header = DriveHeader(bytes.fromhex(drive_id), int(slab_bytes), int(slabs), 0)
    try:
        last = _read_last(Path(source))
        if has_room(Path(source)):
            copy_index(Path(source), Path(copy))
            walked = walk_index(Path(copy), header)
        else:
            walked = walk_index(Path(source), header)
        check_last(last, walked.number)
        output.writelines(frames(walked))
        output.flush()
    except (Corrupt, lmdb.Error, OSError) as error:
        text = f"{type(error).__name__}: {error}".encode()
        output.write(FRAME.pack(PROBLEM, 0, 0, 0, len(text)) + text)
        output.flush()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdout.buffer))
