"""The session socket over real UNIX sockets: credentials, descriptors, limits, and the end of either side."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest

from forebay.kvstore.errors import (
    BadRequest,
    Busy,
    Forbidden,
    ForebayError,
    PeerLost,
    TierFull,
    Timeout,
    VersionMismatch,
)
from forebay.transports import session as s
from forebay.transports import shm
from forebay.transports.codec import encode_packet
from forebay.transports.messages import PROTOCOL_VERSION
from forebay.transports.packets import Hello, MapSlab, Ready, Refusal, Retired, SlabMap

BOOT = b"b" * 16
NOW = 1000.0
HELLO = encode_packet(1, Hello(PROTOCOL_VERSION, "test", b""))


def soon() -> float:
    return time.monotonic() + 10


class Daemon:
    """A listener and its peers, each call of `turn` doing what is ready, in the test's own thread."""

    def __init__(self, path: Path, **options: object) -> None:
        self.path = path
        self.listener = s.SessionListener(path, **{"sessions_max": 8, **options})  # type: ignore[arg-type]
        self.peers: list[s.SessionPeer] = []
        self.lost: list[s.SessionPeer] = []
        self.slabs: dict[int, tuple[int, ...]] = {}

    def turn(self) -> None:
        while (peer := self.listener.accept(NOW)) is not None:
            self.peers.append(peer)
        for peer in list(self.peers):
            try:
                while (got := peer.receive()) is not None:
                    self.answer(peer, *got)
            except PeerLost:
                self.drop(peer)
            except ForebayError as error:
                peer.refuse(1, error)
                self.drop(peer)

    def answer(self, peer: s.SessionPeer, packet_id: int, packet: Hello | MapSlab) -> None:
        if isinstance(packet, Hello):
            peer.welcome(BOOT, 1 << 20, 100, packet_id)
        elif packet.slab in self.slabs:
            peer.send(packet_id, SlabMap(packet.ns, packet.slab, 8192, 4096, 2, True), self.slabs[packet.slab])
        else:
            peer.refuse(packet_id, TierFull("no such slab"))

    def drop(self, peer: s.SessionPeer) -> None:
        peer.close()
        self.peers.remove(peer)
        self.lost.append(peer)

    def until(self, done: Callable[[], object]) -> None:
        deadline = soon()
        while not done():
            assert time.monotonic() < deadline
            watched = [self.listener.fileno(), *(peer.fileno() for peer in self.peers)]
            select.select(watched, [], [], 0.02)
            self.turn()

    def connect(self, **options: object) -> s.SessionClient:
        """A client that is welcome: it waits in a thread while this one serves."""
        result: list[s.SessionClient | Exception] = []

        def run() -> None:
            try:
                result.append(s.SessionClient.connect(self.path, "test", deadline=soon(), **options))  # type: ignore[arg-type]
            except ForebayError as error:
                result.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        self.until(lambda: result)
        thread.join()
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    def map(self, client: s.SessionClient, slab: int) -> s.MappedSlab:
        result: list[s.MappedSlab | Exception] = []

        def run() -> None:
            try:
                result.append(client.map_slab(1, slab, soon()))
            except ForebayError as error:
                result.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        self.until(lambda: result)
        thread.join()
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        self.listener.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "session.sock")
    yield made
    made.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def raw(path: Path, *packets: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(path))
    connection.settimeout(10)
    for packet in packets:
        connection.send(packet)
    return connection


def test_a_client_is_welcomed_with_a_token_and_the_daemons_limits(daemon: Daemon) -> None:
    client = daemon.connect(client_group=b"group")
    peer = daemon.peers[0]
    assert client.welcome.session_token == peer.token
    assert (client.welcome.boot_id, client.welcome.max_message_bytes, client.welcome.max_hashes) == (BOOT, 1 << 20, 100)
    assert (peer.uid, peer.pid, peer.gid) == (os.geteuid(), os.getpid(), os.getegid())
    assert peer.hello == Hello(PROTOCOL_VERSION, "test", b"group")
    assert peer.hello_deadline is None
    client.close()


def test_tokens_differ(daemon: Daemon) -> None:
    clients = [daemon.connect() for _ in range(4)]
    assert len({client.welcome.session_token for client in clients}) == 4
    for client in clients:
        client.close()


