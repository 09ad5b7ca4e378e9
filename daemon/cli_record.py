"""``forebay record``: what clients ask of a running daemon, written to a trace that ``forebay replay`` reads.

One JSON object a line, in Mooncake's open format. In place of a hash stands a digest of it under a key that is drawn
for each recording and kept nowhere, so that no prompt can be looked up in a trace, and no two traces compared. The
daemon never waits for this process: what it does not fetch in time is dropped there, and counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import IO, cast

from forebay.daemon.cli import Exit
from forebay.daemon.cli_tools import asking, fetch_status
from forebay.daemon.control_link import ControlLink
from forebay.kvstore.errors import BadRequest, PeerLost
from forebay.transports.messages import (
    FindNamespaceReply,
    RecordedReply,
    RecordedRequest,
    RecordReply,
    RecordRequest,
    split_hashes,
    split_u64,
)

_POLL_S = 0.05
_LAST_S = 2.0
_KEY_BYTES = 32
_ID_SHIFT = 11
"""Ids have 53 bits, so that readers that take every number for a double keep them."""


class _Trace:
    """The file, and what has been written to it."""

    def __init__(self, lines: IO[bytes], found: FindNamespaceReply, bytes_max: int) -> None:
        self.requests = self.blocks = self.size_bytes = 0
        self._lines = lines
        self._found = found
        self._bytes_max = bytes_max
        self._key = secrets.token_bytes(_KEY_BYTES)

    def write(self, reply: RecordedReply) -> bool:
        """Write what was taken; False when the file is as large as it may be."""
        numbers, names = split_u64(reply.requests), split_hashes(reply.blob, self._found.hash_bytes)
        at = 0
        for after_us, count in zip(numbers[::2], numbers[1::2], strict=True):
            line = self._line(after_us, names[at : at + count])
            at += count
            if self.size_bytes + len(line) > self._bytes_max:
                return False
            self._lines.write(line)
            self.requests, self.blocks, self.size_bytes = (
                self.requests + 1,
                self.blocks + count,
                self.size_bytes + len(line),
            )
        return True

    def _line(self, after_us: int, names: list[bytes]) -> bytes:
        request = {
            "timestamp": after_us // 1000,
            "input_length": len(names) * self._found.block_tokens,
            "output_length": 0,
            "hash_ids": [self._id(name) for name in names],
        }
        return json.dumps(request).encode() + b"\n"

    def _id(self, name: bytes) -> int:
        return int.from_bytes(blake2b(name, digest_size=8, key=self._key).digest(), "big") >> _ID_SHIFT


def record(arguments: argparse.Namespace) -> int:
    """Exit 1 when nothing was asked for; 2 when the file is there already or cannot be made."""
    with ExitStack() as parts:
        try:
            lines = parts.enter_context(_opened(Path(arguments.output)))
        except OSError as error:
            print(f"forebay record: {error.strerror}: {arguments.output}", file=sys.stderr)
            return Exit.USAGE
        arguments.lines = lines
        return _record(arguments)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A new file for its owner alone, compressed by its name."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as raw:
        if path.suffix != ".gz":
            yield raw
            return
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as zipped:
            yield cast("IO[bytes]", zipped)


@asking
def _record(arguments: argparse.Namespace, link: ControlLink) -> int:
    found = link.find_namespace(arguments.namespace or _only_namespace(link), 0)
    trace = _Trace(arguments.lines, found, arguments.bytes)
    with _interruptible() as interrupted:
        link.call(RecordRequest(found.ns, max(1, int(arguments.seconds * 1000)), arguments.requests), RecordReply)
        print(f"recording to {arguments.output}; Ctrl-C ends it", file=sys.stderr)
        dropped, end = _follow(link, trace, interrupted)
    answer = {
        "file": arguments.output, "requests": trace.requests, "blocks": trace.blocks, "bytes": trace.size_bytes,
        "block_tokens": found.block_tokens, "dropped": dropped, "ended_by": end,
    }  # fmt: skip
    text = f"{trace.requests} requests of {trace.blocks} blocks, {dropped} dropped, ended by {end}"
    hint = f"\nforebay replay {arguments.output} --block-tokens {found.block_tokens}" if trace.requests else ""
    print(json.dumps(answer) if arguments.json else text + hint)
    return Exit.OK if trace.requests else Exit.NEGATIVE


def _follow(link: ControlLink, trace: _Trace, interrupted: Callable[[], bool]) -> tuple[int, str]:
    """Fetch and write until it ends; how many requests were dropped, and why it ended.

    After an interrupt what has come until then is fetched still.
    """
    dropped, give_up_s, pause = 0, 0.0, threading.Event()
    while True:
        last = interrupted()
        if last and not give_up_s:
            give_up_s = time.monotonic() + _LAST_S
        try:
            reply = link.call(RecordedRequest(), RecordedReply)
        except PeerLost:
            return dropped, "the daemon's end"
        dropped = reply.dropped
        if not trace.write(reply):
            return dropped, "its size"
        if reply.ended:
            return dropped, "its time or number of requests"
        if last and (not reply.requests or time.monotonic() > give_up_s):
            return dropped, "Ctrl-C"
        if not reply.requests:
            pause.wait(_POLL_S)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM are noted, and end nothing by themselves."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _only_namespace(link: ControlLink) -> bytes:
    """The fingerprint of the daemon's namespace; raises BadRequest unless it has just one."""
    found = [str(each["fingerprint"]) for each in fetch_status(link)["store"]["namespaces"]]
    if len(found) != 1:
        named = ", ".join(each[:12] for each in found[:8]) or "none"
        raise BadRequest(f"name the namespace to record; there are {len(found)}: {named}")
    return bytes.fromhex(found[0])
