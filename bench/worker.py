"""A client process that does what it is told, line by line, in JSON: the others on the machine while one is measured.

`python -P -m forebay.bench.worker RUNTIME_DIR`. Orders: `attach`, `churn` (store and fetch until the next line),
`run` (one thing over and over, from one given time to another), `present` (store blocks that are there already, out
of memory that cannot be read), `cold` (make blocks that are on the drive only), `warm` (prefetch those) and `keep`
(store new ones and wait until they are durable, both until the next line). It ends with its standard input.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from forebay.bench.bounds import Memcpy, pages_of
from forebay.bench.engine_memory import BY_NAME, Pool, chain, contiguous
from forebay.bench.nvme import ColdChains
from forebay.client import Client, SegmentTable
from forebay.kvstore.errors import ForebayError


class Failed(Exception):
    """An answer that a benchmark must not build on."""


class Worker:
    """The state between orders."""

    def __init__(self, runtime_dir: str) -> None:
        self._client = Client(runtime_dir, f"worker {os.getpid()}", strict=True, budget_ms=500, timeout_ms=10_000)
        self._stored = 0

    def attach(self, layout: str, total_bytes: int) -> dict[str, Any]:
        """Make the engine's memory and open the namespace."""
        self._pool = Pool(BY_NAME[layout], total_bytes)
        self._namespace = self._client.open_namespace(self._pool.layout.spec)
        self._shared = chain("shared", self._pool.blocks)
        self._memcpy = Memcpy(contiguous(self._pool), pages_of(self._client.status()))
        return {}

    def churn(self) -> dict[str, Any]:
        """Store new blocks and fetch them, without a pause, until there is another line to read."""
        return {"bytes": self._until_told(lambda: self.store() + self._fetch(self._last))}

    def cold(self, layout: str, chain_bytes: int, chains: int) -> dict[str, Any]:
        """Make the blocks that `warm` asks for."""
        self._cold = ColdChains(self._client, BY_NAME[layout], chain_bytes, chains, str(os.getpid()))
        self._cold.write()
        return {}

    def warm(self) -> dict[str, Any]:
        """Ask for them ahead of need, chain after chain, so that the drive always has the next to read."""
        return {"bytes": self._until_told(self._cold.warm_next)}

    def keep(self) -> dict[str, Any]:
        """Store new blocks as fast as the drive takes them, until there is another line to read.

        No copy is made, as where a GPU writes the slots: what saturates a drive should take no core of others.
        """
        return {"bytes": self._until_told(self._store_durably)}

    def _store_durably(self) -> int:
        self._stored += 1
        hashes = chain(f"{os.getpid()} {self._stored}", self._pool.blocks)
        with self._client.reserve(self._namespace, hashes) as reservation:
            committed = reservation.commit()
        if not committed:
            raise Failed("nothing of a reservation could be stored")
        self._client.persist(self._namespace, hashes)
        return committed * self._pool.layout.block_bytes

    def _until_told(self, once: Callable[[], int]) -> int:
        moved = 0
        while not select.select([sys.stdin], [], [], 0)[0]:
            moved += once()
        return moved

    def run(self, what: str, begin_s: float, end_s: float) -> dict[str, Any]:
        """Do one thing from `begin_s` to `end_s` of the machine's monotonic clock."""
        once = self._once(what)
        once()
        select.select([], [], [], max(0.0, begin_s - time.monotonic()))
        moved, begun = 0, time.monotonic()
        while time.monotonic() < end_s:
            moved += once()
        return {"bytes": moved, "begun_s": begun, "ended_s": time.monotonic()}

    def present(self, layout: str, label: str, blocks: int) -> dict[str, Any]:
        """Store blocks that are there; reading one byte of the source would kill this process."""
        spec = BY_NAME[layout].spec
        namespace = self._client.open_namespace(spec)
        unreadable = mmap.mmap(-1, blocks * spec.block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
        address = int(np.frombuffer(unreadable, np.uint8).__array_interface__["data"][0])
        table = SegmentTable.from_pointers([address], [spec.block_bytes], [spec.block_bytes], blocks, owner=unreadable)
        result = self._client.store(namespace, chain(label, blocks), table)
        return {"present": result.present, "committed": result.committed, "bytes": result.bytes}

    def store(self) -> int:
        """Store blocks nobody has stored."""
        self._stored += 1
        self._last = chain(f"{os.getpid()} {self._stored}", self._pool.blocks)
        result = self._client.store(self._namespace, self._last, self._pool.table, self._pool.block_ids)
        if result.rejected and result.reason:
            raise Failed(f"store: {result.reason}")
        return result.bytes

    def fill(self) -> dict[str, Any]:
        """Store as much as the tier holds, so that this process has mapped and touched every slab."""
        capacity = int(self._client.status()["tiers"][0]["capacity_bytes"])
        for _ in range(capacity // self._pool.total_bytes + 1):
            self.store()
        return {}

    def share(self) -> dict[str, Any]:
        """Store what all workers fetch."""
        result = self._client.store(self._namespace, self._shared, self._pool.table, self._pool.block_ids)
        return {"committed": result.committed}

    def _fetch(self, hashes: list[bytes]) -> int:
        return self._client.fetch(self._namespace, hashes, self._pool.table, self._pool.block_ids).bytes

    def _fetch_shared(self) -> int:
        moved = self._fetch(self._shared)
        if moved != self._pool.total_bytes:
            raise Failed(f"fetched {moved} of {self._pool.total_bytes} bytes")
        return moved

    def _once(self, what: str) -> Callable[[], int]:
        copies = {"memcpy_out": self._memcpy.out(), "memcpy_into": self._memcpy.into()}
        if what in copies:
            copy = copies[what]
            return lambda: self._pool.total_bytes if copy() >= 0 else 0
        return {"fetch": self._fetch_shared, "store": self.store}[what]


def main(runtime_dir: str) -> None:
    """Obey until the end of the input."""
    worker = Worker(runtime_dir)
    orders: dict[str, Callable[..., dict[str, Any]]] = {
        "attach": worker.attach,
        "churn": worker.churn,
        "run": worker.run,
        "present": worker.present,
        "cold": worker.cold,
        "warm": worker.warm,
        "keep": worker.keep,
        "fill": worker.fill,
        "share": worker.share,
    }
    for line in iter(sys.stdin.buffer.raw.readline, b""):  # type: ignore[union-attr]
        asked = json.loads(line)
        order = orders.get(asked.pop("order"))
        if order is None:
            continue  # a line that only ends `churn`
        try:
            answer = order(**asked)
        except (ForebayError, Failed, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