def test_a_slab_and_its_table_arrive_as_descriptors_that_map(daemon: Daemon) -> None:
    slab = shm.create_memfd("slab", 8192)
    table = shm.GenerationTable(2)
    daemon.slabs[3] = (slab, table.fd)
    client = daemon.connect()
    before = open_fds()
    got = daemon.map(client, 3)
    assert got.shape == SlabMap(1, 3, 8192, 4096, 2, True)
    assert not os.get_inheritable(got.slab_fd)
    with (
        shm.map_received(got.slab_fd, 8192, writable=True) as mine,
        shm.map_shared(slab, 8192, writable=False) as theirs,
    ):
        mine[4096:4101] = b"bytes"
        assert theirs[4096:4101] == b"bytes"
    view = shm.GenerationView(got.table_fd, 2)
    assert table.bump(1) == view.get(1)
    with pytest.raises(PermissionError):
        shm.map_shared(got.table_fd, 4096, writable=True)
    view.close()
    got.close_fds()
    assert open_fds() == before
    client.close()
    os.close(slab)
    table.close()


def test_a_refused_map_is_the_daemons_error(daemon: Daemon) -> None:
    client = daemon.connect()
    with pytest.raises(TierFull, match="no such slab"):
        daemon.map(client, 9)
    client.close()


def test_notices_are_told_in_order_and_do_not_disturb_an_answer(daemon: Daemon) -> None:
    fd = shm.create_memfd("slab", 8192)
    daemon.slabs[1] = (fd, fd)
    client = daemon.connect()
    assert client.poll_events() == []
    daemon.peers[0].send(0, Retired(1, 7))
    daemon.peers[0].send(0, Ready(5, 2, 4))
    daemon.map(client, 1).close_fds()
    daemon.peers[0].send(0, Retired(1, 8))
    daemon.peers[0].send(0, Ready(5, 4, 4))
    assert client.poll_events() == [Retired(1, 7), Ready(5, 2, 4), Retired(1, 8), Ready(5, 4, 4)]
    assert client.poll_events() == []
    client.close()
    os.close(fd)


def test_a_clients_end_is_seen(daemon: Daemon) -> None:
    client = daemon.connect()
    client.close()
    client.close()
    daemon.until(lambda: daemon.lost)
    assert daemon.listener.sessions == 0


def test_a_killed_clients_end_is_seen(daemon: Daemon) -> None:
    program = (
        "import sys, time; from pathlib import Path; from forebay.transports.session import SessionClient\n"
        "c = SessionClient.connect(Path(sys.argv[1]), 'victim', deadline=time.monotonic() + 10)\n"
        "print('up', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(daemon.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as victim:
        daemon.until(lambda: daemon.peers and daemon.peers[0].token)
        assert victim.stdout is not None
        victim.stdout.readline()
        assert daemon.peers[0].pid == victim.pid
        victim.kill()
        daemon.until(lambda: daemon.lost)


def test_the_daemons_end_is_seen_after_the_notices_it_sent(daemon: Daemon) -> None:
    client = daemon.connect()
    daemon.peers[0].send(0, Retired(1, 7))
    daemon.drop(daemon.peers[0])
    assert client.poll_events() == [Retired(1, 7)]
    for _ in range(2):
        with pytest.raises(PeerLost):
            client.poll_events()
    with pytest.raises(PeerLost):
        client.map_slab(1, 1, soon())
    client.close()


@pytest.mark.parametrize("packet", [b"\xc1", msgpack.packb([0, "gossip", 1]), msgpack.packb([0, "ready", 7, 9, 3])])
def test_a_daemon_that_makes_no_sense_is_a_lost_peer(daemon: Daemon, packet: bytes) -> None:
    client = daemon.connect()
    daemon.peers[0].send(0, Retired(1, 7))
    daemon.peers[0]._socket.send(packet)
    assert client.poll_events() == [Retired(1, 7)]
    with pytest.raises(PeerLost):
        client.poll_events()
    client.close()


def test_nobody_listening_is_a_lost_peer(tmp_path: Path) -> None:
    before = open_fds()
    with pytest.raises(PeerLost):
        s.SessionClient.connect(tmp_path / "absent", "test", deadline=soon())
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(stale))
    with pytest.raises(PeerLost):
        s.SessionClient.connect(stale, "test", deadline=soon())
    assert open_fds() == before


