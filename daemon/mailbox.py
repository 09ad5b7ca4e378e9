"""How other threads ask the owner thread for something: a question waits, the owner answers between two turns."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Generic, TypeVar

from forebay.daemon.logging import fields

log = logging.getLogger(__name__)

T = TypeVar("T")

_WAITING_MAX = 64


class Mailbox(Generic[T]):
    """Bounded; `fileno` is readable when somebody asks. A signal may write to it too, to end the owner's wait."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._waiting: deque[Future[T | None]] = deque()

    def fileno(self) -> int:
        return self._read_fd

    def ask(self, timeout_s: float) -> T | None:
        """Called by other threads: the owner's answer, or None when it did not come in time or could not be made."""
        if len(self._waiting) >= _WAITING_MAX:
            return None
        question: Future[T | None] = Future()
        self._waiting.append(question)
        self.wake()
        try:
            return question.result(timeout_s)
        except FutureTimeoutError:
            question.cancel()
            return None

    def wake(self) -> None:
        """End the owner's wait. For any thread; does nothing once closed."""
        try:
            os.write(self.write_fd, b"\0")
        except OSError:  # full of wake-ups already, or closed under a thread that the daemon no longer waits for
            return

    def answer(self, make: Callable[[], T]) -> None:
        """Called by the owner when `fileno` is readable: everybody who waits gets one answer made now."""
        try:
            os.read(self._read_fd, 4096)
        except BlockingIOError:
            return
        if not self._waiting:
            return
        try:
            made: T | None = make()
        except OSError as error:  # /proc could not be read, for want of a descriptor
            log.warning("no answer could be made", extra=fields(error=error))
            made = None
        while self._waiting:
            question = self._waiting.popleft()
            if question.set_running_or_notify_cancel():
                question.set_result(made)

    def close(self) -> None:
        read_fd, write_fd = self._read_fd, self.write_fd
        self._read_fd = self.write_fd = -1
        os.close(read_fd)
        os.close(write_fd)
