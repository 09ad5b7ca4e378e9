"""How other threads ask the owner thread for something: a question waits, the owner answers between two turns."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Generic, TypeVar

T = TypeVar("T")

_WAITING_MAX = 64


class Mailbox(Generic[T]):
    """Bounded; `fileno` is readable when somebody asks. A signal may write to it too, to end the owner's wait."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._waiting: deque[Future[T]] = deque()

    def fileno(self) -> int:
        return self._read_fd

    def ask(self, timeout_s: float) -> T | None:
        """Called by other threads: the owner's answer, or None when it did not come in time."""
        if len(self._waiting) >= _WAITING_MAX:
            return None
        question: Future[T] = Future()
        self._waiting.append(question)
        self.wake()
        try:
            return question.result(timeout_s)
        except FutureTimeoutError:
            question.cancel()
            return None

    def wake(self) -> None:
        """End the owner's wait."""
        try:
            os.write(self.write_fd, b"\0")
        except BlockingIOError:
            return  # full of wake-ups already

    def answer(self, make: Callable[[], T]) -> None:
        """Called by the owner when `fileno` is readable: everybody who waits gets one answer made now."""
        try:
            os.read(self._read_fd, 4096)
        except BlockingIOError:
            return
        if not self._waiting:
            return
        made = make()
        while self._waiting:
            question = self._waiting.popleft()
            if question.set_running_or_notify_cancel():
                question.set_result(made)

    def close(self) -> None:
        os.close(self._read_fd)
        os.close(self.write_fd)