def test_a_daemon_that_does_not_answer_costs_the_budget_and_no_more(daemon: Daemon) -> None:
    begun = time.monotonic()
    with pytest.raises(Timeout):
        s.SessionClient.connect(daemon.path, "test", deadline=begun + 0.02)
    client = daemon.connect()
    with pytest.raises(Timeout):
        client.map_slab(1, 1, time.monotonic() + 0.02)
    assert time.monotonic() - begun < 5
    client.close()


def test_an_answer_that_came_too_late_is_thrown_away_with_its_descriptors(daemon: Daemon) -> None:
    fd = shm.create_memfd("slab", 8192)
    daemon.slabs[1] = (fd, fd)
    client = daemon.connect()
    before = open_fds()
    with pytest.raises(Timeout):
        client.map_slab(1, 1, time.monotonic() + 0.001)
    daemon.turn()
    assert daemon.map(client, 1).shape.slab == 1
    assert client.poll_events() == []
    assert open_fds() == before + 2  # the second answer's, not closed here
    client.close()
    os.close(fd)


def test_a_full_daemon_refuses_with_busy(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "session.sock", sessions_max=1)
    first = daemon.connect()
    for _ in range(3):
        with pytest.raises(Busy):
            daemon.connect()
    assert (daemon.listener.sessions, daemon.listener.refused) == (1, 3)
    first.close()
    daemon.until(lambda: daemon.lost)
    daemon.connect().close()
    daemon.close()


def test_another_uid_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == 0 and directory != Path("/tmp") and directory != Path("/"):
            directory.chmod(0o755)
    daemon = Daemon(tmp_path / "session.sock", mode=0o666)
    program = (
        "import os, sys, time; from pathlib import Path; from forebay.transports.session import SessionClient\n"
        "os.setgroups([]); os.setgid(12345); os.setuid(12345)\n"
        "try: SessionClient.connect(Path(sys.argv[1]), 'stranger', deadline=time.monotonic() + 10)\n"
        "except Exception as error: print(type(error).__name__)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(daemon.path)], stdout=subprocess.PIPE) as stranger:
        daemon.until(lambda: stranger.poll() is not None)
        assert stranger.stdout is not None
        assert stranger.stdout.read() == b"Forbidden\n"
    assert (daemon.peers, daemon.listener.refused, daemon.listener.sessions) == ([], 1, 0)
    daemon.close()


def test_an_allowed_uid_is_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: me + 1)
        allowing = Daemon(tmp_path / "a.sock", allowed_uids=[me])
        refusing = Daemon(tmp_path / "b.sock")
    allowing.connect().close()
    with pytest.raises(Forbidden):
        refusing.connect()
    allowing.close()
    refusing.close()


def test_a_mute_client_has_a_deadline(daemon: Daemon) -> None:
    with raw(daemon.path):
        daemon.until(lambda: daemon.peers)
        assert daemon.peers[0].hello_deadline == NOW + s.HELLO_S


def test_another_protocol_version_is_refused_by_name(daemon: Daemon) -> None:
    with raw(daemon.path, encode_packet(1, Hello(PROTOCOL_VERSION + 1, "future", b""))) as client:
        daemon.until(lambda: daemon.lost)
        assert client.recv(4096) == encode_packet(
            1, Refusal(VersionMismatch.code, f"this daemon speaks protocol version {PROTOCOL_VERSION}")
        )
        assert client.recv(4096) == b""


@pytest.mark.parametrize(
    "packets",
    [
        [b"garbage"],
        [b"\x93\x01\xa5hello\x01"],
        [encode_packet(1, MapSlab(1, 1))],
        [HELLO, HELLO],
        [HELLO, encode_packet(0, MapSlab(1, 1))],
        [HELLO, encode_packet(0, Retired(1, 1))],
        [encode_packet(1, Refusal(101, "no"))],
        [b"x" * (70 << 10)],
    ],
)
def test_what_makes_no_sense_ends_the_session_with_bad_request(daemon: Daemon, packets: list[bytes]) -> None:
    with raw(daemon.path, *packets) as client:
        daemon.until(lambda: daemon.lost)
        answers = [client.recv(4096) for _ in packets]
        assert answers[-1].startswith(b"\x94\x01\xa5error" + bytes([BadRequest.code]))


