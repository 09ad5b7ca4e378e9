"""What the daemon and a drive's I/O process say to each other: lists in MessagePack, each behind its length.

Both ends are of one version, started one by the other; what makes no sense is a bug and ends the process. Memory comes
on a socket of its own, since a descriptor must not be cut off from the words that belong to it.
"""

from __future__ import annotations

import socket
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgpack

from forebay.tiers.nvme_io import Meter, Part, Work
from forebay.tiers.nvme_jobs import LoadJob, WriteJob

_LENGTH = struct.Struct("<I")
_RECEIVED_BYTES = 1 << 16
_MEMORY = struct.Struct("<QQ")


class Kind(IntEnum):
    """The first item of every message. Down: all but the last two."""

    LOAD = 0
    WRITE = 1
    CANCEL = 2
    DROP = 3
    CLOSE = 4
    DONE = 5
    STATE = 6


@dataclass(slots=True)
class State:
    """How the I/O process is. Meters are totals of its life; `errors` and `failures` are new since the last state."""

    queued_blocks: tuple[int, int] = (0, 0)
    under_way: tuple[int, int] = (0, 0)
    loads: Meter = field(default_factory=Meter)
    writes: Meter = field(default_factory=Meter)
    errors: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def packed(self) -> list[Any]:
        meters = [[meter.counts, meter.sum_s, meter.bytes, meter.blocks] for meter in (self.loads, self.writes)]
        return [self.queued_blocks, self.under_way, *meters, self.errors, self.failures]

    @classmethod
    def unpacked(cls, items: Sequence[Any]) -> State:
        queued, under_way, loads, writes, *rest = items
        return cls((queued[0], queued[1]), (under_way[0], under_way[1]), _meter(loads), _meter(writes), *rest)


def _meter(items: Sequence[Any]) -> Meter:
    meter = Meter()
    meter.counts, meter.sum_s, meter.bytes, meter.blocks = list(items[0]), items[1], items[2], items[3]
    return meter


def frame(message: Sequence[Any]) -> bytes:
    """A message as it goes over the stream."""
    body: bytes = msgpack.packb(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Messages out of a stream, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def receive(self, stream: socket.socket) -> bool:
        """Take what has come, without waiting. False: the other end is closed. Raises OSError."""
        try:
            got = stream.recv(_RECEIVED_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        self._rest += got
        return bool(got)

    def messages(self) -> Iterator[list[Any]]:
        """Those that are whole."""
        at = 0
        while len(self._rest) - at >= _LENGTH.size:
            end = at + _LENGTH.size + _LENGTH.unpack_from(self._rest, at)[0]
            if end > len(self._rest):
                break
            message: list[Any] = msgpack.unpackb(self._rest[at + _LENGTH.size : end])
            at = end
            yield message
        del self._rest[:at]


def pack_part(part_id: int, part: Part) -> bytes:
    """A part's own blocks, as a job of their own."""
    job, blocks = part.work.job, part.blocks
    columns: list[Any] = [job.slots, job.hashes, job.generations, job.memory]
    kind = Kind.LOAD
    if isinstance(job, WriteJob):
        kind = Kind.WRITE
        columns += [job.parents, job.depths]
    if len(blocks) != len(job.slots):
        columns = [[column[block] for block in blocks] for column in columns]
    sizes = (job.slot_bytes, job.payload_bytes, job.namespace_id)
    return frame([kind, part_id, job.job_id, *sizes, list(part.slabs), *map(list, columns)])


def unpack_part(message: Sequence[Any], views: Sequence[memoryview]) -> Part:
    """The part; `views` are its blocks' memory in this process."""
    kind, _, job_id, slot_bytes, payload_bytes, namespace_id, slabs, slots, hashes, generations, _, *rest = message
    common: dict[str, Any] = {
        "job_id": job_id,
        "slot_bytes": slot_bytes,
        "payload_bytes": payload_bytes,
        "namespace_id": namespace_id,
        "slabs": slabs,
        "slots": slots,
        "hashes": hashes,
        "generations": generations,
        "views": views,
    }
    job = LoadJob(**common) if kind == Kind.LOAD else WriteJob(**common, parents=rest[0], depths=rest[1])
    return Part(Work(job), range(len(slots)), slabs)


def memory_of(message: Sequence[Any]) -> list[tuple[int, int]]:
    """Number and byte offset of each block's memory, of a message that carries a part."""
    return [(number, offset) for number, offset in message[10]]


def pack_done(part_id: int, part: Part, state: State) -> bytes:
    """What became of a part's blocks."""
    return frame([Kind.DONE, part_id, bytes(part.work.statuses), part.work.checksums.tobytes(), state.packed()])


def settle(part: Part, statuses: bytes, checksums: bytes) -> None:
    """Put what became of a part's blocks into the work it is a part of."""
    work, sums = part.work, array("Q", checksums)
    for block, status, checksum in zip(part.blocks, statuses, sums, strict=True):
        work.statuses[block] = status
        work.checksums[block] = checksum


def send_memory(channel: socket.socket, number: int, size_bytes: int, fd: int) -> None:
    """Raises BlockingIOError when the channel is full; `socket.send_fds` would wait, whatever its flags say."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))
    channel.sendmsg([_MEMORY.pack(number, size_bytes)], [rights], socket.MSG_DONTWAIT)


def receive_memory(channel: socket.socket) -> tuple[int, int, int]:
    """Number, size and descriptor, the last of which is the caller's now. Raises OSError; EOFError at the end."""
    said, fds, _, _ = socket.recv_fds(channel, _MEMORY.size, 1)
    if not said:
        raise EOFError
    number, size_bytes = _MEMORY.unpack(said)
    return number, size_bytes, fds[0]
