"""The control sockets over real ipc: deadlines, lost peers, foreign frames, and floods of connections."""

from __future__ import annotations

import itertools
import os
import random
import resource
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from forebay.kvstore.errors import BadRequest, Busy
from forebay.transports import zmq_sockets as z


def soon() -> float:
    return time.monotonic() + 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def server(path: Path) -> Iterator[z.ControlServer]:
    made = z.ControlServer(path)
    yield made
    made.close()


@pytest.fixture
def client(path: Path) -> Iterator[z.ControlClient]:
    made = z.ControlClient(path)
    yield made
    made.close()


def request(server: z.ControlServer) -> tuple[bytes, bytes]:
    """The next request, within ten seconds."""
    deadline = soon()
    while (got := server.wait(100)) is None:
        assert time.monotonic() < deadline
    return got


def until(server: z.ControlServer, done: Callable[[], object]) -> None:
    deadline = soon()
    while not done():
        assert time.monotonic() < deadline
        select.select([server.monitor_fd], [], [], 0.02)
        server.watch()


def echo(server: z.ControlServer, client: z.ControlClient, payload: bytes = b"ping") -> bytes | None:
    assert client.send(payload, soon())
    identity, got = request(server)
    assert server.send(identity, got)
    return client.receive(soon())


def foreign(path: Path, **options: int) -> zmq.Socket[bytes]:
    """A DEALER of somebody else's making."""
    made: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    made.setsockopt(zmq.LINGER, 0)
    made.connect(f"ipc://{path}")
    return made


def flood(path: Path, count: int) -> list[socket.socket]:
    """Connections that say nothing, as many of `count` as the kernel takes."""
    mute = []
    for _ in range(count):
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            connection.connect(str(path))
        except OSError:  # the queue is full, or the path is hidden
            connection.close()
        else:
            mute.append(connection)
    return mute


def open_fds(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_request_and_its_reply_pass(server: z.ControlServer, client: z.ControlClient) -> None:
    assert echo(server, client) == b"ping"
    assert echo(server, client, bytes(1 << 20)) == bytes(1 << 20)


def test_the_socket_is_private(server: z.ControlServer, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_server_with_nothing_to_receive_does_not_wait(server: z.ControlServer) -> None:
    assert server.receive() is None
    assert server.wait(10) is None


def test_replies_find_the_client_that_asked(server: z.ControlServer, path: Path) -> None:
    clients = [z.ControlClient(path) for _ in range(5)]
    for number, client in enumerate(clients):
        assert client.send(b"%d" % number, soon())
    for _ in clients:
        identity, payload = request(server)
        server.send(identity, payload)
    assert [client.receive(soon()) for client in clients] == [b"%d" % number for number in range(5)]
    for client in clients:
        client.close()


def test_a_call_without_a_daemon_ends_at_its_deadline(tmp_path: Path) -> None:
    client = z.ControlClient(tmp_path / "absent")
    begun = time.monotonic()
    assert not client.send(b"x")
    assert not client.send(b"x", begun + 0.02)
    assert not client.send(b"x", begun)
    assert client.receive(begun + 0.03) is None
    assert client.receive(begun) is None
    assert client.receive_now() is None
    assert time.monotonic() - begun < 5
    client.close()


def test_a_daemon_that_does_not_answer_costs_the_deadline_and_no_more(
    server: z.ControlServer, client: z.ControlClient
) -> None:
    assert client.send(b"x", soon())
    begun = time.monotonic()
    assert client.receive(begun + 0.02) is None
    assert 0.019 < time.monotonic() - begun < 5


def test_requests_before_the_daemon_are_not_delivered_to_it_late(path: Path) -> None:
    client = z.ControlClient(path)
    assert not client.send(b"early")
    server = z.ControlServer(path)
    assert client.send(b"in time", soon())
    assert request(server)[1] == b"in time"
    client.close()
    server.close()


def test_a_client_reconnects_to_a_restarted_daemon(path: Path, client: z.ControlClient) -> None:
    for _ in range(3):
        server = z.ControlServer(path)
        assert echo(server, client) == b"ping"
        server.close()
        assert not path.exists()
        while client.send(b"to nobody"):  # until libzmq has noticed
            assert client.receive(time.monotonic() + 0.01) is None


def test_a_reply_to_a_client_that_has_gone_is_dropped_and_counted(server: z.ControlServer, path: Path) -> None:
    client = z.ControlClient(path)
    assert client.send(b"x", soon())
    identity, _ = request(server)
    client.close()
    until(server, lambda: server.connections == 0)
    deadline = soon()
    while server.send(identity, b"reply"):  # until the ROUTER has heard, too
        assert time.monotonic() < deadline
        server.receive()
    assert server.dropped == 1
    assert not server.send(b"never seen", b"reply")
    assert server.dropped == 2


def test_replies_to_a_client_that_does_not_read_are_dropped_never_waited_for(
    server: z.ControlServer, path: Path
) -> None:
    slow = foreign(path)
    slow.send(b"x")
    identity, _ = request(server)
    sent = 0
    while server.send(identity, bytes(1 << 16)):
        sent += 1
        assert sent < 10_000
    assert server.dropped == 1
    other = z.ControlClient(path)
    assert echo(server, other) == b"ping"
    other.close()
    slow.close()


def test_requests_of_a_client_are_bounded_while_the_daemon_is_busy(
    server: z.ControlServer, client: z.ControlClient
) -> None:
    assert echo(server, client) == b"ping"
    sent = 0
    while client.send(bytes(1 << 16)):
        sent += 1
        assert sent < 10_000


@pytest.mark.parametrize(
    ("frames", "payload"),
    [([b""], b""), ([b"a", b"b"], b""), ([b"", b"ping"], b""), ([b"x"] * 50, b""), ([b"one"], b"one")],
)
def test_a_message_of_other_frames_comes_with_an_empty_payload(
    server: z.ControlServer, path: Path, client: z.ControlClient, frames: list[bytes], payload: bytes
) -> None:
    other = foreign(path)
    other.send_multipart(frames)
    identity, got = request(server)
    assert got == payload
    assert server.send(identity, b"answer")
    assert other.poll(10_000)
    assert other.recv() == b"answer"
    assert echo(server, client) == b"ping"  # the frames of the next message are its own
    other.close()


def test_an_oversized_message_costs_its_sender_the_connection_and_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    server = z.ControlServer(path, message_bytes_max=1000)
    honest, greedy = z.ControlClient(path), z.ControlClient(path)
    assert echo(server, honest, bytes(1000)) == bytes(1000)
    assert echo(server, greedy) == b"ping"
    assert greedy.send(bytes(1001), soon())
    assert server.wait(50) is None
    assert echo(server, honest) == b"ping"
    deadline = soon()
    while not greedy.send(b"again", time.monotonic() + 1):
        assert time.monotonic() < deadline
    honest.close()
    greedy.close()
    server.close()


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        b"\xff" * 64,
        b"\xff",
        *(random.Random(n).randbytes(4096) for n in range(8)),
    ],
    ids=itertools.count(),
)
def test_foreign_protocols_do_not_disturb(
    server: z.ControlServer, path: Path, client: z.ControlClient, noise: bytes
) -> None:
    assert echo(server, client) == b"ping"
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(path))
        stranger.send(noise)
        assert client.send(b"honest", soon())
        deadline = soon()
        while (reply := client.receive_now()) is None:  # noise may look like a message of the oldest protocol
            assert time.monotonic() < deadline
            if (got := server.wait(10)) is not None:
                server.send(*got)
        assert reply == b"honest"


