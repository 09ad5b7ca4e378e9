"""The NVMe tier's bytes on disk, version 1: headers, index records, checksums, offsets. Pure: no I/O, no clock.

docs/layout.md has the same byte by byte; golden files pin it. Everything is little-endian but the index's keys, which
LMDB sorts as bytes. Each record is whole by a checksum of its own, so that nothing is believed because of where it was
found: a header names its drive, its place and its generation, a slot header in addition the checksum of its payload.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from forebay.kvstore.errors import Corrupt, LayoutError
from forebay.tiers.nvme_jobs import MODEL_BYTES_MAX, IoStatus, SlabOwner

VERSION = 1
XXH3_64 = 1
"""The only checksum kind there is."""
PAGE = 4096
SLABS_OFFSET = 1 << 20
"""Where slab 0 begins; before it lie the drive header on page 0 and its copy, then the count of bytes written."""
HEADER_COPY_OFFSET = SLABS_OFFSET // 2
"""Far from the header itself, so that no one write that goes astray takes both."""
WRITTEN_OFFSETS = (2 * PAGE, 3 * PAGE)
"""Where that count lies: written to one place after the other, the larger sound one counts."""
HASH_BYTES_MAX = 32

DRIVE_MAGIC = b"FOREBAYD"
SLAB_MAGIC = b"FOREBAYL"
SLOT_MAGIC = b"FOREBAYS"
WRITTEN_MAGIC = b"FOREBAYW"

_DRIVE = struct.Struct("<8sHH4x16sQQI4x")
_WRITTEN = struct.Struct("<8sHH4x16sQ")
_SLAB = struct.Struct("<8sHHI16s")
_OWNER = struct.Struct("<QQ32sIIQQIHH256s")
_SLOT = struct.Struct("<8sHHBB2x16s16sIIQQI4x32s32sQ")
_KEY = struct.Struct(">II")
_RECORD = struct.Struct("<BBIQQ")
_WHOLE_RECORDS = {
    _RECORD.size + hashes + 8: struct.Struct(f"<BBIQQ{hashes}xQ") for hashes in range(2 * HASH_BYTES_MAX + 1)
}
_META = struct.Struct("<HH4x16sQQ")
_STATE = struct.Struct("<QQ")
_U32_KEY = struct.Struct(">I")
_U64 = struct.Struct("<Q")

SLAB_KEY_BYTES = _U32_KEY.size
"""A slab's key, with which the keys of its slots begin."""
RECORD_NAMES_AT = _RECORD.size
"""Where in a block's record its hash begins; its parent's follows."""
SLAB_RECORD_BYTES = _OWNER.size + _U64.size
META_KEY = b"format"
STATE_KEY = b"state"
LAST_FILE = "last"
"""Beside the index: the number of its last transaction."""
_LAST_NAME = LAST_FILE.encode()
_U64_MASK = (1 << 64) - 1
_EMPTY_PAGE = bytes(PAGE)


@dataclass(frozen=True, slots=True)
class DriveHeader:
    """What a data file is. `drive_id` is 16 random bytes, `epoch` counts the times it was opened for writing."""

    drive_id: bytes
    slab_bytes: int
    slabs: int
    epoch: int


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """A sound slot header, field by field."""

    namespace_id: bytes
    slab: int
    slot: int
    hash: bytes
    parent: bytes
    depth: int
    generation: int
    payload_bytes: int
    payload_checksum: int


# --- places --------------------------------------------------------------------------------------------------------


def slot_stride(slot_bytes: int) -> int:
    """Bytes from one slot to the next: a header page and the payload."""
    return PAGE + slot_bytes


def slots_per_slab(slab_bytes: int, slot_bytes: int) -> int:
    """How many slots a slab has behind its header page."""
    return (slab_bytes - PAGE) // slot_stride(slot_bytes)


def slabs_in(capacity_bytes: int, slab_bytes: int) -> int:
    """How many slabs a file of at most `capacity_bytes` holds."""
    return max(0, capacity_bytes - SLABS_OFFSET) // slab_bytes


def file_bytes(slab_bytes: int, slabs: int) -> int:
    """The exact size of the data file."""
    return SLABS_OFFSET + slabs * slab_bytes


def slab_offset(slab_bytes: int, slab: int) -> int:
    """Where the slab's header page lies in the file."""
    return SLABS_OFFSET + slab * slab_bytes


