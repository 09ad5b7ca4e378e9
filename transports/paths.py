"""Where a daemon lives: its runtime directory, the sockets in it, and the lock that makes it the only one.

The lock comes before any socket: binding a UNIX path begins with unlinking what is there, so without it a
second daemon would silently take a live one's path. The lock is an flock on a file that is never unlinked (an
unlinked lock file can be held by two), and it ends with its process, however that dies.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forebay.kvstore.errors import BadRequest, Busy, Forbidden

DIRECTORY_MODE = 0o750
SOCKET_MODE = 0o600
SUN_PATH_BYTES_MAX = 107  # 108 in struct sockaddr_un, the last one a NUL
SYSTEM_DIRECTORY = Path("/run/forebay")


@dataclass(frozen=True, slots=True)
class RuntimePaths:
    """The files of one daemon."""

    directory: Path

    @property
    def lock(self) -> Path:
        return self.directory / "daemon.lock"

    @property
    def control(self) -> Path:
        return self.directory / "control.sock"

    @property
    def session(self) -> Path:
        return self.directory / "session.sock"

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.sock"

    @property
    def control_address(self) -> str:
        """The control socket as ZeroMQ names it."""
        return f"ipc://{self.control}"


def runtime_directory(explicit: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The runtime directory a daemon makes and a client looks in; nothing is created or checked.

    The first of: `explicit`, $FOREBAY_RUNTIME_DIR, $XDG_RUNTIME_DIR/forebay, /run/forebay (when it is there to
    read, or for root), /tmp/forebay-UID.
    """
    environ = os.environ if environ is None else environ
    chosen = str(explicit) if explicit else environ.get("FOREBAY_RUNTIME_DIR")
    if chosen:
        return Path(chosen).absolute()
    if xdg := environ.get("XDG_RUNTIME_DIR"):
        return Path(xdg).absolute() / "forebay"
    if os.geteuid() == 0 or os.access(SYSTEM_DIRECTORY, os.R_OK | os.X_OK):
        return SYSTEM_DIRECTORY
    return Path(f"/tmp/forebay-{os.geteuid()}")  # noqa: S108  # owner and mode are checked before use


def cache_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Where compiled kernels and tuning are kept; nothing is created or checked.

    The first of: $FOREBAY_CACHE_DIR, $XDG_CACHE_HOME/forebay, ~/.cache/forebay.
    """
    environ = os.environ if environ is None else environ
    if chosen := environ.get("FOREBAY_CACHE_DIR"):
        return Path(chosen).absolute()
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "forebay"


def find(explicit: str | Path | None = None, environ: Mapping[str, str] | None = None) -> RuntimePaths:
    """A client's paths. A directory that is not there is no error (no daemon); one of a stranger's is Forbidden."""
    paths = RuntimePaths(runtime_directory(explicit, environ))
    _check_lengths(paths)
    try:
        _check_directory(paths.directory, owner_checked=not explicit and paths.directory != SYSTEM_DIRECTORY)
    except FileNotFoundError:
        pass
    return paths


def prepare(explicit: str | Path | None = None, environ: Mapping[str, str] | None = None) -> RuntimePaths:
    """A daemon's paths; makes the directory with mode 0750. Raises Forbidden, BadRequest, OSError."""
    paths = RuntimePaths(runtime_directory(explicit, environ))
    _check_lengths(paths)
    paths.directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        paths.directory.mkdir(mode=DIRECTORY_MODE)
        paths.directory.chmod(DIRECTORY_MODE)  # the umask may have taken bits
    except FileExistsError:
        pass
    _check_directory(paths.directory, owner_checked=True)
    return paths


def listen_at(path: Path, kind: socket.SocketKind, backlog: int, mode: int = SOCKET_MODE) -> socket.socket:
    """A non-blocking UNIX listener at `path`, replacing what a dead daemon left; the caller holds the lock.

    The mode is set before the path exists: Linux takes a socket file's mode from its descriptor's.
    """
    check_socket_path(path)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        os.fchmod(listener.fileno(), mode)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def check_socket_path(path: Path) -> None:
    """Raise BadRequest when the kernel could not hold the path."""
    length = len(os.fsencode(path))
    if length > SUN_PATH_BYTES_MAX:
        raise BadRequest(
            f"the socket path {path} has {length} bytes and the system's limit is {SUN_PATH_BYTES_MAX}: "
            "choose a shorter runtime directory"
        )


class DaemonLock:
    """Holds the runtime directory for one daemon, for as long as the object is open and the process lives."""

    def __init__(self, path: Path) -> None:
        """Take the lock at once or raise Busy naming the process that holds it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise Busy(f"another daemon (process {holder or 'unknown'}) holds {path}") from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let another daemon take the directory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _check_lengths(paths: RuntimePaths) -> None:
    for path in (paths.control, paths.session, paths.metrics):
        check_socket_path(path)


def _check_directory(directory: Path, *, owner_checked: bool) -> None:
    found = directory.lstat()
    if stat.S_ISLNK(found.st_mode):
        found = directory.stat()
        owner_checked = True
    if not stat.S_ISDIR(found.st_mode):
        raise Forbidden(f"{directory} is not a directory")
    if owner_checked and found.st_uid not in (0, os.geteuid()):
        raise Forbidden(f"{directory} belongs to uid {found.st_uid}, not to us or root")
    if found.st_mode & stat.S_IWOTH:
        raise Forbidden(f"{directory} can be written by everybody")
