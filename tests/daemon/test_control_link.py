"""The command line's link: one request, one answer, and typed errors, against a daemon made of transports alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from forebay.daemon.control_link import ControlLink
from forebay.kvstore.errors import PeerLost, Timeout, UnknownNamespace
from forebay.transports import paths
from forebay.transports.codec import decode_request, encode_error, encode_reply
from forebay.transports.messages import FindNamespaceRequest, PingReply, PingRequest, StatusRequest
from forebay.transports.session import SessionListener, SessionPeer
from forebay.transports.zmq_sockets import ControlServer

BOOT_ID = b"b" * 16


class FakeDaemon:
    """Answers PING, refuses FIND_NAMESPACE, is silent to STATUS; a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.places = paths.prepare(folder)
        self._listener = SessionListener(self.places.session, sessions_max=4)
        self._server = ControlServer(self.places.control)
        self._peers: list[SessionPeer] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._listener.fileno(), zmq.POLLIN)
        poller.register(self._server.socket, zmq.POLLIN)
        while not self._stop.is_set():
            poller.poll(10)
            if (peer := self._listener.accept(time.monotonic())) is not None:
                self._peers.append(peer)
            for peer in self._peers:
                if not peer.token and peer.receive() is not None:
                    peer.welcome(BOOT_ID, 1 << 22, 1 << 16)
            while (message := self._server.receive()) is not None:
                self._answer(*message)

    def _answer(self, identity: bytes, payload: bytes) -> None:
        envelope = decode_request(payload)
        if isinstance(envelope.request, PingRequest):
            self._server.send(identity, encode_reply(envelope.request_id, BOOT_ID, PingReply()))
        elif isinstance(envelope.request, FindNamespaceRequest):
            self._server.send(identity, encode_error(envelope.request_id, BOOT_ID, UnknownNamespace("no such")))

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)
        for peer in self._peers:
            peer.close()
        self._listener.close()
        self._server.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    made = FakeDaemon(tmp_path / "run")
    yield made
    made.close()


def test_an_answer_comes_back_typed(daemon: FakeDaemon) -> None:
    with ControlLink(str(daemon.places.directory), 10.0) as link:
        assert link.boot_id == BOOT_ID
        for _ in range(3):
            assert link.call(PingRequest(), PingReply) == PingReply()


def test_the_daemons_refusal_is_its_own_error(daemon: FakeDaemon) -> None:
    with ControlLink(str(daemon.places.directory), 10.0) as link, pytest.raises(UnknownNamespace, match="no such"):
        link.find_namespace(b"\x01", 0)


def test_silence_is_a_timeout_and_the_next_answer_is_not_mistaken_for_it(daemon: FakeDaemon) -> None:
    with ControlLink(str(daemon.places.directory), 0.2) as link:
        with pytest.raises(Timeout):
            link.call(StatusRequest(), PingReply)
        assert link.call(PingRequest(), PingReply) == PingReply()


def test_without_a_daemon_the_peer_is_lost_at_once(tmp_path: Path) -> None:
    with pytest.raises(PeerLost):
        ControlLink(str(tmp_path), 10.0)


def test_a_daemon_that_goes_away_is_lost_not_slow(daemon: FakeDaemon) -> None:
    with ControlLink(str(daemon.places.directory), 0.2) as link:
        assert link.call(PingRequest(), PingReply) == PingReply()
        daemon.close()
        with pytest.raises(PeerLost):
            link.call(PingRequest(), PingReply)
