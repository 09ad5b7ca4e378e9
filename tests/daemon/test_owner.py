"""The owner's loop: what one turn takes on, and what a request has to wait for."""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from forebay.daemon.live_slabs import CarriedOut
from forebay.daemon.mailbox import Mailbox
from forebay.daemon.owner import Owner
from forebay.daemon.status import DaemonSnapshot
from forebay.kvstore.movement import NvmeConfig
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.store import Store, StoreConfig


@dataclass
class FakeSessions:
    """One attached client, who has something to say until it is served `packets` times."""

    packets: int = 0
    served: int = 0
    epoll: select.epoll = field(default_factory=select.epoll)

    def __post_init__(self) -> None:
        self.fd = os.eventfd(1 if self.packets else 0)
        self.epoll.register(self.fd, select.EPOLLIN)

    def serve(self, fd: int, events: int, now: float) -> None:
        self.served += 1
        if self.served == self.packets:
            os.eventfd_read(self.fd)

    def tell_retired(self, retired: object) -> None: ...

    def tell_progress(self, progress: object) -> None: ...


class FakeServer:
    monitor_fd = os.eventfd(0)

    def ring_on(self, fd: int) -> None: ...


class RestoringMover:
    """A tier that always has more to tell, as while a million blocks come back."""

    def __init__(self, mailbox: Mailbox[DaemonSnapshot]) -> None:
        self._mailbox = mailbox
        self.collected = 0
        mailbox.wake()

    def carry_out(self, effects: object, freed: object, now: float) -> None: ...

    def collect(self, now: float) -> None:
        self.collected += 1
        self._mailbox.wake()


@pytest.fixture
def mailbox() -> Iterator[Mailbox[DaemonSnapshot]]:
    made: Mailbox[DaemonSnapshot] = Mailbox()
    yield made
    made.close()


def owner_of(mailbox: Mailbox[DaemonSnapshot], sessions: FakeSessions, mover: RestoringMover) -> Owner:
    anything = cast(Any, None)
    return Owner(
        mailbox=mailbox,
        store=Store(StoreConfig(1 << 20, 1 << 20), lambda: 1),
        verbs=anything,
        server=cast(Any, FakeServer()),
        sessions=cast(Any, sessions),
        memory=anything,
        tiers=(),
        mover=cast(Any, mover),
        boot_id=b"",
        runtime_dir="",
        message_bytes_max=1,
        tick=lambda now: None,
    )


def test_a_turn_takes_one_part_of_what_comes_back_from_disk(mailbox: Mailbox[DaemonSnapshot]) -> None:
    """A part is a thousand blocks: a request waits for one of them, and the loop is told that there is more."""
    mover = RestoringMover(mailbox)
    owner = owner_of(mailbox, FakeSessions(), mover)
    owner._serve_descriptors(0.0)
    assert mover.collected == 1
    assert owner._unserved


def test_store_waits_for_releases_and_not_for_what_comes_back_from_disk(mailbox: Mailbox[DaemonSnapshot]) -> None:
    mover, sessions = RestoringMover(mailbox), FakeSessions(packets=5)
    owner = owner_of(mailbox, sessions, mover)
    owner._catch_up(0.0)
    assert sessions.served == 5
    assert mover.collected == 0
    assert owner._unserved


class IdleMemory:
    def carry_out(self, effects: object) -> CarriedOut:
        return CarriedOut([], [], [])


def test_what_the_operator_should_know_is_logged_once(
    mailbox: Mailbox[DaemonSnapshot], caplog: pytest.LogCaptureFixture
) -> None:
    nvme = NvmeConfig(1 << 20, 8192)
    store = Store(StoreConfig(1 << 20, 1 << 20, nvme=nvme), lambda: 1)
    owner = owner_of(mailbox, FakeSessions(), RestoringMover(mailbox))
    owner._store, owner._memory = store, cast(Any, IdleMemory())
    store.open_session(1, 1000)
    store.open_namespace(1, NamespaceSpec("m", "1", "uint8", 16, (8192,)))
    owner.carry_out()
    owner.carry_out()
    [said] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "memory alone" in said.message