def slot_offset(slab_bytes: int, slot_bytes: int, slab: int, slot: int) -> int:
    """Where the slot's header page lies in the file; its payload follows."""
    return SLABS_OFFSET + slab * slab_bytes + PAGE + slot * (PAGE + slot_bytes)


# --- drive header --------------------------------------------------------------------------------------------------


def encode_drive(header: DriveHeader) -> bytes:
    """One page."""
    body = _DRIVE.pack(DRIVE_MAGIC, VERSION, XXH3_64, header.drive_id, header.slab_bytes, header.slabs, header.epoch)
    return _page(body)


def decode_drive(page: bytes | memoryview) -> DriveHeader:
    """Raises LayoutError for another version or checksum kind, Corrupt for anything that is no drive header."""
    magic, version, kind, drive_id, slab_bytes, slabs, epoch = _DRIVE.unpack_from(page)
    if magic != DRIVE_MAGIC:
        raise Corrupt("it does not begin as a forebay data file")
    if version != VERSION:
        raise LayoutError(f"its format is version {version}, and this forebay reads version {VERSION}")
    if not _is_sound(page, _DRIVE.size):
        raise Corrupt("its drive header is damaged")
    if kind != XXH3_64:
        raise LayoutError(f"its checksums are of kind {kind}, unknown to this forebay")
    return DriveHeader(drive_id, slab_bytes, slabs, epoch)


# --- bytes written -------------------------------------------------------------------------------------------------


def encode_written(drive_id: bytes, written_bytes: int) -> bytes:
    """One page: what has been written to the drive in all its lives."""
    return _page(_WRITTEN.pack(WRITTEN_MAGIC, VERSION, XXH3_64, drive_id, written_bytes))


def decode_written(page: bytes | memoryview, drive_id: bytes) -> int:
    """The count; 0 for a page that holds no sound one of this drive."""
    magic, version, kind, drive, written_bytes = _WRITTEN.unpack_from(page)
    if (magic, version, kind, drive) != (WRITTEN_MAGIC, VERSION, XXH3_64, drive_id):
        return 0
    return int(written_bytes) if _is_sound(page, _WRITTEN.size) else 0


# --- slab header ---------------------------------------------------------------------------------------------------


def encode_slab(drive_id: bytes, slab: int, owner: SlabOwner, generation: int) -> bytes:
    """One page. `generation` is the first the owner's blocks can have."""
    return _page(_SLAB.pack(SLAB_MAGIC, VERSION, XXH3_64, slab, drive_id) + _pack_owner(owner, generation))


def decode_slab(page: bytes | memoryview, drive_id: bytes, slab: int) -> tuple[SlabOwner, int] | None:
    """The owner and its first generation; None for a free slab, a damaged header, or one of another place."""
    if bytes(page[: _SLAB.size]) != _SLAB.pack(SLAB_MAGIC, VERSION, XXH3_64, slab, drive_id):
        return None
    if not _is_sound(page, _SLAB.size + _OWNER.size):
        return None
    return _unpack_owner(page, _SLAB.size)


def is_free_slab(page: bytes | memoryview) -> bool:
    """Whether the header page is that of a slab that nobody owns: zeros."""
    return page == _EMPTY_PAGE


def _pack_owner(owner: SlabOwner, generation: int) -> bytes:
    model = owner.model.encode()[:MODEL_BYTES_MAX].decode(errors="ignore").encode()
    return _OWNER.pack(
        generation,
        owner.uid,
        owner.group_fingerprint,
        owner.rank,
        owner.shard_size,
        owner.block_bytes,
        owner.slot_bytes,
        owner.block_tokens,
        owner.hash_bytes,
        len(model),
        model,
    )


def _unpack_owner(page: bytes | memoryview, at: int) -> tuple[SlabOwner, int]:
    fields = _OWNER.unpack_from(page, at)
    generation, uid, fingerprint, rank, shard_size, block_bytes, slot_bytes, block_tokens, hash_bytes, length, model = (
        fields
    )
    owner = SlabOwner(
        uid=uid,
        group_fingerprint=fingerprint,
        rank=rank,
        shard_size=shard_size,
        block_bytes=block_bytes,
        slot_bytes=slot_bytes,
        hash_bytes=hash_bytes,
        block_tokens=block_tokens,
        model=model[:length].decode(errors="replace"),
    )
    return owner, generation


# --- slot header ---------------------------------------------------------------------------------------------------


