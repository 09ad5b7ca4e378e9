"""The bytes on disk: golden files, round trips, and that nothing damaged or displaced is believed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from tests.tiers.nvme_rig import OWNER
from xxhash import xxh3_64_intdigest

from forebay.kvstore.errors import Corrupt, LayoutError
from forebay.tiers.nvme_format import (
    META_KEY,
    PAGE,
    SLABS_OFFSET,
    STATE_KEY,
    DriveHeader,
    SlotRecord,
    check_last,
    check_meta,
    check_slot,
    decode_drive,
    decode_slab,
    decode_slab_record,
    decode_state,
    decode_written,
    encode_drive,
    encode_last,
    encode_meta,
    encode_record,
    encode_slab,
    encode_slab_record,
    encode_state,
    encode_written,
    file_bytes,
    is_free_slab,
    pack_slot,
    record_head,
    record_struct,
    record_sum,
    slab_key,
    slabs_in,
    slot_key,
    slot_offset,
    slot_place,
    slots_per_slab,
    unpack_slot,
)
from forebay.tiers.nvme_jobs import IoStatus, SlabOwner

GOLDEN = Path(__file__).parent / "golden"
DRIVE = DriveHeader(drive_id=bytes(range(100, 116)), slab_bytes=256 << 20, slabs=3, epoch=7)
NAMESPACE = OWNER.namespace_id()
HASH, PARENT = bytes(range(32)), bytes(range(32, 64))
GENERATION = 7 << 32 | 5
PAYLOAD = memoryview(b"payload of a block")
RECORD = SlotRecord(NAMESPACE, 1, 2, HASH, PARENT, 9, GENERATION, len(PAYLOAD), 0x1122334455667788)


def slot_page(record: SlotRecord = RECORD) -> memoryview:
    page = memoryview(bytearray(PAGE))
    pack_slot(
        page,
        DRIVE.drive_id,
        record.namespace_id,
        (record.slab, record.slot),
        (record.hash, record.parent, record.depth, record.generation),
        record.payload_bytes,
        record.payload_checksum,
    )
    return page


ENCODED = {
    "drive": encode_drive(DRIVE),
    "written": encode_written(DRIVE.drive_id, 3 << 40 | 5),
    "slab": encode_slab(DRIVE.drive_id, 2, OWNER, GENERATION),
    "slot": bytes(slot_page()),
    "index_meta": META_KEY + encode_meta(DRIVE),
    "index_state": STATE_KEY + encode_state(3 << 40 | 5, 0x1122334455667788),
    "index_last": encode_last(3 << 40 | 5),
    "index_slab": slab_key(2) + encode_slab_record(slab_key(2), OWNER, GENERATION),
    "index_slot": slot_key(1, 2) + encode_record(slot_key(1, 2), HASH, PARENT, 9, GENERATION, 0x1122334455667788),
}


@pytest.mark.parametrize("record", ENCODED)
def test_version_1_never_changes(record: str) -> None:
    """A change here makes every drive in the field unreadable: raise the version instead. Zeros at the end are cut."""
    golden = bytes.fromhex((GOLDEN / f"nvme_1_{record}.hex").read_text())
    assert ENCODED[record].rstrip(b"\0") == golden.rstrip(b"\0")


def test_headers_fill_a_page() -> None:
    assert {len(ENCODED[record]) for record in ("drive", "written", "slab", "slot")} == {PAGE}


def test_drive_header_comes_back() -> None:
    assert decode_drive(encode_drive(DRIVE)) == DRIVE


def test_count_of_bytes_written_comes_back_for_its_own_drive_only() -> None:
    page = encode_written(DRIVE.drive_id, 3 << 40)
    assert decode_written(page, DRIVE.drive_id) == 3 << 40
    assert decode_written(page, bytes(16)) == 0
    assert decode_written(bytes(PAGE), DRIVE.drive_id) == 0


def test_slab_header_comes_back_for_its_own_place_only() -> None:
    page = encode_slab(DRIVE.drive_id, 2, OWNER, GENERATION)
    assert decode_slab(page, DRIVE.drive_id, 2) == (OWNER, GENERATION)
    assert decode_slab(page, DRIVE.drive_id, 1) is None
    assert decode_slab(page, bytes(16), 2) is None
    assert not is_free_slab(page)
    assert is_free_slab(bytes(PAGE))


def test_long_model_name_is_cut_between_characters() -> None:
    owner = SlabOwner(**{**_fields(OWNER), "model": "x" + "é" * 200})
    found = decode_slab(encode_slab(DRIVE.drive_id, 0, owner, 1), DRIVE.drive_id, 0)
    assert found is not None
    assert found[0].model == "x" + "é" * 127


def test_slot_header_comes_back() -> None:
    assert unpack_slot(slot_page(), DRIVE.drive_id) == RECORD
    assert unpack_slot(slot_page(), bytes(16)) is None


def test_root_has_no_parent() -> None:
    root = SlotRecord(NAMESPACE, 0, 0, HASH[:16], b"", 0, 1, 10, 0)
    assert unpack_slot(slot_page(root), DRIVE.drive_id) == root


@pytest.mark.parametrize("record", ["drive", "written", "slab", "slot"])
def test_no_flipped_bit_of_a_header_is_believed(record: str) -> None:
    """Each bit up to the end of the checksum; behind it lie zeros that nobody reads."""
    whole = ENCODED[record]
    for bit in range(len(whole.rstrip(b"\0")) * 8):
        page = bytearray(whole)
        page[bit // 8] ^= 1 << bit % 8
        if record == "drive":
            with pytest.raises((Corrupt, LayoutError)):
                decode_drive(bytes(page))
        elif record == "written":
            assert decode_written(bytes(page), DRIVE.drive_id) == 0
        elif record == "slab":
            assert decode_slab(bytes(page), DRIVE.drive_id, 2) is None
        else:
            assert unpack_slot(bytes(page), DRIVE.drive_id) is None


def test_other_version_is_named() -> None:
    page = bytearray(encode_drive(DRIVE))
    page[8] = 9
    with pytest.raises(LayoutError, match="version 9, and this forebay reads version 1"):
        decode_drive(bytes(page))


def check(page: memoryview, payload: memoryview = PAYLOAD, **changed: object) -> IoStatus:
    wanted = {
        "payload_bytes": len(payload),
        "drive_id": DRIVE.drive_id,
        "namespace_id": NAMESPACE,
        "place": (1, 2),
        "hash_": HASH,
        "generation": GENERATION,
        "digest": lambda: xxh3_64_intdigest(payload),
        **changed,
    }
    return check_slot(page, **wanted)[0]  # type: ignore[arg-type]


def sound_page() -> memoryview:
    return slot_page(SlotRecord(NAMESPACE, 1, 2, HASH, PARENT, 9, GENERATION, len(PAYLOAD), xxh3_64_intdigest(PAYLOAD)))


def test_right_slot_passes() -> None:
    assert check(sound_page()) is IoStatus.OK


@pytest.mark.parametrize(
    "changed",
    [
        {"drive_id": bytes(16)},
        {"namespace_id": bytes(16)},
        {"place": (1, 3)},
        {"place": (0, 2)},
        {"hash_": PARENT},
        {"hash_": HASH[:16]},
        {"generation": GENERATION - 1},
        {"payload": PAYLOAD[:-1]},
    ],
    ids=("drive", "namespace", "slot", "slab", "hash", "shorter hash", "generation", "shorter payload"),
)
def test_sound_header_of_anything_else_is_another_block(changed: dict[str, object]) -> None:
    assert check(sound_page(), **changed) is IoStatus.OTHER_BLOCK


def test_damage_is_told_apart() -> None:
    assert check(sound_page(), payload=memoryview(b"qayload of a block")) is IoStatus.BAD_PAYLOAD
    assert check(memoryview(bytearray(PAGE))) is IoStatus.BAD_HEADER
    page = sound_page()
    page[90] ^= 1
    assert check(page) is IoStatus.BAD_HEADER


def test_index_record_comes_back() -> None:
    key = slot_key(1, 2)
    value = encode_record(key, HASH, b"", 9, GENERATION, 77)
    assert record_head(key, value) == (32, 0, 9, GENERATION, record_sum(value))
    assert list(record_struct(32, 0).iter_unpack(value)) == [(9, GENERATION, HASH, b"")]
    assert slot_place(key) == (1, 2)


def test_no_damaged_or_displaced_index_record_is_believed() -> None:
    key = slot_key(1, 2)
    value = encode_record(key, HASH, PARENT, 9, GENERATION, 77)
    assert record_head(slot_key(1, 3), value) is None
    assert record_head(key, value[:-1]) is None
    assert record_head(key[:4], value) is None
    for bit in range(len(value) * 8):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        assert record_head(key, bytes(damaged)) is None


def test_slab_record_comes_back_for_its_own_key_only() -> None:
    value = encode_slab_record(slab_key(2), OWNER, GENERATION)
    assert decode_slab_record(slab_key(2), value) == (2, OWNER, GENERATION)
    with pytest.raises(Corrupt):
        decode_slab_record(slab_key(3), value)
    with pytest.raises(Corrupt):
        decode_slab_record(slab_key(2), value[:-1])


def test_index_of_another_drive_or_size_is_refused() -> None:
    check_meta(encode_meta(DRIVE), DRIVE)
    for other in (None, b"", encode_meta(DriveHeader(bytes(16), DRIVE.slab_bytes, DRIVE.slabs, 0))):
        with pytest.raises(Corrupt):
            check_meta(other, DRIVE)


def test_no_damaged_state_of_an_index_is_believed() -> None:
    value = encode_state(7, (1 << 64) + 5)
    assert decode_state(value) == (7, 5)
    for damaged in (None, b"", value[:-1], *_flipped(value)):
        with pytest.raises(Corrupt):
            decode_state(damaged)


def test_index_may_be_ahead_of_its_last_reported_transaction_and_never_behind() -> None:
    content = encode_last(7)
    check_last(content, 7)
    check_last(content, 8)
    with pytest.raises(Corrupt, match="transaction 6, the last was 7"):
        check_last(content, 6)
    for damaged in (b"", content[:-1], *_flipped(content)):
        with pytest.raises(Corrupt):
            check_last(damaged, 1 << 63)


def _flipped(value: bytes) -> list[bytes]:
    """All that one flipped bit makes of it."""
    whole = int.from_bytes(value, "little")
    return [(whole ^ 1 << bit).to_bytes(len(value), "little") for bit in range(8 * len(value))]


def test_namespace_id_names_user_fingerprint_and_rank() -> None:
    others = [
        {**_fields(OWNER), key: value} for key, value in (("uid", 1), ("rank", 1), ("group_fingerprint", bytes(32)))
    ]
    assert len({NAMESPACE, *(SlabOwner(**other).namespace_id() for other in others)}) == 4


def test_places_neither_overlap_nor_leave_the_file() -> None:
    slab_bytes, slot_bytes = 1 << 20, 8192
    slabs = slabs_in(10 << 20, slab_bytes)
    assert file_bytes(slab_bytes, slabs) <= 10 << 20 < file_bytes(slab_bytes, slabs + 1)
    slots = slots_per_slab(slab_bytes, slot_bytes)
    starts = [slot_offset(slab_bytes, slot_bytes, slab, slot) for slab in range(slabs) for slot in range(slots)]
    assert min(starts) == SLABS_OFFSET + PAGE
    assert all(later - earlier >= PAGE + slot_bytes for earlier, later in pairwise(starts))
    assert max(starts) + PAGE + slot_bytes <= file_bytes(slab_bytes, slabs)
    assert all(start % PAGE == 0 for start in starts)


def test_file_too_small_for_a_slab_holds_none() -> None:
    assert slabs_in(1 << 20, 1 << 20) == 0
    assert slabs_in(4096, 1 << 20) == 0


def _fields(owner: SlabOwner) -> dict[str, object]:
    return {field: getattr(owner, field) for field in SlabOwner.__dataclass_fields__}
