"""systemd's notification protocol: one datagram per message to ``NOTIFY_SOCKET``.

Written here because it is a page and the alternatives are a dependency or a C library. Whether and where to notify is
read from the environment by ``config.environment`` and passed in; without it every call does nothing.
Source: sd_notify(3), "Notes" and "Standalone implementations".
"""

from __future__ import annotations

import logging
import socket

from forebay.daemon.logging import fields

log = logging.getLogger(__name__)

STATUS_CHARS_MAX = 512


class Notifier:
    """Sends the daemon's state to the service manager. Never blocks and never raises: a lost message is logged once.

    Args:
        address: value of NOTIFY_SOCKET: a path, or ``@name`` for an abstract socket; None sends nothing.
        watchdog_usec: value of WATCHDOG_USEC; None when the service manager does not watch.
    """

    def __init__(self, address: str | None, watchdog_usec: int | None = None) -> None:
        self.watchdog_interval_s = watchdog_usec / 2e6 if address and watchdog_usec else None
        self._next_watchdog_s = 0.0
        self._failed = False
        self._socket: socket.socket | None = None
        if address:
            self._connect(address)

    def _connect(self, address: str) -> None:
        target = "\0" + address[1:] if address.startswith("@") else address
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        opened.setblocking(False)
        try:
            opened.connect(target)
        except OSError as error:
            opened.close()
            self._lost(error)
            return
        self._socket = opened

    def ready(self, status: str) -> None:
        """The daemon answers requests."""
        self._send("READY=1", status)

    def reloading(self, now_s: float) -> None:
        """SIGHUP is being handled; ``ready`` ends it. ``now_s`` is CLOCK_MONOTONIC, which systemd asks for."""
        self._send("RELOADING=1", "reloading", f"MONOTONIC_USEC={int(now_s * 1e6)}")

    def stopping(self, status: str) -> None:
        self._send("STOPPING=1", status)

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._send("", status)

    def watchdog(self, now_s: float) -> None:
        """Say "alive" when half the watchdog's time has passed since the last; call it from every turn of the loop."""
        if self.watchdog_interval_s is not None and now_s >= self._next_watchdog_s:
            self._next_watchdog_s = now_s + self.watchdog_interval_s
            self._send("WATCHDOG=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, state: str, status: str = "", more: str = "") -> None:
        if self._socket is None:
            return
        one_line = " ".join(status.split())[:STATUS_CHARS_MAX]
        lines = [state, f"STATUS={one_line}" if one_line else "", more]
        try:
            self._socket.send("\n".join(line for line in lines if line).encode())
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if not self._failed:
            log.warning("the service manager cannot be notified", extra=fields(error=error))
        self._failed = True
