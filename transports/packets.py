"""What travels on the session socket: one frozen record per packet, with its bounds.

The session socket carries little and rarely: a greeting, slabs to map (their file descriptors ride beside the
packet), and notices: a slab was taken back, more blocks of a lease have been read. The packet's kind is a word,
not a number, so that a trace reads by itself; speed does not matter here. No packet carries a list, so each is
small whatever it tells of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from forebay.transports.messages import (
    BOOT_ID_BYTES,
    HASHES_MAX,
    TEXT_CHARS_MAX,
    TOKEN_BYTES,
    U31_MAX,
    U63_MAX,
    Record,
    check_bool,
    check_bytes,
    check_exact,
    check_int,
    check_text,
)

PACKET_BYTES_MAX = 64 << 10
CLIENT_NAME_CHARS_MAX = 128
CLIENT_GROUP_BYTES_MAX = 32
FDS_MAX = 2


@dataclass(frozen=True, slots=True)
class Packet(Record):
    """A record of the session socket; `kind` is the word after the packet id."""

    kind: ClassVar[str]


@dataclass(frozen=True, slots=True)
class Hello(Packet):
    """A client's first packet; an empty group means one of its own."""

    kind = "hello"
    protocol_version: int
    client_name: str
    client_group: bytes = b""

    def check(self) -> None:
        check_int("protocol_version", self.protocol_version, 0, U31_MAX)
        check_text("client_name", self.client_name, CLIENT_NAME_CHARS_MAX)
        check_bytes("client_group", self.client_group, CLIENT_GROUP_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Welcome(Packet):
    """The daemon's answer: the token that names the session in requests, and the daemon's limits."""

    kind = "welcome"
    protocol_version: int
    session_token: bytes
    boot_id: bytes
    max_message_bytes: int
    max_hashes: int

    def check(self) -> None:
        check_int("protocol_version", self.protocol_version, 0, U31_MAX)
        check_exact("session_token", self.session_token, TOKEN_BYTES)
        check_exact("boot_id", self.boot_id, BOOT_ID_BYTES)
        check_int("max_message_bytes", self.max_message_bytes, 1, U63_MAX)
        check_int("max_hashes", self.max_hashes, 1, U63_MAX)


@dataclass(frozen=True, slots=True)
class MapSlab(Packet):
    """A client asks for one slab's file descriptors."""

    kind = "map"
    ns: int
    slab: int

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_int("slab", self.slab, 0, U63_MAX)


@dataclass(frozen=True, slots=True)
class SlabMap(Packet):
    """The answer to a MapSlab, with two descriptors beside it: the slab, its generation table."""

    kind = "slab"
    ns: int
    slab: int
    slab_bytes: int
    slot_bytes: int
    slots: int
    writable: bool

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_int("slab", self.slab, 0, U63_MAX)
        check_int("slab_bytes", self.slab_bytes, 1, U63_MAX)
        check_int("slot_bytes", self.slot_bytes, 1, U63_MAX)
        check_int("slots", self.slots, 1, U31_MAX)
        check_bool("writable", self.writable)


@dataclass(frozen=True, slots=True)
class Release(Packet):
    """A client's notice (packet id 0): the lease is over. As RELEASE on the control socket, without a reply.

    A send on this socket costs a tenth of one on the other, whose threads have to be woken first.
    """

    kind = "release"
    lease: int

    def check(self) -> None:
        check_int("lease", self.lease, 1, U63_MAX)


@dataclass(frozen=True, slots=True)
class Retired(Packet):
    """A notice (packet id 0): the slab was taken back; drop the mapping."""

    kind = "retired"
    ns: int
    slab: int

    def check(self) -> None:
        check_int("ns", self.ns, 1, U63_MAX)
        check_int("slab", self.slab, 0, U63_MAX)


@dataclass(frozen=True, slots=True)
class Ready(Packet):
    """A notice (packet id 0): how far a lease's blocks have been read into their slots.

    The leading `ready` blocks may be copied; blocks from `total` on will not come, because their load failed. It is
    the last notice of its lease when the two are equal.
    """

    kind = "ready"
    lease: int
    ready: int
    total: int

    def check(self) -> None:
        check_int("lease", self.lease, 1, U63_MAX)
        check_int("total", self.total, 0, HASHES_MAX)
        check_int("ready", self.ready, 0, self.total)


@dataclass(frozen=True, slots=True)
class Refusal(Packet):
    """An error with its stable code."""

    kind = "error"
    code: int
    text: str

    def check(self) -> None:
        check_int("code", self.code, 1, U31_MAX)
        check_text("text", self.text, TEXT_CHARS_MAX)


PACKETS: dict[str, type[Packet]] = {
    packet.kind: packet for packet in (Hello, Welcome, MapSlab, SlabMap, Release, Retired, Ready, Refusal)
}