def test_a_path_too_long_is_said_to_be_so(tmp_path: Path) -> None:
    for make in (z.ControlServer, z.ControlClient):
        with pytest.raises(BadRequest, match="shorter runtime directory"):
            make(tmp_path / ("x" * 110))


def test_closing_is_quick_and_may_be_repeated(path: Path) -> None:
    server, client = z.ControlServer(path), z.ControlClient(path)
    assert client.send(bytes(1 << 20), soon())
    server.send(request(server)[0], bytes(1 << 20))
    begun = time.monotonic()
    for end in (server, client, server, client):
        end.close()
    assert time.monotonic() - begun < 5


def test_a_forked_child_can_close_its_copy_without_harm(server: z.ControlServer, client: z.ControlClient) -> None:
    assert echo(server, client) == b"ping"
    child = os.fork()
    if child == 0:
        client.close()
        os._exit(42)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert echo(server, client) == b"ping"


def test_the_signalling_descriptor_tells_of_a_reply(server: z.ControlServer, client: z.ControlClient) -> None:
    assert client.send(b"x", soon())
    identity, payload = request(server)
    assert client.receive_now() is None
    server.send(identity, payload)
    deadline = soon()
    while (got := client.receive_now()) is None:
        assert time.monotonic() < deadline
        select.select([client.fileno()], [], [], 10)
    assert got == b"x"


# --- the bell -----------------------------------------------------------------------------------------------


def test_waiting_ends_when_something_else_becomes_ready(path: Path) -> None:
    server = z.ControlServer(path)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    epoll = select.epoll()
    epoll.register(event, select.EPOLLIN)
    server.ring_on(epoll.fileno())
    for _ in range(50):
        os.eventfd_write(event, 1)
        begun = time.monotonic()
        assert server.wait(20_000) is None
        assert time.monotonic() - begun < 10
        while epoll.poll(0):
            os.eventfd_read(event)
    server.close()
    epoll.close()
    os.close(event)


def test_connections_ring_and_requests_pass_beside_the_bell(path: Path) -> None:
    server = z.ControlServer(path)
    epoll = select.epoll()
    epoll.register(server.monitor_fd, select.EPOLLIN)
    server.ring_on(epoll.fileno())
    client = z.ControlClient(path)
    deadline = soon()
    while server.connections == 0:
        assert time.monotonic() < deadline
        server.wait(20_000)
        while epoll.poll(0):
            server.watch()
    assert echo(server, client) == b"ping"
    client.close()
    server.close()
    epoll.close()


