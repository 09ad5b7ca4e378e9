"""The codec against honest records, limits, and garbage: a ForebayError is the only other way out."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forebay.kvstore.errors import BY_CODE, BadRequest, ForebayError, TierFull, UnknownVerb, VersionMismatch
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import StopReason
from forebay.transports import codec
from forebay.transports import messages as m
from forebay.transports import packets as p

V = m.PROTOCOL_VERSION
TOKEN = b"t" * 16
BOOT = b"b" * 16
SPEC = NamespaceSpec("model", "revision", "bfloat16", 16, (4096, 4096), tenant_salt=b"salt")

u63 = st.integers(1, m.U63_MAX)
counts = st.integers(0, m.HASHES_MAX)
blobs = st.binary(max_size=200)


def number_blobs(width: int) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=20).map(lambda b: b * width)


pairs = st.integers(0, 20).flatmap(lambda n: st.tuples(*[st.binary(min_size=8 * n, max_size=8 * n)] * 2))
readables = pairs.flatmap(
    lambda pair: st.tuples(
        st.just(pair[0]), st.just(pair[1]), st.integers(0, len(pair[0]) // 8), st.sampled_from([b"", pair[0]])
    )
)
names = st.text(max_size=50)
sizes = st.integers(9, m.U31_MAX)

BLOB_REQUESTS = (
    *(m.LookupRequest, m.PinRequest, m.UnpinRequest, m.TouchRequest, m.PrefetchRequest),
    m.PersistRequest,
)
COUNT_REPLIES = (m.CommitReply, m.PinReply, m.UnpinReply, m.TouchReply, m.DoneReply, m.ExpectReply, m.StoppedReply)
OPEN_REPLIES = (m.OpenNamespaceReply, m.FindNamespaceReply)

requests = st.one_of(
    st.sampled_from([m.PingRequest(), m.StatusRequest(), m.CheckRequest(), m.OpenNamespaceRequest(SPEC)]),
    *[st.builds(record, u63, blobs) for record in BLOB_REQUESTS],
    st.builds(m.FindNamespaceRequest, st.binary(min_size=1, max_size=32), st.integers(0, 1023)),
    st.builds(m.AcquireRequest, u63, blobs, st.integers(0, m.TTL_MS_MAX)),
    st.builds(m.ResolveRequest, u63, u63),
    st.builds(m.ReleaseRequest, u63),
    st.builds(
        m.ReserveRequest, u63, st.one_of(st.just(b""), st.binary(min_size=16, max_size=32)), blobs, st.integers(0, 3)
    ),
    st.builds(m.CommitRequest, u63, number_blobs(4), number_blobs(8)),
    st.builds(m.AbortRequest, u63),
    st.builds(m.EvictRequest, u63, st.sampled_from(m.EvictScope), blobs, st.booleans(), u63),
    st.builds(m.ClearRequest, st.booleans(), u63),
    st.builds(m.ReportRequest, *[st.integers(0, m.REPORTED_MAX)] * 5),
    st.builds(m.RecordRequest, u63, st.integers(1, m.RECORD_MS_MAX), u63),
    st.just(m.RecordedRequest()),
    st.builds(m.DoneRequest, u63, blobs, st.integers(0, m.U31_MAX)),
    st.builds(m.StoppedRequest, u63, blobs, st.sampled_from(StopReason)),
    st.builds(m.ExpectRequest, u63, blobs, st.integers(1, m.EXPECT_MS_MAX)),
    st.builds(m.PinnedRequest, st.integers(0, m.U63_MAX), st.text(max_size=m.REFUSED_CHARS_MAX)),
    st.builds(m.ExplainRequest, u63, st.binary(min_size=16, max_size=32)),
)
replies = st.one_of(
    st.sampled_from([m.PingReply(), m.ReleaseReply(), m.AbortReply()]),
    *[st.builds(r, u63, st.just(bytes(32)), st.just(9), sizes, sizes, st.just(32), sizes) for r in OPEN_REPLIES],
    counts.flatmap(
        lambda blocks: st.builds(
            m.LookupReply,
            st.just(blocks),
            st.lists(st.tuples(names, counts), max_size=4).map(tuple),
            u63,
            st.sampled_from(m.ADVICE),
            st.integers(0, blocks),
        )
    ),
    st.builds(lambda lease, fields: m.AcquireReply(lease, *fields), u63, readables),
    readables.map(lambda fields: m.ResolveReply(*fields)),
    pairs.flatmap(lambda pair: st.builds(m.ReserveReply, u63, blobs, st.just(pair[0]), st.just(pair[1]))),
    *[st.builds(r, u63) for r in COUNT_REPLIES],
    *[st.builds(r, u63, u63, u63) for r in (m.EvictReply, m.ClearReply)],
    *[st.builds(r, counts, counts) for r in (m.PrefetchReply, m.PersistReply)],
    st.builds(m.ExplainReply, names),
    st.builds(m.RecordedReply, number_blobs(24), blobs, counts, st.booleans()),
    st.builds(m.StatusReply, names),
    st.builds(m.CheckReply, st.lists(names, max_size=4).map(tuple)),
)
packets = st.one_of(
    st.builds(p.Hello, counts, names, st.binary(max_size=32)),
    st.builds(p.Welcome, counts, st.just(TOKEN), st.just(BOOT), u63, u63),
    st.builds(p.MapSlab, u63, u63),
    st.builds(p.SlabMap, u63, u63, u63, u63, st.integers(1, m.U31_MAX), st.booleans()),
    st.builds(p.Release, st.integers(1, (1 << 63) - 1)),
    st.builds(p.Retired, u63, u63),
    counts.flatmap(lambda total: st.builds(p.Ready, u63, st.integers(0, total), st.just(total))),
    st.builds(p.Refusal, st.sampled_from(sorted(BY_CODE)[1:]), names),
)

plain: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 64) - 1),
        st.floats(),
        st.text(max_size=20),
        st.binary(max_size=40),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=20,
)


@given(u63, st.sampled_from([b"", TOKEN]), requests)
def test_every_request_comes_back_as_it_went_in(request_id: int, token: bytes, request: m.Request) -> None:
    envelope = codec.decode_request(codec.encode_request(request_id, token, request))
    assert envelope == (request_id, token, request.verb, request)
    assert type(envelope.request) is type(request)


@given(u63, replies)
def test_every_reply_comes_back_as_it_went_in(request_id: int, reply: m.Reply) -> None:
    answer = codec.decode_reply(codec.encode_reply(request_id, BOOT, reply))
    assert (answer.request_id, answer.boot_id, answer.code) == (request_id, BOOT, 0)
    assert answer.unwrap(type(reply)) == reply


@given(st.integers(0, m.U63_MAX), packets)
def test_every_packet_comes_back_as_it_went_in(packet_id: int, packet: p.Packet) -> None:
    assert codec.decode_packet(codec.encode_packet(packet_id, packet)) == (packet_id, packet)


@pytest.mark.parametrize("code", [code for code in BY_CODE if code])
def test_every_error_comes_back_as_its_own_class_with_the_request(code: int) -> None:
    payload = codec.encode_error(7, BOOT, BY_CODE[code]("why"))
    answer = codec.decode_reply(payload)
    with pytest.raises(BY_CODE[code], match=r"^why$") as caught:
        answer.unwrap(m.PingReply)
    assert type(caught.value) is BY_CODE[code]
    assert codec.request_id_of(caught.value) == 7


def test_an_error_of_a_newer_daemon_is_still_an_error() -> None:
    payload = msgpack.packb([V, 7, BOOT, 999, "of the future"])
    with pytest.raises(ForebayError, match="of the future"):
        codec.decode_reply(payload).unwrap(m.PingReply)


def test_an_errors_text_is_cut_and_made_sendable() -> None:
    answer = codec.decode_reply(codec.encode_error(1, BOOT, TierFull("\ud800" + "x" * 5000)))
    assert str(answer.error()) == "?" + "x" * 1023


@settings(max_examples=500)
@given(st.binary(max_size=300))
@example(b"")
@example(b"\xc1")
@example(b"\x91" * 100_000 + b"\x01")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xc7\x00\x01")
@example(b"\x95\x02\x01\x07\xc4\x00\x80")
@example(b"\x01\x02")
def test_garbage_only_ever_raises_a_forebay_error(payload: bytes) -> None:
    for decode in (codec.decode_request, codec.decode_reply, codec.decode_packet):
        try:
            decode(payload)
        except ForebayError:
            continue


@settings(max_examples=500)
@given(plain)
def test_any_msgpack_value_only_ever_raises_a_forebay_error(value: Any) -> None:
    payload = msgpack.packb(value)
    for decode in (codec.decode_request, codec.decode_reply, codec.decode_packet):
        try:
            decode(payload)
        except ForebayError:
            continue


@settings(max_examples=500)
@given(requests, st.data())
def test_a_mutated_request_decodes_or_raises_a_forebay_error(request: m.Request, data: st.DataObject) -> None:
    payload = bytearray(codec.encode_request(5, TOKEN, request))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    for candidate in (bytes(payload), bytes(payload[:cut])):
        try:
            codec.decode_request(candidate).request.check()
        except ForebayError:
            continue


@settings(max_examples=300)
@given(st.integers(0, 25), st.lists(plain, max_size=6))
def test_fields_of_any_type_only_ever_raise_a_forebay_error_with_the_request(verb: int, fields: list[Any]) -> None:
    caught = None
    try:
        codec.decode_request(msgpack.packb([V, verb, 42, TOKEN, *fields]))
    except ForebayError as error:
        caught = error
    assert caught is None or codec.request_id_of(caught) == 42


@given(replies, st.lists(plain, max_size=7))
def test_a_reply_of_wrong_fields_is_a_forebay_error(reply: m.Reply, fields: list[Any]) -> None:
    try:
        codec.decode_reply(msgpack.packb([V, 42, BOOT, 0, *fields])).unwrap(type(reply)).check()
    except ForebayError:
        return


def test_another_version_is_told_apart_and_keeps_the_request_id() -> None:
    for version in (V - 1, V + 1):
        with pytest.raises(VersionMismatch) as caught:
            codec.decode_request(msgpack.packb([version, 1, 42, b""]))
        assert codec.request_id_of(caught.value) == 42
        with pytest.raises(VersionMismatch):
            codec.decode_reply(msgpack.packb([version, 1, BOOT, 0]))


def test_an_unknown_verb_keeps_the_request_id() -> None:
    for verb in (0, max(m.Verb) + 1, 1 << 62):
        with pytest.raises(UnknownVerb) as caught:
            codec.decode_request(msgpack.packb([V, verb, 42, TOKEN]))
        assert codec.request_id_of(caught.value) == 42


@pytest.mark.parametrize(
    "parts",
    [
        [V, 1, 0, b""],
        [V, 1, 1 << 63, b""],
        [V, 1, True, b""],
        [V, 1, "1", b""],
        [V, 1, 1, bytes(15)],
        [V, 1, 1, "x" * 16],
        [V, 1, 1],
        [V],
        [],
        [True, 1, 1, b""],
        [2.0, 1, 1, b""],
        [V, True, 1, b""],
        [V, 1, 1, b"", 1],
        {"a": 1},
        {},
        "text",
    ],
)
def test_a_malformed_head_is_a_bad_request(parts: Any) -> None:
    with pytest.raises(BadRequest):
        codec.decode_request(msgpack.packb(parts))


def test_ext_types_are_refused() -> None:
    for ext in (msgpack.ExtType(1, b""), msgpack.ExtType(1, b"x"), msgpack.ExtType(5, bytes(100))):  # noqa: TID251  # refused
        with pytest.raises(BadRequest):
            codec.decode_request(msgpack.packb([V, 1, 1, b"", ext]))


def test_text_that_is_not_utf8_is_a_bad_request() -> None:
    with pytest.raises(BadRequest):
        codec.decode_request(b"\x95\x02\x01\x01\xc4\x00\xa1\xff")


def test_bytes_after_the_message_are_a_bad_request() -> None:
    with pytest.raises(BadRequest):
        codec.decode_request(codec.encode_request(1, b"", m.PingRequest()) + b"\x00")


def test_a_message_over_the_limit_is_refused_by_both_ends() -> None:
    request = m.LookupRequest(1, bytes(3200))
    payload = codec.encode_request(1, TOKEN, request)
    with pytest.raises(BadRequest):
        codec.encode_request(1, TOKEN, request, message_bytes_max=1000)
    with pytest.raises(BadRequest):
        codec.decode_request(payload, message_bytes_max=1000)


def test_a_request_out_of_bounds_never_reaches_the_wire() -> None:
    with pytest.raises(BadRequest):
        codec.encode_request(1, TOKEN, m.ReleaseRequest(0))


def test_the_largest_lookup_fits_a_message() -> None:
    payload = codec.encode_request(m.U63_MAX, TOKEN, m.LookupRequest(m.U63_MAX, bytes(32 * m.HASHES_MAX)))
    assert len(payload) <= m.MESSAGE_BYTES_MAX
    assert isinstance(codec.decode_request(payload).request, m.LookupRequest)


def test_the_largest_commit_and_the_largest_lease_fit_a_message() -> None:
    numbers = bytes(8 * m.HASHES_MAX)
    commit = m.CommitRequest(m.U63_MAX, bytes(4 * m.HASHES_MAX), numbers)
    assert len(codec.encode_request(m.U63_MAX, TOKEN, commit)) <= m.MESSAGE_BYTES_MAX
    lease = m.AcquireReply(m.U63_MAX, numbers, numbers, m.HASHES_MAX, numbers)
    assert len(codec.encode_reply(m.U63_MAX, BOOT, lease)) <= m.MESSAGE_BYTES_MAX


def test_the_bytes_of_a_notice_are_what_they_were() -> None:
    """Written out once, so that no change of the code moves the wire unnoticed."""
    assert codec.encode_packet(0, p.Ready(7, 3, 9)) == bytes.fromhex("9500a57265616479070309")


def test_the_bytes_of_a_ping_are_what_the_page_says() -> None:
    assert codec.encode_request(7, b"", m.PingRequest()) == bytes.fromhex("94030107c400")
    assert codec.encode_reply(7, bytes(16), m.PingReply()) == bytes.fromhex("940307c410" + "00" * 16 + "00")
