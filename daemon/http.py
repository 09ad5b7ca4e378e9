"""/metrics, /livez, /readyz and /healthz for the machine's own tools: a loopback port or a UNIX socket.

asyncio on a thread of its own: a connection that dawdles costs a slot, not a thread, and is dropped at its deadline or
when the slots are needed. The owner thread is never waited for without a bound: it is asked for a snapshot through a
callable with a time-out, by one thread at a time, and simultaneous scrapes share the answer. Rejected: the standard
library's ThreadingHTTPServer (a thread per connection, time-outs per read and so none in total) and a web framework.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus

from forebay.daemon import status
from forebay.daemon.logging import fields
from forebay.daemon.settings import Listen
from forebay.daemon.status import DaemonSnapshot
from forebay.transports.threads import BackgroundThread

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
HEAD_BYTES_MAX = 8192
READ_S = 2.0
WRITE_S = 5.0
SNAPSHOT_S = 1.0
PATHS = ("/metrics", "/livez", "/readyz", "/healthz")
TEXT = "text/plain; charset=utf-8"
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer, before it is bytes."""

    code: HTTPStatus
    body: bytes
    content_type: str = TEXT

    def encode(self, *, head_only: bool) -> bytes:
        lines = [
            f"HTTP/1.1 {self.code.value} {self.code.phrase}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Connection: close",
        ]
        if self.code is HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append("Allow: GET, HEAD")
        return "\r\n".join([*lines, "", ""]).encode() + (b"" if head_only else self.body)


def _say(code: HTTPStatus, text: str) -> Answer:
    return Answer(code, text.encode() + b"\n")