def test_the_bell_is_not_to_be_rung_from_outside(path: Path) -> None:
    server = z.ControlServer(path)
    epoll = select.epoll()
    server.ring_on(epoll.fileno())
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.setsockopt(zmq.ROUTING_ID, b"bell" + bytes(12))
    stranger.connect(f"ipc://{path}")
    stranger.send(b"ring")
    assert request(server)[1] == b"ring"
    stranger.close()
    server.close()
    epoll.close()


# --- descriptors --------------------------------------------------------------------------------------------


def test_connections_are_counted(server: z.ControlServer, path: Path) -> None:
    clients = [foreign(path) for _ in range(5)]
    until(server, lambda: server.connections == 5)
    for client in clients:
        client.close()
    until(server, lambda: server.connections == 0)


def test_mute_connections_are_closed(server: z.ControlServer, path: Path) -> None:
    mute = flood(path, 10)
    until(server, lambda: server.connections == 10)
    until(server, lambda: server.connections == 0)
    for connection in mute:
        connection.close()


def test_at_the_limit_newcomers_find_no_path_and_old_clients_are_served(path: Path) -> None:
    server = z.ControlServer(path, connections_max=4)
    old = z.ControlClient(path)
    assert echo(server, old) == b"ping"
    others = [foreign(path) for _ in range(3)]
    until(server, lambda: not server.listening)
    assert not path.exists()
    newcomer = z.ControlClient(path)
    assert not newcomer.send(b"x", time.monotonic() + 0.05)
    assert echo(server, old) == b"ping"
    for other in others:
        other.close()
    until(server, lambda: server.listening)
    assert echo(server, newcomer) == b"ping"
    old.close()
    newcomer.close()
    server.close()
    assert list(path.parent.iterdir()) == []


def test_a_full_server_removes_its_hidden_path_when_it_closes(path: Path) -> None:
    server = z.ControlServer(path, connections_max=1)
    client = foreign(path)
    until(server, lambda: not server.listening)
    server.close()
    client.close()
    assert list(path.parent.iterdir()) == []


def test_libzmq_cannot_run_ahead_of_the_guard(path: Path) -> None:
    """Nobody watches, and still no more is accepted than the limit leaves room for."""
    lookahead = z.connections_within(1024, 0)
    assert lookahead + z._LOOKAHEAD == 1024
    server = z.ControlServer(path)
    before = open_fds()
    mute: list[socket.socket] = []
    idle_since = time.monotonic()
    while time.monotonic() < idle_since + 0.5 and len(mute) < 1500:  # until nothing is accepted for a while
        more = flood(path, 50)
        mute += more
        idle_since = time.monotonic() if more else idle_since
    accepted = open_fds() - before - len(mute)
    assert 100 < accepted <= z._LOOKAHEAD
    until(server, lambda: server.connections > 100)  # and it goes on when somebody watches
    until(server, lambda: server.connections == 0)
    for connection in mute:
        connection.close()
    client = z.ControlClient(path)
    assert echo(server, client) == b"ping"
    client.close()
    server.close()


def test_too_low_a_limit_is_refused_with_the_number_needed() -> None:
    with pytest.raises(Busy, match="256 open files are too few, 715 are needed"):
        z.connections_within(256, 64)
    assert z.connections_within(1 << 20, 5000) == z.CONNECTIONS_MAX


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 512), hard))
    try:
        assert z.raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


FLOODED = """
import resource, select, sys
from pathlib import Path
from forebay.transports.zmq_sockets import ControlServer, connections_within, raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024))
server = ControlServer(Path(sys.argv[1]), connections_max=connections_within(raise_descriptor_limit(), 64))
epoll = select.epoll()
epoll.register(server.monitor_fd, select.EPOLLIN)
server.ring_on(epoll.fileno())
print("up", flush=True)
while True:
    request = server.wait(1000)
    if request is not None:
        server.send(*request)
    while epoll.poll(0):
        server.watch()
"""


def test_a_flood_of_mute_connections_does_not_kill_a_daemon_of_1024_descriptors(path: Path) -> None:
    """libzmq alone aborts its process here: `Too many open files (src/ipc_listener.cpp)`."""
    with subprocess.Popen([sys.executable, "-c", FLOODED, str(path)], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"up\n"
        old, newcomer = z.ControlClient(path), z.ControlClient(path)
        assert old.send(b"before", soon())
        assert old.receive(soon()) == b"before"
        mute: list[socket.socket] = []
        deadline = soon()
        while path.exists() and len(mute) < 2000:
            assert time.monotonic() < deadline
            mute += flood(path, 100)
        assert old.send(b"during", soon())
        assert old.receive(soon()) == b"during"
        assert open_fds(daemon.pid) < 1024
        for connection in mute:
            connection.close()
        assert newcomer.send(b"after", soon())
        assert newcomer.receive(soon()) == b"after"
        assert daemon.poll() is None
        old.close()
        newcomer.close()
        daemon.kill()
