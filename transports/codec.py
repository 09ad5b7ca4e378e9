"""Records to bytes and back; the only module that touches msgpack.

Unpacking is strict: lengths bounded by what a message of the limit's size can hold, no ext types, no maps, no
hooks, text must be UTF-8, arrays become tuples. Whatever arrives, the only outcome besides a record is a
ForebayError; `request_id_of` then tells which request it was, where that could be read. The packer is shared
by a process: it runs without giving up the GIL, and a new one per message costs as much as the packing.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import msgpack

from forebay.kvstore.errors import BadRequest, ForebayError, UnknownVerb, VersionMismatch, from_code
from forebay.transports.messages import (
    BOOT_ID_BYTES,
    HASHES_MAX,
    MESSAGE_BYTES_MAX,
    PROTOCOL_VERSION,
    REQUESTS,
    TEXT_CHARS_MAX,
    TOKEN_BYTES,
    U63_MAX,
    Reply,
    Request,
    Verb,
    check_int,
    check_text,
)
from forebay.transports.packets import PACKET_BYTES_MAX, PACKETS, Packet

R = TypeVar("R", bound=Reply)

_ARRAY_ITEMS_MAX = HASHES_MAX
_HEAD_BYTES = 64  # more than an array header, a version, a verb and a request id take
_UNPACK_ERRORS = (ValueError, TypeError, RecursionError, msgpack.UnpackException)
_TOKEN_LENGTHS = (0, TOKEN_BYTES)
_BY_NUMBER: dict[int, type[Request]] = {int(verb): request for verb, request in REQUESTS.items()}
_pack = msgpack.Packer(use_bin_type=True, autoreset=True).pack


class Envelope(NamedTuple):
    """A request as it arrived: `request` is checked, `session_token` is 0 or 16 bytes and not yet known good.

    A named tuple, as is Answer: one is made for every message, in half a frozen dataclass's time.
    """

    request_id: int
    session_token: bytes
    verb: Verb
    request: Request


class Answer(NamedTuple):
    """A reply as it arrived: its fields are unchecked until `unwrap` says what they should be."""

    request_id: int
    boot_id: bytes
    code: int
    fields: tuple[Any, ...]

    def unwrap(self, reply_type: type[R]) -> R:
        """The checked reply; raises the error the daemon answered with, or BadRequest when it makes no sense."""
        if self.code:
            raise self.error()
        return reply_type.from_fields(self.fields)

    def error(self) -> ForebayError:
        """The error this answer stands for; only of use when `code` is not 0."""
        text = self.fields[0] if self.fields else ""
        return _with_id(from_code(self.code, text if type(text) is str else ""), self.request_id)


def request_id_of(error: ForebayError) -> int:
    """The request that raised a decoding error; 0 when it could not be read."""
    request_id: int = vars(error).get("request_id", 0)
    return request_id


def encode_request(
    request_id: int, session_token: bytes, request: Request, message_bytes_max: int = MESSAGE_BYTES_MAX
) -> bytes:
    """A request's payload; raises BadRequest when a field or the whole is out of bounds."""
    request.check()
    payload: bytes = _pack((PROTOCOL_VERSION, request.verb, request_id, session_token, *request.to_fields()))
    if len(payload) > message_bytes_max:
        raise BadRequest(f"a message of {len(payload)} bytes; the limit is {message_bytes_max}")
    return payload


def decode_request(payload: bytes, message_bytes_max: int = MESSAGE_BYTES_MAX) -> Envelope:
    """A checked request of untrusted bytes; raises BadRequest, VersionMismatch or UnknownVerb (`request_id_of`)."""
    try:
        return _envelope(_unpack(payload, message_bytes_max))
    except ForebayError as error:
        raise _with_id(error, _readable_id(payload)) from None


def encode_reply(request_id: int, boot_id: bytes, reply: Reply) -> bytes:
    """A reply's payload; its bounds are checked by who reads it."""
    payload: bytes = _pack((PROTOCOL_VERSION, request_id, boot_id, 0, *reply.to_fields()))
    return payload


def encode_error(request_id: int, boot_id: bytes, error: ForebayError) -> bytes:
    """The payload of an error reply: the stable code and at most 1 024 characters of text."""
    payload: bytes = _pack((PROTOCOL_VERSION, request_id, boot_id, error.code, _sendable(str(error))))
    return payload


