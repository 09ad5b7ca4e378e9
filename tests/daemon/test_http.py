"""The endpoint answers the machine's tools, whatever the owner thread or a rude peer does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forebay.daemon.http import HttpServer
from forebay.daemon.settings import Listen, read_listen
from forebay.daemon.status import DaemonSnapshot

MakeSnapshot = Callable[..., DaemonSnapshot]
LOCAL = Listen("tcp", "127.0.0.1", 0)


@contextmanager
def serving(take: Callable[[float], DaemonSnapshot | None], age_s: float = 0.1, **more: Any) -> Iterator[HttpServer]:
    listen = more.pop("listen", LOCAL)
    server = HttpServer(listen, take, lambda: age_s, 10.0, **more)
    server.start()
    try:
        yield server
    finally:
        server.close()


def connect(server: HttpServer) -> socket.socket:
    listen = read_listen(server.address)
    if listen.kind == "unix":
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(10)
        peer.connect(listen.path)
        return peer
    return socket.create_connection((listen.host, listen.port), timeout=10)


def read_all(peer: socket.socket) -> bytes:
    received = b""
    while chunk := peer.recv(65536):
        received += chunk
    return received


def ask(server: HttpServer, request: str) -> tuple[int, dict[str, str], bytes]:
    with connect(server) as peer:
        peer.sendall(request.encode())
        head, _, body = read_all(peer).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split(" ")[1]), dict(line.split(": ", 1) for line in lines), body


def get(server: HttpServer, path: str) -> tuple[int, str]:
    code, _, body = ask(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
    return code, body.decode()


def test_a_serving_daemon_is_live_ready_healthy_and_measured(make_snapshot: MakeSnapshot) -> None:
    with serving(lambda _: make_snapshot()) as server:
        assert get(server, "/livez") == (200, "ok\n")
        assert get(server, "/readyz?verbose") == (200, "ok\n")
        code, text = get(server, "/healthz")
        assert code == 200
        assert json.loads(text)["tiers"]["host"]["capacity_bytes"] == 1 << 30
        code, text = get(server, "/metrics")
        assert code == 200
        assert "forebay_lookups_total 1000.0" in text


def test_the_same_over_a_unix_socket(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with serving(lambda _: make_snapshot(), listen=Listen("unix", path=str(path))) as server:
        assert server.address == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o660
        assert get(server, "/livez")[0] == 200
    assert not path.exists()


def test_a_dead_daemons_unix_socket_is_replaced_a_live_one_is_not(make_snapshot: MakeSnapshot, tmp_path: Path) -> None:
    listen = Listen("unix", path=str(tmp_path / "metrics.sock"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(listen.path)
    with serving(lambda _: make_snapshot(), listen=listen) as server:
        with pytest.raises(OSError, match="in use"):
            HttpServer(listen, lambda _: None, lambda: 0.0, 10.0).start()
        assert get(server, "/livez")[0] == 200


def test_a_file_in_the_way_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "metrics.sock").write_text("mine")
    with pytest.raises(OSError, match=r"metrics\.listen"):
        HttpServer(Listen("unix", path=str(tmp_path / "metrics.sock")), lambda _: None, lambda: 0.0, 10.0).start()
    assert (tmp_path / "metrics.sock").read_text() == "mine"


def test_a_port_that_is_taken_is_an_error_with_the_address(make_snapshot: MakeSnapshot) -> None:
    with serving(lambda _: make_snapshot()) as server:
        taken = read_listen(server.address)
        with pytest.raises(OSError, match=f"{taken.port}"):
            HttpServer(taken, lambda _: None, lambda: 0.0, 10.0).start()


def test_off_listens_nowhere() -> None:
    server = HttpServer(Listen("off"), lambda _: None, lambda: 0.0, 10.0)
    server.start()
    assert server.address == "off"
    server.close()


def test_a_stuck_owner_thread_is_not_live_and_says_for_how_long(make_snapshot: MakeSnapshot) -> None:
    with serving(lambda _: None, age_s=12.5) as server:
        assert get(server, "/livez") == (503, "the owner thread has not turned for 12.5 s\n")
        server.stalled_s = 20.0
        assert get(server, "/livez")[0] == 200


def test_without_a_snapshot_nothing_is_ready_and_metrics_are_unavailable() -> None:
    with serving(lambda _: None, snapshot_s=0.5) as server:
        assert get(server, "/livez")[0] == 200
        assert get(server, "/readyz") == (503, "the owner thread did not answer within 0.5 s\n")
        assert get(server, "/metrics")[0] == 503
        code, text = get(server, "/healthz")
        assert (code, json.loads(text)["ready"]) == (503, False)


def test_draining_and_a_tier_that_is_down_are_said(make_snapshot: MakeSnapshot, make_tier: Any) -> None:
    down = make_snapshot(state="draining", tiers=(make_tier(up=False, reason="no memory"),))
    with serving(lambda _: down) as server:
        assert get(server, "/readyz") == (503, "draining: the daemon is shutting down\ntier host is down: no memory\n")
        assert get(server, "/healthz")[0] == 503
        assert get(server, "/livez")[0] == 200


def test_a_snapshot_that_raises_is_an_answer_and_a_log_record(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: float) -> DaemonSnapshot:
        raise RuntimeError("a bug")

    with serving(broken) as server:
        assert get(server, "/metrics")[0] == 500
        assert get(server, "/livez")[0] == 200
    assert "a bug" in caplog.text


def test_only_get_and_head(make_snapshot: MakeSnapshot) -> None:
    with serving(lambda _: make_snapshot()) as server:
        code, headers, body = ask(server, "HEAD /livez HTTP/1.1\r\n\r\n")
        assert (code, headers["Content-Length"], body) == (200, "3", b"")
        code, headers, _ = ask(server, "POST /livez HTTP/1.1\r\n\r\n")
        assert (code, headers["Allow"]) == (405, "GET, HEAD")
        assert get(server, "/secret")[0] == 404


@pytest.mark.parametrize("request_text", ["x\r\n\r\n", "GET /livez HTTP/2\r\n\r\n", "GET  /livez HTTP/1.1\r\n\r\n",
                                          "GET /l\u00e9 HTTP/1.1\r\n\r\n"])  # fmt: skip
def test_what_is_no_http_is_a_bad_request(make_snapshot: MakeSnapshot, request_text: str) -> None:
    with serving(lambda _: make_snapshot()) as server:
        assert ask(server, request_text)[0] == 400


def test_a_head_without_end_is_refused(make_snapshot: MakeSnapshot) -> None:
    with serving(lambda _: make_snapshot()) as server, connect(server) as peer:
        peer.sendall(b"GET /livez HTTP/1.1\r\nA: " + b"b" * 20_000)
        try:
            received = read_all(peer)
        except ConnectionResetError:
            received = b""  # it hung up with our bytes unread
        assert not received or b" 431 " in received.split(b"\r\n")[0]


def test_a_dawdling_peer_is_dropped_at_its_deadline(make_snapshot: MakeSnapshot) -> None:
    with serving(lambda _: make_snapshot(), read_s=0.2) as server, connect(server) as peer:
        peer.sendall(b"GET /livez HT")
        try:
            assert read_all(peer) == b""
        except ConnectionResetError:
            return


def test_silent_connections_cannot_keep_the_probe_out(make_snapshot: MakeSnapshot) -> None:
    with serving(lambda _: make_snapshot(), connections_max=4) as server:
        silent = [connect(server) for _ in range(20)]
        assert get(server, "/livez")[0] == 200
        for peer in silent:
            peer.close()


def test_simultaneous_scrapes_share_one_question_to_the_owner(make_snapshot: MakeSnapshot) -> None:
    asked = threading.Semaphore(0)
    answer = threading.Event()
    calls = []

    def take(timeout_s: float) -> DaemonSnapshot:
        calls.append(timeout_s)
        asked.release()
        assert answer.wait(10)
        return make_snapshot()

    with serving(take) as server:
        peers = [connect(server) for _ in range(5)]
        for peer in peers:
            peer.sendall(b"GET /readyz HTTP/1.1\r\n\r\n")
        assert asked.acquire(timeout=10)
        assert get(server, "/livez")[0] == 200, "a probe is answered while the owner is being waited for"
        answer.set()
        assert all(b" 200 " in read_all(peer) for peer in peers)
        for peer in peers:
            peer.close()
    assert len(calls) <= 2
    assert calls[0] == 1.0


def test_close_ends_waiting_connections_and_the_thread(make_snapshot: MakeSnapshot) -> None:
    with serving(lambda _: make_snapshot()) as server:
        peer = connect(server)
        assert get(server, "/livez")[0] == 200
    with peer:
        try:
            assert peer.recv(1) == b""
        except ConnectionResetError:
            pass
    assert not any(thread.name == "forebay-http" for thread in threading.enumerate())
