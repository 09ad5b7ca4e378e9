"""Calls that may hang in the kernel for ever, given up after a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T], late: Callable[[T], None]) -> T:
    """What `call` returns or raises, in a thread of its own; TimeoutError when that takes longer.

    What it still returns after that goes to `late`, in that thread; what it raises then is dropped.
    """
    lock, ended = threading.Lock(), threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []
    given_up = False

    def work() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001  # the caller's to raise
            errors.append(error)
        else:
            with lock:
                results.append(result)
                in_time = not given_up
            if not in_time:
                late(result)
        ended.set()

    threading.Thread(target=work, name="within", daemon=True).start()
    ended.wait(seconds)
    with lock:
        given_up = not (results or errors)
    if errors:
        raise errors[0]
    if given_up:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]
