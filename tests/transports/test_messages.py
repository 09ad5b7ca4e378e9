"""Bounds of the wire's records and the blobs they carry; the page of the protocol against the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.kvstore.errors import BY_CODE, BadRequest
from forebay.kvstore.namespace import NamespaceSpec
from forebay.transports import messages as m
from forebay.transports import packets as p

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
SPEC = NamespaceSpec("model", "revision", "bfloat16", 16, (4096, 4096))
BLOB = bytes(64)

GOOD: dict[type[m.Record], list[Any]] = {
    m.PingRequest: [],
    m.PingReply: [],
    m.OpenNamespaceRequest: [SPEC],
    m.OpenNamespaceReply: [1, bytes(32), 8192, 8192, 100, 32, 16],
    m.FindNamespaceRequest: [b"\x01", 0],
    m.FindNamespaceReply: [1, bytes(32), 8192, 8192, 100, 32, 16],
    m.LookupRequest: [1, BLOB],
    m.LookupReply: [2, (("host", 2),), 17, "load", 2],
    m.AcquireRequest: [1, BLOB, 0],
    m.AcquireReply: [7, bytes(16), bytes(16), 1, bytes(16)],
    m.ResolveRequest: [1, 7],
    m.ResolveReply: [bytes(16), bytes(16), 2, b""],
    m.ReleaseRequest: [7],
    m.ReleaseReply: [],
    m.ReserveRequest: [1, b"", BLOB, 2],
    m.ReserveReply: [9, b"\0\1", bytes(8), bytes(8)],
    m.CommitRequest: [9, bytes(4), bytes(16)],
    m.CommitReply: [1],
    m.AbortRequest: [9],
    m.AbortReply: [],
    m.PinRequest: [1, BLOB],
    m.PinReply: [2],
    m.UnpinRequest: [1, BLOB],
    m.UnpinReply: [2],
    m.EvictRequest: [1, 0, BLOB, True, 7],
    m.EvictReply: [1, 1, 7],
    m.TouchRequest: [1, BLOB],
    m.TouchReply: [2],
    m.DoneRequest: [1, BLOB, 3],
    m.DoneReply: [2],
    m.PrefetchRequest: [1, BLOB],
    m.PrefetchReply: [1, 1],
    m.StatusRequest: [],
    m.StatusReply: ["{}"],
    m.CheckRequest: [],
    m.CheckReply: [("a slot is in two places",)],
    m.ClearRequest: [False, 7],
    m.ClearReply: [3, 0, 7],
    m.PersistRequest: [1, BLOB],
    m.PersistReply: [1, 1],
    m.ReportRequest: [512, 1024, 20_000, 1 << 20, 100],
    m.ReportReply: [],
    m.RecordRequest: [1, 1000, 10],
    m.RecordReply: [],
    m.ExplainRequest: [1, bytes(32)],
    m.ExpectRequest: [1, BLOB, 1000],
    m.StoppedRequest: [1, BLOB, 2],
    m.ExpectReply: [2],
    m.PinnedRequest: [1 << 30, "memlock"],
    m.PinnedReply: [],
    m.StoppedReply: [3],
    m.ExplainReply: ["{}"],
    m.RecordedRequest: [],
    m.RecordedReply: [bytes(24), BLOB, 0, True],
    p.Hello: [1, "engine", b""],
    p.Welcome: [1, bytes(16), bytes(16), 4 << 20, 65536],
    p.MapSlab: [1, 0],
    p.SlabMap: [1, 0, 1 << 26, 8192, 8192, True],
    p.Release: [1],
    p.Retired: [1, 0],
    p.Ready: [1, 1, 2],
    p.Refusal: [101, "no"],
}

BIG_BLOB = bytes(m.HASHES_MAX * 32 + 1)
LONG = "x" * 1025

# (record, position of the field, a value out of bounds)
BAD: list[tuple[type[m.Record], int, Any]] = [
    *[
        (record, 0, value)
        for record in (
            *(m.LookupRequest, m.PinRequest, m.UnpinRequest, m.TouchRequest, m.DoneRequest, m.PrefetchRequest),
            m.PersistRequest,
        )
        for value in (0, -1, 1 << 63, True, 1.0, "1", None)
    ],
    *[
        (record, 1, BIG_BLOB)
        for record in (m.LookupRequest, m.AcquireRequest, m.PinRequest, m.TouchRequest, m.DoneRequest, m.PersistRequest)
    ],
    (m.LookupRequest, 1, "text"),
    (m.OpenNamespaceReply, 0, 0),
    (m.OpenNamespaceReply, 1, bytes(31)),
    (m.OpenNamespaceReply, 2, 0),
    (m.OpenNamespaceReply, 3, 8191),
    (m.OpenNamespaceReply, 4, 0),
    (m.OpenNamespaceReply, 5, 15),
    (m.OpenNamespaceReply, 5, 33),
    (m.OpenNamespaceReply, 6, 0),
    (m.FindNamespaceRequest, 0, b""),
    (m.FindNamespaceRequest, 0, bytes(33)),
    (m.FindNamespaceRequest, 1, 1024),
    (m.LookupReply, 0, m.HASHES_MAX + 1),
    (m.LookupReply, 1, (("host", -1),)),
    (m.LookupReply, 1, (("host",),)),
    (m.LookupReply, 1, ((LONG, 1),)),
    (m.LookupReply, 1, (("host", 1),) * 17),
    (m.LookupReply, 1, "host"),
    (m.LookupReply, 2, -1),
    (m.LookupReply, 3, "wait"),
    (m.LookupReply, 4, 3),
    *[(m.ReportRequest, position, value) for position in range(5) for value in (-1, 1 << 48, 1.5)],
    *[(m.RecordRequest, position, value) for position in range(3) for value in (0, -1, 1 << 63, 1.5, True)],
    (m.ExplainRequest, 0, 0),
    *[(m.PinnedRequest, 0, value) for value in (-1, 1 << 63, 1.5)],
    *[(m.PinnedRequest, 1, value) for value in ("x" * 257, b"", 1)],
    *[(m.DoneRequest, 2, value) for value in (-1, m.U31_MAX + 1, 1.5, True, None)],
    *[(m.StoppedRequest, 2, value) for value in (0, 5, 1.5, True, None)],
    *[(m.ExpectRequest, 2, value) for value in (0, -1, m.EXPECT_MS_MAX + 1, 1.5, True)],
    (m.ExplainRequest, 1, b""),
    (m.ExplainRequest, 1, bytes(33)),
    (m.ExplainReply, 0, b"{}"),
    (m.RecordedReply, 0, bytes(16)),
    (m.RecordedReply, 1, BIG_BLOB),
    (m.RecordedReply, 2, -1),
    (m.RecordedReply, 3, 1),
    (m.AcquireRequest, 0, 0),
    (m.AcquireRequest, 2, -1),
    (m.AcquireRequest, 2, m.TTL_MS_MAX + 1),
    (m.AcquireReply, 0, -1),
    (m.AcquireReply, 1, bytes(15)),
    (m.AcquireReply, 1, bytes(8)),
    (m.AcquireReply, 2, bytes(m.HASHES_MAX * 8 + 8)),
    (m.AcquireReply, 3, -1),
    (m.AcquireReply, 3, 3),
    (m.AcquireReply, 3, True),
    (m.AcquireReply, 4, bytes(8)),
    (m.AcquireReply, 4, bytes(24)),
    (m.AcquireReply, 4, "x" * 16),
    (m.ResolveRequest, 1, 0),
    (m.ResolveReply, 0, bytes(24)),
    (m.ResolveReply, 2, 3),
    (m.ResolveReply, 3, bytes(8)),
    (m.ReleaseRequest, 0, 0),
    (m.ReleaseRequest, 0, 1 << 63),
    (m.ReserveRequest, 1, bytes(15)),
    (m.ReserveRequest, 1, bytes(33)),
    (m.ReserveRequest, 2, BIG_BLOB),
    *[(m.ReserveRequest, 3, value) for value in (-1, 4, True, 1.0, None)],
    (m.ReserveReply, 0, -1),
    (m.ReserveReply, 1, bytes(m.HASHES_MAX + 1)),
    (m.ReserveReply, 2, b""),
    (m.CommitRequest, 0, 0),
    (m.CommitRequest, 1, bytes(3)),
    (m.CommitRequest, 1, bytes(m.HASHES_MAX * 4 + 4)),
    (m.CommitRequest, 2, bytes(15)),
    (m.CommitRequest, 2, bytes(m.HASHES_MAX * 8 + 8)),
    (m.CommitReply, 0, -1),
    (m.AbortRequest, 0, 0),
    (m.EvictRequest, 1, 3),
    (m.EvictRequest, 1, -1),
    (m.EvictRequest, 2, BIG_BLOB),
    (m.EvictRequest, 3, 1),
    (m.EvictRequest, 4, -1),
    (m.EvictReply, 1, -1),
    (m.EvictReply, 2, -1),
    (m.PrefetchReply, 0, -1),
    (m.StatusReply, 0, "x" * (m.STATUS_CHARS_MAX + 1)),
    (m.StatusReply, 0, b"{}"),
    (m.CheckReply, 0, (LONG,)),
    (m.CheckReply, 0, ("x",) * (m.PROBLEMS_MAX + 1)),
    (m.ClearRequest, 0, 0),
    (m.ClearRequest, 1, m.U63_MAX + 1),
    (m.ClearReply, 0, -1),
    (m.ClearReply, 2, m.U63_MAX + 1),
    (m.PersistReply, 0, -1),
    (m.PersistReply, 1, m.HASHES_MAX + 1),
    (p.Hello, 0, -1),
    (p.Hello, 1, "x" * 129),
    (p.Hello, 2, bytes(33)),
    (p.Welcome, 1, bytes(15)),
    (p.Welcome, 2, b""),
    (p.Welcome, 3, 0),
    (p.MapSlab, 0, 0),
    (p.MapSlab, 1, -1),
    (p.SlabMap, 2, 0),
    (p.SlabMap, 4, 0),
    (p.SlabMap, 5, 1),
    (p.Release, 0, 0),
    (p.Retired, 1, -1),
    (p.Ready, 0, 0),
    (p.Ready, 1, -1),
    (p.Ready, 1, 3),
    (p.Ready, 2, 0),
    (p.Ready, 2, m.HASHES_MAX + 1),
    (p.Refusal, 0, 0),
    (p.Refusal, 1, LONG),
]


def test_every_verb_has_a_request_and_a_reply() -> None:
    assert set(m.REQUESTS) == set(m.REPLIES) == set(m.Verb)
    assert all(request.verb is verb for verb, request in m.REQUESTS.items())


def test_every_record_of_the_wire_is_tried_here() -> None:
    assert set(GOOD) == {*m.REQUESTS.values(), *m.REPLIES.values(), *p.PACKETS.values()}


@pytest.mark.parametrize("record_type", GOOD, ids=lambda t: t.__name__)
def test_fields_within_bounds_pass(record_type: type[m.Record]) -> None:
    record_type(*GOOD[record_type]).check()


@pytest.mark.parametrize(("record_type", "position", "value"), BAD, ids=lambda v: str(getattr(v, "__name__", ""))[:30])
def test_a_field_out_of_bounds_is_a_bad_request(record_type: type[m.Record], position: int, value: Any) -> None:
    fields = list(GOOD[record_type])
    fields[position] = value
    with pytest.raises(BadRequest):
        record_type.from_fields(fields)


@pytest.mark.parametrize("record_type", GOOD, ids=lambda t: t.__name__)
def test_a_field_too_many_or_too_few_is_a_bad_request(record_type: type[m.Record]) -> None:
    good = record_type(*GOOD[record_type]).to_fields()
    with pytest.raises(BadRequest):
        record_type.from_fields([*good, 1])
    if good:
        with pytest.raises(BadRequest):
            record_type.from_fields(good[:-1])


def test_a_namespace_spec_of_the_wrong_shape_is_a_bad_request() -> None:
    for values in (None, 1, [], [1] * 14, {}):
        with pytest.raises(BadRequest):
            m.OpenNamespaceRequest.from_fields([values])


@given(st.integers(16, 32), st.integers(0, 2100), st.randoms(use_true_random=False))
def test_hashes_come_back_from_a_blob_as_they_went_in(width: int, count: int, random: Any) -> None:
    hashes = [random.randbytes(width) for _ in range(count)]
    assert m.split_hashes(m.join_hashes(hashes, width), width) == hashes


def test_hashes_that_end_in_zeros_keep_them() -> None:
    hashes = [b"a" + bytes(31), bytes(32)]
    assert m.split_hashes(m.join_hashes(hashes, 32), 32) == hashes


def test_a_blob_that_is_no_multiple_of_the_width_is_a_bad_request() -> None:
    with pytest.raises(BadRequest):
        m.split_hashes(bytes(33), 32)


def test_more_hashes_than_the_limit_are_a_bad_request() -> None:
    with pytest.raises(BadRequest):
        m.split_hashes(bytes(32 * 5), 32, hashes_max=4)
    with pytest.raises(BadRequest):
        m.join_hashes([bytes(32)] * 5, 32, hashes_max=4)


def test_a_hash_of_another_width_is_a_bad_request_even_when_the_sum_fits() -> None:
    with pytest.raises(BadRequest):
        m.join_hashes([bytes(16), bytes(48)], 32)


@given(st.lists(st.integers(0, (1 << 64) - 1)))
def test_u64_numbers_come_back_from_a_blob(numbers: list[int]) -> None:
    blob = m.join_u64(numbers)
    assert list(m.split_u64(blob)) == numbers
    assert blob == b"".join(number.to_bytes(8, "little") for number in numbers)


@given(st.lists(st.integers(0, (1 << 32) - 1)))
def test_u32_numbers_come_back_from_a_blob(numbers: list[int]) -> None:
    assert list(m.split_u32(m.join_u32(numbers))) == numbers


def test_a_number_blob_with_a_rest_is_a_bad_request() -> None:
    for split in (m.split_u64, m.split_u32):
        with pytest.raises(BadRequest):
            split(bytes(9))


def test_the_protocol_page_names_every_verb_with_its_number() -> None:
    page = PAGE.read_text()
    missing = [verb.name for verb in m.Verb if f"`{verb.name}` = {int(verb)}" not in page]
    assert not missing


def test_the_protocol_page_names_every_error_with_its_code() -> None:
    page = PAGE.read_text()
    missing = [e.__name__ for code, e in BY_CODE.items() if code and f"| {code} | `{e.__name__}` |" not in page]
    assert not missing


def test_the_protocol_page_names_every_field_of_every_record() -> None:
    page = PAGE.read_text()
    records = [*m.REQUESTS.values(), *m.REPLIES.values(), *p.PACKETS.values()]
    missing = {name for record in records for name in record.__match_args__ if f"`{name}`" not in page}
    assert not missing


def test_the_protocol_page_names_every_packet() -> None:
    page = PAGE.read_text()
    assert all(f'"{kind}"' in page for kind in p.PACKETS)
