"""The I/O of one drive in a process of its own: `python -P -m forebay.tiers.nvme_io_child`, started by the daemon.

Why a process: the threads that read, write and hash hand the interpreter lock from one to another thousands of times a
second, and the owner thread, which needs it for every answer, stood in that queue. Here they queue among themselves.
It holds the daemon's descriptor of the data file, lock included, so that no other daemon begins while a write of this
one may be on its way; it ends with the daemon, however that ends.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from forebay.tiers.core_sharing import CoreSharing
from forebay.tiers.files import OsFiles
from forebay.tiers.nvme_drive import SlotFile
from forebay.tiers.nvme_io import DriveIo, Errors, Part, WriteHealth
from forebay.tiers.nvme_io_wire import (
    Frames,
    Kind,
    State,
    frame,
    memory_of,
    pack_done,
    receive_memory,
    unpack_part,
)
from forebay.transports.shm import map_shared

STATE_S = 0.1
"""How often, while there is work, the daemon is told how things are."""
_MEMORY_S = 10.0
_PR_SET_PDEATHSIG = 1


class _Health(WriteHealth):
    """Remembers failures for the daemon, which is who decides."""

    def __init__(self) -> None:
        super().__init__(time.monotonic, 0.0)
        self.reasons: list[str] = []

    def failed(self, reason: str) -> None:
        self.reasons.append(reason)


class _NewErrors(Errors):
    """Counts since it was last asked."""

    def taken(self) -> dict[str, int]:
        with self._lock:
            counts, self._counts = dict(self._counts), type(self._counts)()
        return counts


class IoChild:
    """Takes parts, has them carried out, and tells what became of them."""

    def __init__(self, stream: socket.socket, channel: socket.socket, file: SlotFile, told: argparse.Namespace) -> None:
        self._stream = stream
        self._channel = channel
        self._mapped: dict[int, memoryview] = {}
        self._dropped: set[int] = set()
        self._health = _Health()
        self._errors = _NewErrors()
        self._sending = threading.Lock()
        self._part_ids: dict[int, int] = {}
        self._sharing = CoreSharing(told.nice)
        self._io = DriveIo(
            file,
            told.queue_depth,
            self._health,
            self._errors,
            loaded=self._ended,
            written=self._ended,
            is_staged=told.staged,
            sharing=self._sharing,
        )

    def run(self) -> None:
        """Serve until told to close, or until the daemon is gone."""
        self._sharing.apply()
        self._io.start()
        frames = Frames()
        poll = select.poll()
        poll.register(self._stream, select.POLLIN)
        poll.register(self._channel, select.POLLIN)
        told_s = 0.0
        while True:
            ready = dict(poll.poll(STATE_S * 1000 if self._part_ids else None))
            if self._channel.fileno() in ready:
                self._take_memory()
            if self._stream.fileno() in ready:
                if not frames.receive(self._stream):
                    return
                for message in frames.messages():
                    if not self._obey(message):
                        return
            if self._part_ids and time.monotonic() >= told_s + STATE_S:
                told_s = time.monotonic()
                self._sharing.review()
                with self._sending:
                    self._stream.sendall(frame([Kind.STATE, self._state().packed()]))

    def _obey(self, message: list[Any]) -> bool:
        kind = message[0]
        if kind in (Kind.LOAD, Kind.WRITE):
            slot_bytes = message[3]
            views = [self._view(number)[at : at + slot_bytes] for number, at in memory_of(message)]
            part = unpack_part(message, views)
            self._part_ids[id(part)] = message[1]
            self._io.submit(part)
        elif kind == Kind.CANCEL:
            self._io.cancel(message[1])
        elif kind == Kind.DROP:
            for number in message[1]:
                if self._mapped.pop(number, None) is None:
                    self._dropped.add(number)
        else:
            self._io.close(time.monotonic() + message[1])
        return bool(kind != Kind.CLOSE)

    def _view(self, number: int) -> memoryview:
        """Memory that the daemon names has been sent before, or is about to come."""
        deadline_s = time.monotonic() + _MEMORY_S
        while number not in self._mapped:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._channel], [], [], left_s)[0]:
                raise TimeoutError(f"memory {number} was named and did not come")
            self._take_memory()
        return self._mapped[number]

    def _take_memory(self) -> None:
        number, size_bytes, fd = receive_memory(self._channel)
        try:
            if number in self._dropped:
                self._dropped.remove(number)
            else:
                self._mapped[number] = memoryview(map_shared(fd, size_bytes, writable=True))
        finally:
            os.close(fd)

    def _ended(self, part: Part) -> None:
        """By any thread, once all blocks of a part have their status."""
        part_id = self._part_ids.pop(id(part))
        with self._sending, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `run` finds the daemon gone
            self._stream.sendall(pack_done(part_id, part, self._state()))

    def _state(self) -> State:
        reasons, self._health.reasons = self._health.reasons, []
        return State(
            queued_blocks=self._io.queued_blocks(),
            under_way=self._io.under_way(),
            loads=self._io.load_meters[0],
            writes=self._io.write_meters[0],
            errors=self._errors.taken(),
            failures=reasons,
        )


def end_with_parent(parent: int) -> None:
    """Be killed when the thread that started this process ends, the daemon's own end included."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def main(arguments: list[str]) -> None:
    """Serve one drive. Ends without waiting for threads: they may hang in the kernel."""
    parser = argparse.ArgumentParser(prog="forebay nvme I/O")
    for name in ("parent", "stream", "channel", "data-fd", "slab-bytes", "queue-depth", "nice"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--drive-id", type=bytes.fromhex, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--buffered", action="store_true")
    parser.add_argument("--staged", action="store_true")
    told = parser.parse_args(arguments)
    end_with_parent(told.parent)
    for ignored in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # a service manager's, a terminal's: the daemon's to heed
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    file = SlotFile(
        OsFiles(), told.directory, told.data_fd, told.drive_id, told.slab_bytes, is_direct=not told.buffered
    )
    with socket.socket(fileno=told.stream) as stream, socket.socket(fileno=told.channel) as channel:
        try:
            IoChild(stream, channel, file, told).run()
        except (BrokenPipeError, ConnectionResetError, EOFError):
            pass  # the daemon is gone
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
