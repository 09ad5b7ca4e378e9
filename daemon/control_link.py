"""The command line's connection to a daemon: a session, a control socket, one request at a time.

Built on transports alone, because the daemon and the client never import each other. An operator's tool wants
what an engine does not: typed errors at once, no breaker, no retries, no segments.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self, TypeVar

from forebay.kvstore.errors import Timeout
from forebay.transports import paths
from forebay.transports.codec import decode_reply, encode_request
from forebay.transports.messages import FindNamespaceReply, FindNamespaceRequest, Reply, Request
from forebay.transports.session import SessionClient
from forebay.transports.zmq_sockets import ControlClient

R = TypeVar("R", bound=Reply)

CLIENT_NAME = "forebay command line"


class ControlLink:
    """Attached to one daemon until closed; for one thread. Every call blocks, at most ``timeout_s``.

    Raises on opening: PeerLost (no daemon there), Timeout, Forbidden, Busy, VersionMismatch.
    """

    def __init__(self, runtime_dir: str | None, timeout_s: float) -> None:
        self.paths = paths.find(runtime_dir)
        self._timeout_s = timeout_s
        self._last_id = 0
        deadline = time.monotonic() + timeout_s
        self._session = SessionClient.connect(self.paths.session, CLIENT_NAME, deadline=deadline)
        self._control = ControlClient(self.paths.control)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def boot_id(self) -> bytes:
        """Names this run of the daemon."""
        return self._session.welcome.boot_id

    @property
    def session_token(self) -> bytes:
        """Names this session in requests."""
        return self._session.welcome.session_token

    def call(self, request: Request, reply_type: type[R]) -> R:
        """One round trip. Raises PeerLost, Timeout, or the error the daemon answered with."""
        deadline = time.monotonic() + self._timeout_s
        self._last_id += 1
        payload = encode_request(self._last_id, self.session_token, request)
        if not self._control.send(payload, deadline):
            self._session.poll_events()  # raises PeerLost when the daemon is gone
            raise Timeout(f"nobody reads {self.paths.control}")
        while True:
            received = self._control.receive(deadline)
            if received is None:
                self._session.poll_events()
                raise Timeout(f"no answer within {self._timeout_s:g} s")
            answer = decode_reply(received)
            if answer.request_id == self._last_id:
                return answer.unwrap(reply_type)

    def find_namespace(self, fingerprint_prefix: bytes, rank: int) -> FindNamespaceReply:
        """The namespace shard whose group fingerprint begins so. Raises UnknownNamespace."""
        return self.call(FindNamespaceRequest(fingerprint_prefix, rank), FindNamespaceReply)

    def close(self) -> None:
        """End the session; idempotent."""
        self._control.close()
        self._session.close()