def pack_slot(
    page: memoryview,
    drive_id: bytes,
    namespace_id: bytes,
    place: tuple[int, int],
    name: tuple[bytes, bytes, int, int],
    payload_bytes: int,
    payload_checksum: int,
) -> None:
    """Write a slot header into a page whose rest is zeros.

    `place` is slab and slot, `name` hash, parent, depth and generation. Positional, without an object of its own: it
    runs once a block in the writing threads.
    """
    slab, slot = place
    hash_, parent, depth, generation = name
    _SLOT.pack_into(
        page,
        0,
        SLOT_MAGIC,
        VERSION,
        XXH3_64,
        len(hash_),
        len(parent),
        drive_id,
        namespace_id,
        slab,
        slot,
        generation,
        payload_bytes,
        depth,
        hash_,
        parent,
        payload_checksum,
    )
    _U64.pack_into(page, _SLOT.size, xxh3_64_intdigest(page[: _SLOT.size]))


def unpack_slot(page: bytes | memoryview, drive_id: bytes) -> SlotRecord | None:
    """A sound slot header of this drive, else None."""
    fields = _SLOT.unpack_from(page)
    magic, version, kind, hash_len, parent_len, drive, namespace, slab, slot, generation, payload, depth = fields[:12]
    if (magic, version, kind, drive) != (SLOT_MAGIC, VERSION, XXH3_64, drive_id) or not _is_sound(page, _SLOT.size):
        return None
    if max(hash_len, parent_len) > HASH_BYTES_MAX:
        return None
    hash_, parent, checksum = fields[12:]
    return SlotRecord(
        namespace, slab, slot, hash_[:hash_len], parent[:parent_len], depth, generation, payload, checksum
    )


def has_slot_magic(page: bytes | memoryview) -> bool:
    """Whether a slot header was ever written here, sound or not."""
    return page[: len(SLOT_MAGIC)] == SLOT_MAGIC


def check_slot(
    page: memoryview,
    payload_bytes: int,
    drive_id: bytes,
    namespace_id: bytes,
    place: tuple[int, int],
    hash_: bytes,
    generation: int,
    digest: Callable[[], int],
) -> tuple[IoStatus, int]:
    """Whether a slot that was read holds the block it should; the payload's checksum when it does.

    `digest` computes the xxh3_64 of the `payload_bytes` that were read, without padding. The header is believed only
    after its own checksum, and the payload is hashed only after the header has been found to be the right one.
    """
    fields = _SLOT.unpack_from(page)
    if fields[0] != SLOT_MAGIC or not _is_sound(page, _SLOT.size):
        return IoStatus.BAD_HEADER, 0
    _, version, kind, hash_len, _, drive, namespace, slab, slot, found, length, _, name, _, checksum = fields
    if version != VERSION or kind != XXH3_64:
        return IoStatus.BAD_HEADER, 0
    if (
        name[:hash_len] != hash_
        or found != generation
        or (slab, slot) != place
        or namespace != namespace_id
        or length != payload_bytes
        or drive != drive_id
    ):
        return IoStatus.OTHER_BLOCK, 0
    if digest() != checksum:
        return IoStatus.BAD_PAYLOAD, 0
    return IoStatus.OK, checksum


# --- index records -------------------------------------------------------------------------------------------------


def slot_key(slab: int, slot: int) -> bytes:
    return _KEY.pack(slab, slot)


def slot_place(key: bytes) -> tuple[int, int]:
    """The inverse of `slot_key`."""
    slab, slot = _KEY.unpack(key)
    return slab, slot


def slab_key(slab: int) -> bytes:
    return _U32_KEY.pack(slab)


def encode_record(key: bytes, hash_: bytes, parent: bytes, depth: int, generation: int, payload_checksum: int) -> bytes:
    """The index record of one block, as stored under `key`."""
    body = _RECORD.pack(len(hash_), len(parent), depth, generation, payload_checksum) + hash_ + parent
    return body + _U64.pack(xxh3_64_intdigest(key + body))


def found_record(record: SlotRecord) -> tuple[bytes, bytes]:
    """Key and index record of a block that was found by its header."""
    key = slot_key(record.slab, record.slot)
    return key, encode_record(key, record.hash, record.parent, record.depth, record.generation, record.payload_checksum)