class HttpServer:
    """The endpoint. ``start`` binds in the caller (OSError there) and serves on a thread; ``close`` ends it.

    Args:
        listen: where; ``kind == "off"`` makes ``start`` and ``close`` do nothing.
        snapshot: called on a thread of this server with seconds to wait; None when the owner did not answer in time.
        heartbeat: seconds since the owner loop last turned; called on the server's thread, must not block.
        stalled_s: heartbeat age at which /livez fails; may be set later (SIGHUP).
    """

    def __init__(
        self,
        listen: Listen,
        snapshot: Callable[[float], DaemonSnapshot | None],
        heartbeat: Callable[[], float],
        stalled_s: float,
        *,
        read_s: float = READ_S,
        snapshot_s: float = SNAPSHOT_S,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self.stalled_s = stalled_s
        self._listen = listen
        self._take = snapshot
        self._heartbeat = heartbeat
        self._read_s = read_s
        self._snapshot_s = snapshot_s
        self._connections_max = connections_max
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._open: dict[asyncio.Task[None], None] = {}
        self._pending: asyncio.Future[DaemonSnapshot | None] | None = None
        self._pool: ThreadPoolExecutor | None = None

    @property
    def address(self) -> str:
        """Where it listens, as metrics.listen would say it, with the real port; "off" before start and without one."""
        if self._socket is None:
            return "off"
        if self._listen.kind == "unix":
            return f"unix:{self._listen.path}"
        host, port = self._socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def start(self) -> None:
        """Bind and serve. Raises OSError with the address in it."""
        if self._listen.kind == "off":
            return
        self._socket = _bind(self._listen)
        self._pool = ThreadPoolExecutor(2, "forebay-http")
        self._thread = BackgroundThread(lambda: asyncio.run(self._main()), name="forebay-http")
        self._thread.start()
        self._ready.wait(5.0)
        log.info("serving HTTP", extra=fields(address=self.address))

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop listening, drop connections, join the thread (at most ``timeout_s``)."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout_s)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._listen.kind == "unix":
            _unlink_socket(self._listen.path)
        self._thread = None

    async def _main(self) -> None:
        assert self._socket is not None
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        start = asyncio.start_unix_server if self._listen.kind == "unix" else asyncio.start_server
        server = await start(self._serve, sock=self._socket, limit=HEAD_BYTES_MAX)
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: one request, one answer. The oldest connection gives way when all slots are taken."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= self._connections_max:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cancel()
        self._open[task] = None
        try:
            await self._exchange(reader, writer)
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._open.pop(task, None)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # so that drain waits until the peer has taken all
        try:
            async with asyncio.timeout(self._read_s):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            answer, head_only = _say(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "header too long"), False
        else:
            method, path = _parse(head)
            answer, head_only = await self._answer(method, path), method == "HEAD"
        async with asyncio.timeout(WRITE_S):
            writer.write(answer.encode(head_only=head_only))
            await writer.drain()

    async def _answer(self, method: str, path: str) -> Answer:
        if not method:
            return _say(HTTPStatus.BAD_REQUEST, "not an HTTP/1 request")
        if method not in ("GET", "HEAD"):
            return _say(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD")
        if path not in PATHS:
            return _say(HTTPStatus.NOT_FOUND, "there is: " + " ".join(PATHS))
        if path == "/livez":
            return self._livez()
        try:
            snapshot = await self._snapshot()
            if path == "/metrics":
                return await self._metrics(snapshot)
        except Exception:  # whatever a snapshot raises, the scraper gets an answer and the log the cause
            log.exception("the HTTP request failed", extra=fields(path=path))
            return _say(HTTPStatus.INTERNAL_SERVER_ERROR, "failed; the daemon's log has the cause")
        return self._readyz(snapshot) if path == "/readyz" else self._healthz(snapshot)

    def _stalled(self) -> str:
        """Why the owner thread counts as stuck; empty when it does not."""
        age_s = self._heartbeat()
        return f"the owner thread has not turned for {age_s:.1f} s" if age_s > self.stalled_s else ""

    def _livez(self) -> Answer:
        stalled = self._stalled()
        return _say(HTTPStatus.SERVICE_UNAVAILABLE, stalled) if stalled else _say(HTTPStatus.OK, "ok")

    def _silent(self) -> str:
        return self._stalled() or f"the owner thread did not answer within {self._snapshot_s:g} s"

    def _readyz(self, snapshot: DaemonSnapshot | None) -> Answer:
        reasons = [self._silent()] if snapshot is None else status.not_ready(snapshot)
        return _say(HTTPStatus.SERVICE_UNAVAILABLE, "\n".join(reasons)) if reasons else _say(HTTPStatus.OK, "ok")

    def _healthz(self, snapshot: DaemonSnapshot | None) -> Answer:
        if snapshot is None:
            found = {"ready": False, "not_ready": [self._silent()]}
        else:
            found = status.summary(snapshot)
        found["heartbeat_age_s"] = round(self._heartbeat(), 3)
        code = HTTPStatus.OK if found["ready"] else HTTPStatus.SERVICE_UNAVAILABLE
        return Answer(code, json.dumps(found).encode() + b"\n", JSON)

    async def _metrics(self, snapshot: DaemonSnapshot | None) -> Answer:
        if snapshot is None:
            return _say(HTTPStatus.SERVICE_UNAVAILABLE, self._silent())
        assert self._loop is not None
        body = await self._loop.run_in_executor(self._pool, _exposition, snapshot)
        return Answer(HTTPStatus.OK, body, "text/plain; version=0.0.4; charset=utf-8")

    async def _snapshot(self) -> DaemonSnapshot | None:
        """The snapshot being taken, or a new one: the owner is asked once for all who wait."""
        if self._pending is None:
            assert self._loop is not None
            self._pending = self._loop.run_in_executor(self._pool, self._take, self._snapshot_s)
            self._pending.add_done_callback(self._taken)
        return await asyncio.shield(self._pending)

    def _taken(self, _: asyncio.Future[DaemonSnapshot | None]) -> None:
        self._pending = None


def _exposition(snapshot: DaemonSnapshot) -> bytes:
    from forebay.daemon.metrics import exposition  # 10 MB and 40 ms that a daemon nobody scrapes need not pay

    return exposition(snapshot)


def _parse(head: bytes) -> tuple[str, str]:
    """Method and path without the query; an empty method when this is no HTTP/1 request."""
    parts = head.split(b"\r\n", 1)[0].split(b" ")
    if len(parts) != 3 or not parts[2].startswith(b"HTTP/1.") or not head.isascii():
        return "", ""
    return parts[0].decode(), parts[1].split(b"?", 1)[0].decode()


def _bind(listen: Listen) -> socket.socket:
    family = socket.AF_UNIX if listen.kind == "unix" else socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if listen.kind == "unix":
            _bind_unix(bound, listen.path)
        else:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((listen.host, listen.port))
        bound.listen(CONNECTIONS_MAX)
    except OSError as error:
        bound.close()
        where = listen.path or f"{listen.host}:{listen.port}"
        raise OSError(error.errno, f"metrics.listen {where}: {error.strerror or error}") from error
    return bound


def _bind_unix(bound: socket.socket, path: str) -> None:
    """Owner and group may connect; the folder's mode decides further. Only a dead daemon's socket is replaced."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(path) == 0:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    _unlink_socket(path)
    os.fchmod(bound.fileno(), 0o600)  # closed until the mode below is set
    bound.bind(path)
    os.chmod(path, 0o660)


def _unlink_socket(path: str) -> None:
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        return