def decode_reply(payload: bytes, message_bytes_max: int = MESSAGE_BYTES_MAX) -> Answer:
    """An answer of untrusted bytes; raises BadRequest or VersionMismatch."""
    parts = _unpack(payload, message_bytes_max)
    if not parts or parts[0] != PROTOCOL_VERSION or type(parts[0]) is not int:
        raise VersionMismatch("the daemon speaks another protocol version")
    if len(parts) < 4:
        raise BadRequest("a reply has at least 4 fields")
    _, request_id, boot_id, code = parts[:4]
    check_int("request_id", request_id, 0, U63_MAX)
    if type(boot_id) is not bytes or len(boot_id) != BOOT_ID_BYTES:
        raise BadRequest(f"boot_id must be {BOOT_ID_BYTES} bytes")
    check_int("code", code, 0, U63_MAX)
    if code:
        check_text("text", parts[4] if len(parts) > 4 else None, TEXT_CHARS_MAX)
    return Answer(request_id, boot_id, code, parts[4:])


def encode_packet(packet_id: int, packet: Packet) -> bytes:
    """A session packet's bytes; raises BadRequest when a field is out of bounds."""
    packet.check()
    payload: bytes = _pack((packet_id, packet.kind, *packet.to_fields()))
    return payload


def decode_packet(payload: bytes) -> tuple[int, Packet]:
    """Packet id and checked packet of untrusted bytes; raises BadRequest (`request_id_of`)."""
    parts = _unpack(payload, PACKET_BYTES_MAX)
    if len(parts) < 2:
        raise BadRequest("a packet has at least 2 fields")
    packet_id, kind, *fields = parts
    check_int("packet id", packet_id, 0, U63_MAX)
    packet_type = PACKETS.get(kind) if type(kind) is str else None
    try:
        if packet_type is None:
            raise BadRequest("no such packet")
        return packet_id, packet_type.from_fields(fields)
    except BadRequest as error:
        raise _with_id(error, packet_id) from None


def _envelope(parts: tuple[Any, ...]) -> Envelope:
    if not parts or type(parts[0]) is not int:
        raise BadRequest("a request begins with the protocol version")
    if parts[0] != PROTOCOL_VERSION:
        raise VersionMismatch(f"this daemon speaks protocol version {PROTOCOL_VERSION}, not {parts[0]}")
    if len(parts) < 4:
        raise BadRequest("a request has at least 4 fields")
    _, number, request_id, token = parts[:4]
    check_int("request_id", request_id, 1, U63_MAX)
    if type(token) is not bytes or len(token) not in _TOKEN_LENGTHS:
        raise BadRequest(f"session_token must be 0 or {TOKEN_BYTES} bytes")
    check_int("verb", number, 0, U63_MAX)
    request_type = _BY_NUMBER.get(number)
    if request_type is None:
        raise UnknownVerb(f"no verb {number} in protocol version {PROTOCOL_VERSION}")
    return Envelope(request_id, token, request_type.verb, request_type.from_fields(parts[4:]))


def _unpack(payload: bytes, bytes_max: int) -> tuple[Any, ...]:
    if len(payload) > bytes_max:
        raise BadRequest(f"a message of {len(payload)} bytes; the limit is {bytes_max}")
    try:
        parts = msgpack.unpackb(
            payload,
            raw=False,
            use_list=False,
            strict_map_key=True,
            ext_hook=_refuse_ext,
            max_str_len=bytes_max,
            max_bin_len=bytes_max,
            max_array_len=_ARRAY_ITEMS_MAX,
            max_map_len=0,
            max_ext_len=0,
        )
    except _UNPACK_ERRORS as error:
        raise BadRequest(f"not a message: {type(error).__name__}") from None
    if type(parts) is not tuple:
        raise BadRequest("a message is one array")
    return parts


def _refuse_ext(code: int, data: bytes) -> None:
    raise ValueError(f"ext type {code} of {len(data)} bytes")


def _readable_id(payload: bytes) -> int:
    """The request id in a message that may make no sense after it; 0 when there is none to be read."""
    unpacker = msgpack.Unpacker(
        max_buffer_size=_HEAD_BYTES, max_ext_len=0, max_map_len=0, max_array_len=_ARRAY_ITEMS_MAX
    )
    try:
        unpacker.feed(payload[:_HEAD_BYTES])
        if unpacker.read_array_header() < 3:
            return 0
        _, _, request_id = (unpacker.unpack() for _ in range(3))
    except _UNPACK_ERRORS:
        return 0
    return request_id if type(request_id) is int and 1 <= request_id <= U63_MAX else 0


def _with_id(error: ForebayError, request_id: int) -> ForebayError:
    vars(error)["request_id"] = request_id
    return error


def _sendable(text: str) -> str:
    return text[:TEXT_CHARS_MAX].encode("utf-8", "replace").decode()
