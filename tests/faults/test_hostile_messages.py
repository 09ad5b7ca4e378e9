"""Whatever arrives on the sockets, the daemon stays up, honest calls are answered, and its memory does not grow."""

from __future__ import annotations

import os
import random
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import msgpack
import psutil
import pytest
import zmq

from forebay.client import Client
from forebay.daemon.control_link import ControlLink
from forebay.kvstore.errors import Busy, ForebayError
from forebay.transports import messages as m
from forebay.transports.codec import decode_packet, decode_reply, encode_request
from support.actor import SPEC, chain, payload
from support.live import LiveDaemon, eventually

MESSAGES = 100_000
RSS_GROWTH_MAX = 16 << 20


@pytest.fixture(scope="module")
def daemon() -> Iterator[LiveDaemon]:
    with LiveDaemon({"limits.sessions": 64}) as running:
        yield running


def _honest_call_works(daemon: LiveDaemon, seed: int = 1) -> None:
    with Client(daemon.runtime_dir, strict=True) as client:
        ns = client.open_namespace(SPEC)
        client.store(ns, chain(seed, 2), payload(seed, 2))
        assert client.lookup(ns, chain(seed, 2)).blocks == 2


def _requests(token: bytes, rng: random.Random) -> list[bytes]:
    """A well-formed request of every verb, most of them with nonsense for what they name."""
    blob = rng.randbytes(32 * 4)
    made = [
        m.PingRequest(),
        m.OpenNamespaceRequest(SPEC),
        m.FindNamespaceRequest(b"\0", 0),
        m.LookupRequest(1, blob),
        m.AcquireRequest(1, blob, 0),
        m.ResolveRequest(1, rng.getrandbits(62) + 1),
        m.ReleaseRequest(rng.getrandbits(62) + 1),
        m.ReserveRequest(1, b"", blob),
        m.CommitRequest(rng.getrandbits(62) + 1, b"", rng.randbytes(8 * 4)),
        m.AbortRequest(rng.getrandbits(62) + 1),
        m.PinRequest(1, blob),
        m.UnpinRequest(1, blob),
        m.EvictRequest(1, 0, blob, True),
        m.TouchRequest(1, blob),
        m.DoneRequest(1, blob, 0),
        m.PrefetchRequest(1, blob),
        m.PersistRequest(1, blob),
        m.StatusRequest(),
    ]
    return [encode_request(number + 1, token, request) for number, request in enumerate(made)]


def _mutated(message: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return message[: rng.randrange(len(message))]
    if kind == 2:
        return message + rng.randbytes(rng.randrange(1, 50))
    if kind == 3:
        parts = list(msgpack.unpackb(message, strict_map_key=False))
        parts[rng.randrange(len(parts))] = rng.choice([None, -1, 1 << 63, "x", b"", [], [[]], True, 1.5, b"\0" * 65])
        return bytes(msgpack.packb(parts))
    changed = bytearray(message)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def test_100000_random_and_mutated_messages_change_nothing(daemon: LiveDaemon) -> None:
    rng = random.Random(20260101)
    process = psutil.Process(daemon.pid)
    _honest_call_works(daemon)
    with daemon.link() as link, zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"ipc://{daemon.runtime_dir}/control.sock")
        requests = _requests(link.session_token, rng)
        warm = replies = errors = honest = 0
        for number in range(MESSAGES):
            dealer.send(_mutated(rng.choice(requests), rng))
            if number % 64 == 63:
                got, bad = _take(dealer, 64)
                replies, errors = replies + got, errors + bad
            if number % 1000 == 0:
                link.call(m.PingRequest(), m.PingReply)
                honest += 1
            if number == MESSAGES // 10:
                warm = process.memory_info().rss
        growth = process.memory_info().rss - warm
    print(f"{MESSAGES} messages: {replies} replies, {errors} of them errors, {honest} honest calls, RSS {growth:+d} B")
    assert replies == MESSAGES // 64 * 64
    assert honest == MESSAGES // 1000
    assert growth < RSS_GROWTH_MAX
    _honest_call_works(daemon, 2)
    assert daemon.problems() == ()


