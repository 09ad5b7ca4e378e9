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
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple, cast

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
_ANSWER_US = 60_000_000
"""So long after a request what is stored beyond its prompt is taken for its answer."""
_WAITING_BLOCKS_MAX = 1 << 20
_ID_SHIFT = 11
"""Ids have 53 bits, so that readers that take every number for a double keep them."""


class _Line(NamedTuple):
    """A request: when it came, the ids of its blocks, and those of the blocks that were stored beyond them."""

    after_us: int
    ids: list[int]
    answer: list[int]


class _Trace:
    """The file, and what is to be written to it: a line waits a minute for blocks of its request's answer."""

    def __init__(self, lines: IO[bytes], found: FindNamespaceReply, bytes_max: int) -> None:
        self.requests = self.blocks = self.size_bytes = 0
        self._lines = lines
        self._found = found
        self._bytes_max = bytes_max
        self._key = secrets.token_bytes(_KEY_BYTES)
        self._waiting: OrderedDict[int, _Line] = OrderedDict()
        self._waiting_blocks = 0

    def take(self, reply: RecordedReply) -> bool:
        """Take what has come; False when the file is as large as it may be."""
        numbers, names = split_u64(reply.requests), split_hashes(reply.blob, self._found.hash_bytes)
        at = 0
        for number, after_us, count in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            ids = [self._id(name) for name in names[at : at + count]]
            at += count
            if not self._add(number, after_us, ids):
                return False
            self._write_settled(after_us)
        return True

    def end(self) -> None:
        """Write what waits still."""
        while self._waiting:
            self._write_first()

    def _add(self, number: int, after_us: int, ids: list[int]) -> bool:
        if number > self.requests:
            line = _Line(after_us, ids, [])
        elif number in self._waiting:
            before = self._waiting[number]
            line = _Line(before.after_us, before.ids, before.answer + ids)
        else:
            return True  # of an answer that took too long
        size_bytes = self.size_bytes + len(self._encoded(line))
        if number in self._waiting:
            size_bytes -= len(self._encoded(self._waiting[number]))
        if size_bytes > self._bytes_max:
            return False
        self.requests, self.size_bytes = max(self.requests, number), size_bytes
        self.blocks += len(ids)
        self._waiting_blocks += len(ids)
        self._waiting[number] = line
        return True

    def _write_settled(self, now_us: int) -> None:
        """Write the lines whose time has come, or for which too many wait."""
        while self._waiting:
            first = next(iter(self._waiting.values()))
            if now_us - first.after_us < _ANSWER_US and self._waiting_blocks <= _WAITING_BLOCKS_MAX:
                return
            self._write_first()

    def _write_first(self) -> None:
        _, line = self._waiting.popitem(last=False)
        self._waiting_blocks -= len(line.ids) + len(line.answer)
        self._lines.write(self._encoded(line))

    def _encoded(self, line: _Line) -> bytes:
        tokens = self._found.block_tokens
        request: dict[str, object] = {
            "timestamp": line.after_us // 1000,
            "input_length": len(line.ids) * tokens,
            "output_length": len(line.answer) * tokens,
            "block_size": tokens,
            "hash_ids": line.ids,
        }
        if line.answer:
            request["output_hash_ids"] = line.answer
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
        try:
            dropped, end = _follow(link, trace, interrupted)
        finally:
            trace.end()
    answer = {
        "file": arguments.output, "requests": trace.requests, "blocks": trace.blocks, "bytes": trace.size_bytes,
        "block_tokens": found.block_tokens, "dropped": dropped, "ended_by": end,
    }  # fmt: skip
    text = f"{trace.requests} requests of {trace.blocks} blocks, {dropped} dropped, ended by {end}"
    hint = f"\nforebay replay {arguments.output}" if trace.requests else ""
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
        if not trace.take(reply):
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
