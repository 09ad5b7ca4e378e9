"""The owner's mailbox: questions of other threads, answered between two turns."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from forebay.daemon.mailbox import Mailbox


@pytest.fixture
def mailbox() -> Iterator[Mailbox[int]]:
    made: Mailbox[int] = Mailbox()
    yield made
    made.close()


def _wait_readable(mailbox: Mailbox[int]) -> None:
    assert select.select([mailbox.fileno()], [], [], 5)[0], "nobody asked"


def test_every_thread_that_waits_gets_the_one_answer(mailbox: Mailbox[int]) -> None:
    made: list[int] = []
    waiting = threading.Barrier(5)

    def ask() -> int | None:
        waiting.wait(5)
        return mailbox.ask(5)

    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(ask) for _ in range(4)]
        waiting.wait(5)
        while not all(answer.done() for answer in answers):
            select.select([mailbox.fileno()], [], [], 0.05)
            mailbox.answer(lambda: made.append(1) or len(made))
    assert all(answer.result() in range(1, len(made) + 1) for answer in answers)
    assert len(made) <= 4


def test_question_that_nobody_answers_times_out(mailbox: Mailbox[int]) -> None:
    assert mailbox.ask(0.01) is None
    mailbox.answer(lambda: 7)
    assert mailbox.ask(0.01) is None, "an answer to a question long given up was kept"


def test_wake_up_alone_makes_no_answer(mailbox: Mailbox[int]) -> None:
    """A signal writes to the same descriptor; it must not cost a snapshot."""
    mailbox.wake()
    _wait_readable(mailbox)
    mailbox.answer(lambda: pytest.fail("an answer was made for nobody"))
    assert not select.select([mailbox.fileno()], [], [], 0)[0]


def test_wake_ups_without_an_owner_never_block(mailbox: Mailbox[int]) -> None:
    for _ in range(100_000):
        mailbox.wake()


def test_questions_are_bounded(mailbox: Mailbox[int]) -> None:
    for _ in range(64):
        assert mailbox.ask(0) is None
    assert mailbox.ask(60) is None, "the 65th question waited"


def test_answer_that_cannot_be_made_is_none_at_once(mailbox: Mailbox[int]) -> None:
    """A snapshot reads /proc, which needs a descriptor; without one the asker must not wait, nor the owner die."""

    def fail() -> int:
        raise OSError("too many open files")

    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(mailbox.ask, 30)
        _wait_readable(mailbox)
        mailbox.answer(fail)
        assert answer.result(5) is None