def test_descriptors_that_a_client_sends_are_not_kept(daemon: Daemon) -> None:
    with raw(daemon.path) as client:
        daemon.until(lambda: daemon.peers)
        before = open_fds()
        socket.send_fds(client, [HELLO], [0, 1, 2])
        daemon.until(lambda: daemon.peers[0].token)
        assert open_fds() == before


def test_a_client_that_does_not_read_is_neither_waited_for_nor_read_from(daemon: Daemon) -> None:
    client = daemon.connect()
    peer = daemon.peers[0]
    slabs = 0
    while not peer.wants_write:
        slabs += 1
        peer.send(0, Retired(1, slabs))
    peer.send(0, Retired(1, slabs + 1))
    assert peer.receive() is None
    assert not peer.flush()
    told = client.poll_events()
    while not peer.flush():
        told += client.poll_events()
    told += client.poll_events()
    assert told == [Retired(1, slab) for slab in range(1, slabs + 2)]
    client.close()


def test_what_waits_for_a_client_is_bounded(daemon: Daemon) -> None:
    client = daemon.connect()
    peer = daemon.peers[0]

    def flood() -> None:
        for slab in range(s.OUTBOX_PACKETS_MAX * 10):
            peer.send(0, Retired(1, slab))

    with pytest.raises(Busy):
        flood()
    client.close()


def test_descriptors_that_wait_for_a_client_are_held_and_then_let_go(daemon: Daemon) -> None:
    client = daemon.connect()
    peer = daemon.peers[0]
    while not peer.wants_write:
        peer.send(0, Retired(1, 1))
    before = open_fds()
    fd = shm.create_memfd("slab", 8192)
    peer.send(5, SlabMap(1, 1, 8192, 4096, 2, True), (fd, fd))
    os.close(fd)
    assert open_fds() == before + 2
    peer.close()
    assert open_fds() == before - 1
    client.close()


def test_too_many_descriptors_in_flight_are_busy_and_nothing_waits(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses them while the socket stays writable: whoever waited for it would spin."""
    client = daemon.connect()
    peer = daemon.peers[0]

    def refuse(*_: object) -> None:
        raise OSError(errno.ETOOMANYREFS, "too many references")

    monkeypatch.setattr(s, "_send", refuse)
    with pytest.raises(Busy):
        peer.send(2, SlabMap(1, 1, 8192, 4096, 2, True), (0, 0))
    assert not peer.wants_write
    client.close()


def test_a_forked_child_does_not_keep_the_session_alive(daemon: Daemon) -> None:
    client = daemon.connect()
    held, release = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(release)
        lost = 1 if client.closed else 0
        os.read(held, 1)  # until the parent lets go
        os._exit(40 + lost)
    os.close(held)
    assert not client.closed
    client.close()
    daemon.until(lambda: daemon.lost)  # although the child lives
    os.close(release)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 41


def test_a_live_daemons_path_cannot_be_taken_while_it_holds_the_lock(tmp_path: Path) -> None:
    from forebay.transports import paths

    lock = paths.DaemonLock(tmp_path / "daemon.lock")
    daemon = Daemon(tmp_path / "session.sock")
    with pytest.raises(Busy):
        paths.DaemonLock(tmp_path / "daemon.lock")
    daemon.connect().close()
    daemon.close()
    lock.close()
    assert not daemon.path.exists()


def test_a_dead_daemons_path_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(tmp_path / "session.sock"))
    daemon = Daemon(tmp_path / "session.sock")
    daemon.connect().close()
    daemon.close()


def test_a_listener_out_of_descriptors_hangs_up_instead_of_spinning(tmp_path: Path) -> None:
    program = """
import os, resource, select, socket, sys
from pathlib import Path
from forebay.transports.session import SessionListener
listener = SessionListener(Path(sys.argv[1]), sessions_max=1000)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
clients = []
while True:
    try:
        clients.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        clients[-1].connect(sys.argv[1])
    except OSError:
        break
turns = 0
while select.select([listener], [], [], 0)[0]:
    assert listener.accept(0.0) is None
    turns += 1
    assert turns < 1000
print(listener.refused > 0, turns == listener.refused)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "s")], capture_output=True, timeout=60, text=True
    )
    assert done.stdout == "True True\n", done.stderr
