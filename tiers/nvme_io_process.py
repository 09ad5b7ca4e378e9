"""The daemon's side of a drive's I/O process (nvme_io_child.py): sends parts, hears what became of them.

Sending never waits: what a full socket does not take is left for the thread that listens. The process may die, and is
then started again. What it had under way ends only once it is gone for certain, since its writes must not land in slots
that have been given to others: writes as I/O errors, and loads as DOWN, for nothing is known against their blocks.

One that ends again and again is given up for this life of the daemon, and with it the drive. Loads are I/O errors from
then on, so that whoever asks for a block of it can store that block anew.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from forebay.tiers.nvme_drive import Drive
from forebay.tiers.nvme_io import Errors, Meter, Part, WriteHealth, added
from forebay.tiers.nvme_io_wire import Frames, Kind, State, frame, pack_part, send_memory, settle
from forebay.tiers.nvme_jobs import IoStatus, WriteJob
from forebay.tiers.nvme_staging import STREAMING
from forebay.transports.threads import BackgroundThread

log = logging.getLogger(__name__)

MemoryHandle = Callable[[int], tuple[int, int]]
"""Descriptor and size in bytes of the memory a job names; asked on the owner thread."""

STUCK_S = 10.0
"""A drive that has ended nothing for so long, with loads under way, gets no more of them until it does."""
_COMMAND = (sys.executable, "-P", "-m", "forebay.tiers.nvme_io_child")
_RESTART_FIRST_S = 0.1
_RESTART_MAX_S = 60.0
IO_PROCESS_BYTES = 24 << 20
"""What such a process takes beside the host's slabs and its buffers."""
ENDS_MAX = 10
"""So many processes in a row, none of which lived for _RESTART_MAX_S, give the drive up; the pauses alone take 51 s."""
_LAST_S = 0.2
_LOOK_S = 1.0
_MEMORY_AGAIN_MS = 5
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class IoProcess:
    """`DriveIo` in another process. `submit`, `cancel` and `drop` are the owner's; they never wait."""

    def __init__(
        self,
        drive: Drive,
        queue_depth: int,
        health: WriteHealth,
        errors: Errors,
        *,
        loaded: Callable[[Part], None],
        written: Callable[[Part], None],
        memory: MemoryHandle,
        is_staged: bool,
        nice: int,
    ) -> None:
        """`loaded`, `written` and `is_staged` as `DriveIo`; the first two are called from the listening thread."""
        self._drive = drive
        self._queue_depth = queue_depth
        self._health = health
        self._errors = errors
        self._loaded = loaded
        self._written = written
        self._memory = memory
        self._flags = [flag for flag, set_ in (("--buffered", not drive.is_direct), ("--staged", is_staged)) if set_]
        self._nice = nice
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # The lock guards all below but the state, which is replaced whole by the listening thread.
        self._lock = threading.Lock()
        self._next_part = 0
        self._parts: dict[int, Part] = {}
        self._loads_left = 0
        self._progress_s = 0.0
        self._known: set[int] = set()
        self._unsent = bytearray()
        self._unsent_memory: deque[tuple[int, int, int]] = deque()
        self._child: subprocess.Popen[bytes] | None = None
        self._stream: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._closing = threading.Event()
        self.ends = 0
        """Processes that ended though nobody told them to, or could not be started."""
        self.reason = ""
        """How the last of those ended, in a sentence that names the drive."""
        self.given_up = False
        self._before = State()
        """What earlier processes have counted."""
        self._state = State()
        self._thread = BackgroundThread(self._listen_forever, name=f"io-{drive.directory.name}")

    @property
    def load_meters(self) -> Sequence[Meter]:
        return self._before.loads, self._state.loads

    @property
    def write_meters(self) -> Sequence[Meter]:
        return self._before.writes, self._state.writes

    @property
    def pid(self) -> int:
        """Of the process; 0 while there is none."""
        child = self._child
        return 0 if child is None else child.pid

    @property
    def why_down(self) -> str:
        """Why there is no process; empty while there is one."""
        return "" if self._child is not None else self.reason

    def memory_bytes(self) -> int:
        """What the process takes for itself, the host's slabs not counted; 0 while there is none."""
        pid = self.pid
        return own_bytes(pid) if pid else 0

    def start(self) -> None:
        """Start the process; by the thread that lives as long as the daemon, for the process ends with it."""
        self._try_spawn()
        self._thread.start()

    def submit(self, part: Part) -> None:
        """Send a part. It ends as DOWN at once while there is no process, and a load while the drive is stuck."""
        with self._lock:
            sent = self._takes(part) and self._send_part(part)
        if not sent:
            _set_all(part, IoStatus.IO_ERROR if self.given_up and not _writes(part) else IoStatus.DOWN)
            self._errors.add("write_down" if _writes(part) else "load_down", len(part.blocks))
            self._tell(part)

    def cancel(self, job_id: int) -> None:
        """End what the job has not begun as CANCELLED; what is under way goes on."""
        with self._lock:
            if any(part.work.job.job_id == job_id for part in self._parts.values()):
                self._send(frame([Kind.CANCEL, job_id]))

    def drop(self, numbers: Iterable[int]) -> None:
        """Memory that no job names any more."""
        with self._lock:
            known = [number for number in numbers if number in self._known]
            if known:
                self._known.difference_update(known)
                self._send(frame([Kind.DROP, known]))

    def queued_blocks(self) -> tuple[int, int]:
        """Blocks whose call has not begun, as the process last told: loads, writes."""
        return self._state.queued_blocks if self._parts else (0, 0)

    def under_way(self) -> tuple[int, int]:
        """Calls under way, loads and writes, as the process last told."""
        return self._state.under_way if self._parts else (0, 0)

    def close(self, deadline_s: float) -> bool:
        """Finish what is queued until the deadline (time.monotonic), cancel the rest. True: the process has ended."""
        with self._lock:
            self._closing.set()
            self._send(frame([Kind.CLOSE, max(0.0, deadline_s - time.monotonic())]))
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline_s - time.monotonic()) + _LAST_S)
            if self._thread.is_alive():
                self._kill()
                self._thread.join(_LAST_S)
        ended = not self._thread.is_alive()
        if ended and self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1
        return ended

    # --- under the lock ---

    def _takes(self, part: Part) -> bool:
        if self._stream is None:
            return False
        stuck = self._loads_left > 0 and time.monotonic() - self._progress_s > STUCK_S
        return _writes(part) or not stuck

    def _send_part(self, part: Part) -> bool:
        """False when it could not be: no descriptor was left to send its memory later."""
        try:
            self._send_memories({part.work.job.memory[block][0] for block in part.blocks})
        except OSError:
            return False
        if not self._loads_left:
            self._progress_s = time.monotonic()
        self._next_part += 1
        said = pack_part(self._next_part, part)
        self._parts[self._next_part] = part
        part.sync_failures = self._health.sync_failures
        self._count(part, 1)
        self._send(said)
        return True

    def _count(self, part: Part, change: int) -> None:
        if _writes(part):
            self._health.calls_left += change
        else:
            self._loads_left += change

    def _send_memories(self, numbers: set[int]) -> None:
        for number in numbers - self._known:
            fd, size_bytes = self._memory(number)
            if self._unsent_memory or not self._send_memory(number, size_bytes, fd):
                self._unsent_memory.append((number, size_bytes, os.dup(fd)))
                self._wake()
            self._known.add(number)

    def _send_memory(self, number: int, size_bytes: int, fd: int) -> bool:
        assert self._channel is not None
        try:
            send_memory(self._channel, number, size_bytes, fd)
        except OSError as error:  # full; too many descriptors on their way (unix(7), ETOOMANYREFS); or
            return error.errno in _GONE  # the process is gone, which the listening thread finds out
        return True

    def _send(self, said: bytes) -> None:
        if self._stream is None:
            return
        sent = 0
        if not self._unsent:
            with contextlib.suppress(OSError):
                sent = self._stream.send(said, socket.MSG_DONTWAIT)
        if sent < len(said):
            self._unsent += said[sent:]
            self._wake()

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    # --- the process ---

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        channel, their_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        drive, (data_fd, lock_fd) = self._drive, self._drive.descriptors
        told = {
            "parent": os.getpid(),
            "stream": theirs.fileno(),
            "channel": their_channel.fileno(),
            "data-fd": data_fd,
            "slab-bytes": drive.slab_bytes,
            "queue-depth": self._queue_depth,
            "nice": self._nice,
            "drive-id": drive.drive_id.hex(),
            "directory": drive.directory,
        }
        command = [*_COMMAND, *(f"--{key}={value}" for key, value in told.items()), *self._flags]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # until it knows what to make of them
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), their_channel.fileno(), *{data_fd, lock_fd}),
                env=_environment(),
            )
        except OSError:
            ours.close()
            channel.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            their_channel.close()
        with self._lock:
            self._child, self._stream, self._channel = child, ours, channel
            if self._closing.is_set():  # since it was decided to start it
                self._send(frame([Kind.CLOSE, 0.0]))

    def _try_spawn(self) -> None:
        try:
            self._spawn()
        except OSError as error:
            self.reason = f"no I/O process for {self._drive.directory}: {error}"

    def _listen_forever(self) -> None:
        pause_s, in_a_row = _RESTART_FIRST_S, 0
        while True:
            begun_s = time.monotonic()
            try:
                self._listen()
            except Exception:  # a bug must cost the process and what it had under way, and not those who wait for that
                log.exception("bug while the I/O process of %s was heard", self._drive.directory)
                self._kill()
            self._bury()
            if self._closing.is_set():
                return
            if time.monotonic() - begun_s > _RESTART_MAX_S:
                pause_s, in_a_row = _RESTART_FIRST_S, 0
            self.ends += 1
            in_a_row += 1
            if in_a_row >= ENDS_MAX:
                self.reason += f", {in_a_row} times in a row: the drive is not used until the next start"
                self.given_up = True
                log.error("%s", self.reason)
                return
            log.error("%s; the next one starts in %.1f s", self.reason, pause_s)
            if self._closing.wait(pause_s):
                return
            pause_s = min(_RESTART_MAX_S, 2 * pause_s)
            self._try_spawn()

    def _listen(self) -> None:
        """Hear the process out, until it ends."""
        stream, channel = self._stream, self._channel
        if stream is None or channel is None:
            return
        frames = Frames()
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        while True:
            poll.register(stream, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            # A socket with room does not say that memory can be sent: that may be for other processes to make way.
            for fd, _ in poll.poll(_MEMORY_AGAIN_MS if self._unsent_memory else None):
                if fd == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
            self._send_left(stream, channel)
            try:
                alive = frames.receive(stream)
            except OSError:
                return
            for message in frames.messages():
                self._hear(message)
            if not alive:
                return

    def _send_left(self, stream: socket.socket, channel: socket.socket) -> None:
        with self._lock:
            with contextlib.suppress(OSError):
                while self._unsent_memory:
                    number, size_bytes, fd = self._unsent_memory[0]
                    send_memory(channel, number, size_bytes, fd)
                    os.close(self._unsent_memory.popleft()[2])
            with contextlib.suppress(OSError):
                if self._unsent:
                    del self._unsent[: stream.send(self._unsent, socket.MSG_DONTWAIT)]

    def _hear(self, message: list[Any]) -> None:
        state = State.unpacked(message[-1])
        for cause, blocks in state.errors.items():
            self._errors.add(cause, blocks)
        for reason in state.failures:
            self._health.failed(reason)
        if message[0] == Kind.DONE or state.loads.sum_s != self._state.loads.sum_s:
            self._progress_s = time.monotonic()
        self._state = state
        if message[0] == Kind.DONE:
            _, part_id, statuses, checksums, _ = message
            settle(self._parts[part_id], statuses, checksums)
            with self._lock:
                part = self._parts.pop(part_id)
            self._end(part)

    def _end(self, part: Part) -> None:
        with self._lock:
            self._count(part, -1)
        self._tell(part)

    def _tell(self, part: Part) -> None:
        (self._written if _writes(part) else self._loaded)(part)

    def _kill(self) -> None:
        child = self._child
        if child is not None:
            child.kill()

    def _bury(self) -> None:
        """Wait until the process is gone, then end what it had under way."""
        child, stream, channel = self._child, self._stream, self._channel
        if child is None or stream is None or channel is None:
            return
        closing = self._closing.is_set()
        if not closing:
            self._kill()
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_LOOK_S)
        self.reason = f"the I/O process of {self._drive.directory} {_how_ended(child.returncode)}"
        with self._lock:
            parts, self._parts = list(self._parts.values()), {}
            self._unsent.clear()
            self._known.clear()
            while self._unsent_memory:
                os.close(self._unsent_memory.popleft()[2])
            self._before = State(
                loads=added([self._before.loads, self._state.loads]),
                writes=added([self._before.writes, self._state.writes]),
            )
            self._state = State()
            self._child = self._stream = self._channel = None
        stream.close()
        channel.close()
        lost = 0
        for part in parts:
            lost_as = IoStatus.IO_ERROR if _writes(part) else IoStatus.DOWN
            _set_all(part, IoStatus.CANCELLED if closing else lost_as)
            lost += len(part.blocks)
            self._end(part)
        if lost and not closing:
            self._errors.add("io_process_ended", lost)


def own_bytes(pid: int) -> int:
    """Resident memory that is a process's own, shared memory not counted; 0 when it cannot be told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def _environment() -> dict[str, str]:
    """The daemon's, and that large copies pass the caches by, unless whoever started it has said otherwise."""
    told = os.environ.get("GLIBC_TUNABLES", "")
    return {**os.environ, "GLIBC_TUNABLES": f"{STREAMING}:{told}" if told else STREAMING}


def _how_ended(code: int) -> str:
    """A return code of subprocess's, in words."""
    if code >= 0:
        return f"ended with exit status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _writes(part: Part) -> bool:
    return isinstance(part.work.job, WriteJob)


def _set_all(part: Part, status: IoStatus) -> None:
    for block in part.blocks:
        part.work.statuses[block] = status