def record_head(key: bytes, value: bytes) -> tuple[int, int, int, int, int] | None:
    """(hash length, parent length, depth, generation, what it adds to the index's sum) of a sound record, else None."""
    whole = _WHOLE_RECORDS.get(len(value))
    if whole is None or len(key) != _KEY.size:
        return None
    hash_len, parent_len, depth, generation, _, checksum = whole.unpack(value)
    if (
        checksum != xxh3_64_intdigest(key + value[:-8])
        or len(value) != _RECORD.size + hash_len + parent_len + _U64.size
    ):
        return None
    return hash_len, parent_len, depth, generation, checksum


def record_struct(hash_len: int, parent_len: int) -> struct.Struct:
    """Reads depth, generation, hash, parent out of records of one shape that have been checked already."""
    return struct.Struct(f"<2xIQ8x{hash_len}s{parent_len}s8x")


def encode_slab_record(key: bytes, owner: SlabOwner, generation: int) -> bytes:
    """The index record of an assigned slab."""
    body = _pack_owner(owner, generation)
    return body + _U64.pack(xxh3_64_intdigest(key + body))


def decode_slab_record(key: bytes, value: bytes) -> tuple[int, SlabOwner, int]:
    """(slab, owner, first generation). Raises Corrupt."""
    if len(key) != _U32_KEY.size or len(value) != SLAB_RECORD_BYTES or not _is_keyed_sound(key, value):
        raise Corrupt("a slab's record is damaged")
    return _U32_KEY.unpack(key)[0], *_unpack_owner(value, 0)


def encode_meta(header: DriveHeader) -> bytes:
    """What the index is of: stored under `META_KEY`."""
    body = _META.pack(VERSION, XXH3_64, header.drive_id, header.slab_bytes, header.slabs)
    return body + _U64.pack(xxh3_64_intdigest(META_KEY + body))


def check_meta(value: bytes | None, header: DriveHeader) -> None:
    """Raise Corrupt unless the index belongs to the drive and has this version."""
    if value is None:
        raise Corrupt("the index does not say what it is of")
    if value != encode_meta(header):
        raise Corrupt("the index is damaged, of another drive, or of another version")


def record_sum(value: bytes) -> int:
    """What one record of a block or slab adds to the sum over an index: the checksum at its end."""
    return int.from_bytes(value[-_U64.size :], "little")


def encode_state(number: int, total: int) -> bytes:
    """How many transactions the index has seen, and the sum of its records, modulo 2**64: under `STATE_KEY`."""
    body = _STATE.pack(number, total & _U64_MASK)
    return body + _U64.pack(xxh3_64_intdigest(STATE_KEY + body))


def decode_state(value: bytes | None) -> tuple[int, int]:
    """(number, sum). Raises Corrupt."""
    if value is None or len(value) != _STATE.size + _U64.size or not _is_keyed_sound(STATE_KEY, value):
        raise Corrupt("the index does not say how many transactions it has seen")
    number, total = _STATE.unpack_from(value)
    return int(number), int(total)


def check_sum(total: int, expected: int) -> None:
    """Raise Corrupt unless the records found are those that the index's state was written with."""
    if total & _U64_MASK != expected:
        raise Corrupt("records of the index are missing, or older than its last transaction")


def encode_last(number: int) -> bytes:
    """What `LAST_FILE` holds."""
    body = _U64.pack(number)
    return body + _U64.pack(xxh3_64_intdigest(_LAST_NAME + body))


def check_last(content: bytes, number: int) -> None:
    """Raise Corrupt unless an index that has seen `number` transactions is as new as the file beside it says."""
    if len(content) != 2 * _U64.size or not _is_keyed_sound(_LAST_NAME, content):
        raise Corrupt("the number of its last transaction is missing or damaged")
    last = _U64.unpack_from(content)[0]
    if number < last:
        raise Corrupt(f"the index is of transaction {number}, the last was {last}")


def _page(body: bytes) -> bytes:
    return (body + _U64.pack(xxh3_64_intdigest(body))).ljust(PAGE, b"\0")


def _is_sound(page: bytes | memoryview, length: int) -> bool:
    """Whether the checksum behind the first `length` bytes is theirs."""
    return bool(xxh3_64_intdigest(page[:length]) == _U64.unpack_from(page, length)[0])


def _is_keyed_sound(key: bytes, value: bytes) -> bool:
    return bool(xxh3_64_intdigest(key + value[: -_U64.size]) == int.from_bytes(value[-_U64.size :], "little"))
