"""The service manager hears of the daemon's states, and its absence costs nothing."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay.daemon.sdnotify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """What systemd would listen on, and how NOTIFY_SOCKET names it."""
    address = str(tmp_path / "n") if request.param == "path" else f"@forebay-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address.replace("@", "\0", 1) if request.param == "abstract" else address)
        listening.settimeout(2)
        yield address, listening


def test_states_and_status_are_datagrams(manager: tuple[str, socket.socket]) -> None:
    address, listening = manager
    notifier = Notifier(address)
    notifier.ready("serving\n64 GiB")
    notifier.status("filling")
    notifier.reloading(12.5)
    notifier.stopping("draining")
    assert [listening.recv(4096) for _ in range(4)] == [
        b"READY=1\nSTATUS=serving 64 GiB",
        b"STATUS=filling",
        b"RELOADING=1\nSTATUS=reloading\nMONOTONIC_USEC=12500000",
        b"STOPPING=1\nSTATUS=draining",
    ]
    notifier.close()
    notifier.ready("after close: nothing")


def test_the_watchdog_is_fed_at_half_its_time(manager: tuple[str, socket.socket]) -> None:
    address, listening = manager
    notifier = Notifier(address, watchdog_usec=10_000_000)
    assert notifier.watchdog_interval_s == 5
    for now_s in (100.0, 101.0, 104.9, 105.0, 109.0, 111.0):
        notifier.watchdog(now_s)
    listening.setblocking(False)
    received = 0
    while True:
        try:
            assert listening.recv(4096) == b"WATCHDOG=1"
        except BlockingIOError:
            break
        received += 1
    assert received == 3
    notifier.close()


def test_without_a_service_manager_nothing_is_sent() -> None:
    notifier = Notifier(None, watchdog_usec=10)
    notifier.ready("x")
    notifier.watchdog(5.0)
    assert notifier.watchdog_interval_s is None
    notifier.close()


def test_a_service_manager_that_is_gone_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    address = str(tmp_path / "n")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(address)
    notifier = Notifier(address)
    listening.close()
    with caplog.at_level(logging.WARNING, "forebay"):
        notifier.ready("x")
        notifier.ready("y")
    assert len(caplog.records) == 1
    notifier.close()


def test_an_address_that_does_not_exist_is_no_error(tmp_path: Path) -> None:
    Notifier(str(tmp_path / "absent")).ready("x")
