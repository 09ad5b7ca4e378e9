"""The runtime directory: found in one order, made private, held by one daemon."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from forebay.kvstore.errors import BadRequest, Busy, Forbidden
from forebay.transports import paths

HOLDER = """
import sys
from pathlib import Path
from forebay.transports.paths import DaemonLock
lock = DaemonLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_an_explicit_directory_wins_over_the_environment(tmp_path: Path) -> None:
    environ = {"FOREBAY_RUNTIME_DIR": "/a", "XDG_RUNTIME_DIR": "/b"}
    assert paths.runtime_directory(tmp_path, environ) == tmp_path
    assert paths.runtime_directory(None, environ) == Path("/a")
    assert paths.runtime_directory(None, {"XDG_RUNTIME_DIR": "/b"}) == Path("/b/forebay")


def test_root_runs_in_run_and_others_under_tmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "SYSTEM_DIRECTORY", tmp_path / "absent")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert paths.runtime_directory(None, {}) == tmp_path / "absent"
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert paths.runtime_directory(None, {}) == Path("/tmp/forebay-1234")
    monkeypatch.setattr(paths, "SYSTEM_DIRECTORY", tmp_path)
    assert paths.runtime_directory(None, {}) == tmp_path


def test_prepare_makes_a_private_directory_and_may_be_repeated(tmp_path: Path) -> None:
    made = paths.prepare(tmp_path / "deep" / "run")
    assert stat.S_IMODE(made.directory.stat().st_mode) == 0o750
    assert paths.prepare(made.directory) == made
    assert made.control_address == f"ipc://{made.directory}/control.sock"


def test_a_directory_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for use in (paths.prepare, paths.find):
        with pytest.raises(Forbidden, match="written by everybody"):
            use(tmp_path)


def test_a_strangers_directory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    owner = tmp_path.stat().st_uid
    if owner == 0:
        os.chown(tmp_path, 12345, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(Forbidden, match="belongs to uid"):
        paths.prepare(tmp_path)
    with pytest.raises(Forbidden, match="belongs to uid"):
        paths.find(None, {"FOREBAY_RUNTIME_DIR": str(tmp_path)})


def test_a_file_in_the_directorys_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(Forbidden, match="not a directory"):
        paths.prepare(tmp_path / "run")


def test_a_client_without_a_daemon_finds_paths_all_the_same(tmp_path: Path) -> None:
    assert paths.find(tmp_path / "absent").session == tmp_path / "absent" / "session.sock"


def test_a_path_too_long_for_a_socket_is_said_to_be_so(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 100)
    for use in (paths.prepare, paths.find):
        with pytest.raises(BadRequest, match="shorter runtime directory"):
            use(long)
    assert not long.exists()


def test_the_longest_path_that_passes_can_be_bound(tmp_path: Path) -> None:
    room = paths.SUN_PATH_BYTES_MAX - len(str(tmp_path)) - 1
    path = tmp_path / ("s" * room)
    paths.listen_at(path, socket.SOCK_STREAM, 1).close()
    with pytest.raises(BadRequest):
        paths.listen_at(tmp_path / ("s" * (room + 1)), socket.SOCK_STREAM, 1)


def test_a_socket_is_private_from_its_first_moment(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        listener = paths.listen_at(tmp_path / "s", socket.SOCK_SEQPACKET, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    listener.close()


def test_a_second_daemon_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "daemon.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Busy, match=rf"process {holder.pid}\b"):
            paths.DaemonLock(tmp_path / "daemon.lock")
        holder.kill()
        holder.wait(10)
        paths.DaemonLock(tmp_path / "daemon.lock").close()


def test_a_lock_that_was_let_go_can_be_taken_again(tmp_path: Path) -> None:
    first = paths.DaemonLock(tmp_path / "daemon.lock")
    with pytest.raises(Busy):
        paths.DaemonLock(tmp_path / "daemon.lock")
    first.close()
    first.close()
    second = paths.DaemonLock(tmp_path / "daemon.lock")
    assert (tmp_path / "daemon.lock").read_text() == f"{os.getpid()}\n"
    second.close()


def test_a_link_in_the_locks_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "daemon.lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        paths.DaemonLock(tmp_path / "daemon.lock")


def test_cache_directory_is_the_users_own_unless_told_otherwise(tmp_path: Path) -> None:
    assert paths.cache_directory({"FOREBAY_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert paths.cache_directory({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "forebay"
    assert paths.cache_directory({}) == Path.home() / ".cache/forebay"