def _take(dealer: zmq.Socket[bytes], count: int) -> tuple[int, int]:
    """Every message is answered: (replies, errors among them)."""
    errors = 0
    for number in range(count):
        if not dealer.poll(10_000):
            return number, errors
        answer = decode_reply(dealer.recv())
        if answer.code:
            assert isinstance(answer.error(), ForebayError)
            errors += 1
    return count, errors


@pytest.mark.parametrize("frames", [[b""], [b"", b""], [b"", b"x", b"y"], [b"x" * (5 << 20)]], ids=len)
def test_frames_of_another_shape_harm_nobody(daemon: LiveDaemon, frames: list[bytes]) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"ipc://{daemon.runtime_dir}/control.sock")
        dealer.send_multipart(frames)
        if sum(map(len, frames)) < 1 << 20:
            assert dealer.poll(5000), "a message of another shape is not answered"
            assert decode_reply(dealer.recv()).code
        else:
            assert not dealer.poll(200), "a message above the limit was read"
    _honest_call_works(daemon)


def test_foreign_protocol_on_the_session_socket_is_hung_up_on(daemon: LiveDaemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as foreign:
        foreign.settimeout(10)
        foreign.connect(str(daemon.runtime_dir / "session.sock"))
        foreign.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert decode_packet(foreign.recv(4096))[1].kind == "error"
        assert foreign.recv(4096) == b""
    _honest_call_works(daemon)


def test_foreign_protocol_on_the_control_socket_harms_nobody(daemon: LiveDaemon) -> None:
    """libzmq may take it for a very old peer's greeting and wait; what counts is that nobody else does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as foreign:
        foreign.connect(str(daemon.runtime_dir / "control.sock"))
        foreign.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 8)
        _honest_call_works(daemon)
    _honest_call_works(daemon)


def test_client_that_connects_and_says_nothing_is_hung_up_on(daemon: LiveDaemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
        mute.settimeout(10)
        mute.connect(str(daemon.runtime_dir / "session.sock"))
        started = time.monotonic()
        assert mute.recv(4096) == b""
        assert time.monotonic() - started < 9


def test_sessions_beyond_the_limit_are_refused_with_a_code(daemon: LiveDaemon) -> None:
    with ExitStack() as stack:
        refused = 0
        for _ in range(70):
            try:
                stack.enter_context(closing(ControlLink(str(daemon.runtime_dir), 10.0)))
            except Busy:
                refused += 1
        assert refused >= 6
    eventually(lambda: daemon.store()["sessions"] == 0, "the sessions end")
    _honest_call_works(daemon)


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit (util-linux)")
def test_descriptor_flood_does_not_kill_the_daemon() -> None:
    """libzmq aborts its process when accept() meets EMFILE; a flood of mute connections must not get that far."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with LiveDaemon({"limits.sessions": 16}, host_bytes="16MiB", descriptors=1024) as daemon:
            for name, kind in (("control.sock", socket.SOCK_STREAM), ("session.sock", socket.SOCK_SEQPACKET)):
                _flood(str(daemon.runtime_dir / name), kind, 2000)
            eventually(lambda: _answers(daemon), "honest calls work again", within_s=30)
            assert daemon.process is not None
            assert daemon.process.poll() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _flood(path: str, kind: socket.SocketKind, count: int) -> None:
    with ExitStack() as stack:
        for _ in range(count):
            mute = stack.enter_context(socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK))
            try:
                mute.connect(path)
            except (BlockingIOError, FileNotFoundError):  # the queue is full; at the limit the path is hidden
                os.sched_yield()


def _answers(daemon: LiveDaemon) -> bool:
    try:
        _honest_call_works(daemon)
    except ForebayError:
        return False
    return True
