"""Session packets keep within what the socket and the page promise."""

from __future__ import annotations

from forebay.transports import packets
from forebay.transports.codec import encode_packet


def test_the_largest_packet_of_every_kind_fits_the_limit() -> None:
    largest = [
        packets.Hello(1, "\U0001f30a" * packets.CLIENT_NAME_CHARS_MAX, bytes(32)),
        packets.Welcome(1, bytes(16), bytes(16), (1 << 63) - 1, (1 << 63) - 1),
        packets.MapSlab((1 << 63) - 1, (1 << 63) - 1),
        packets.SlabMap((1 << 63) - 1, 0, (1 << 63) - 1, (1 << 63) - 1, (1 << 31) - 1, True),
        packets.Release((1 << 63) - 1),
        packets.Retired((1 << 63) - 1, (1 << 63) - 1),
        packets.Ready((1 << 63) - 1, 1 << 16, 1 << 16),
        packets.Refusal(401, "\U0001f30a" * 1024),
    ]
    assert {type(packet) for packet in largest} == set(packets.PACKETS.values())
    assert all(len(encode_packet((1 << 63) - 1, packet)) <= packets.PACKET_BYTES_MAX for packet in largest)


def test_a_notice_is_small_whatever_it_tells_of() -> None:
    """They come by the hundred, and wait in the daemon for clients that do not read."""
    for notice in (packets.Ready((1 << 63) - 1, 1 << 16, 1 << 16), packets.Retired((1 << 63) - 1, (1 << 63) - 1)):
        assert len(encode_packet(0, notice)) <= 64


def test_the_kinds_are_what_third_parties_were_told() -> None:
    assert set(packets.PACKETS) == {"hello", "welcome", "map", "slab", "release", "retired", "ready", "error"}
