"""`python -P -m forebay.bench.eta`: how long loads were said to take, against how long they took.

A daemon of its own holds chains of several lengths, once in memory and once on the drive alone. Each is looked up,
which says how long loading it takes, and fetched, which takes as long as it takes; the clients' reports and the
daemon's own measurements have had some time to settle. Printed: the median error, relative to what it took.

Exit status: 0 both medians at most 20 %, 1 not so.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

import numpy as np

from forebay.bench.engine_memory import chain
from forebay.bench.processes import BenchError, Daemon
from forebay.client import Client, NamespaceSpec
from forebay.kvstore.errors import ForebayError

MIB = 1 << 20
BLOCK_BYTES = MIB
LENGTHS = (4, 8, 16, 32)
"""Blocks of the chains."""
WARM_S, MEASURED_S, ROUNDS = 4.0, 4.0, 15
"""Loads before those that count, for reports are made a few times a second; then so long, and so many rounds of all
chains at least: what else the machine does comes and goes within seconds."""
ERROR_MAX = 0.20
HOST_BYTES, SMALL_HOST_BYTES, NVME_BYTES = 256 * MIB, 64 * MIB, 1024 * MIB
PERSIST_MS = 20_000.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -P -m forebay.bench.eta", description="Predicted load times.")
    parser.add_argument("--path", type=Path, default=Path("/var/tmp"), help="whose drive is measured")  # noqa: S108
    parsed = parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(prefix="forebay-eta-"))
    drive = Path(tempfile.mkdtemp(prefix="forebay-eta-", dir=parsed.path))
    try:
        errors = {"host": host_errors(directory / "host"), "nvme": nvme_errors(directory / "nvme", drive)}
    except (BenchError, ForebayError, OSError) as error:
        print(f"eta: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(drive, ignore_errors=True)
    for tier, found in errors.items():
        p90 = quantiles(found, n=10)[-1]
        print(f"{tier}: median error {100 * median(found):.1f} %, p90 {100 * p90:.1f} %, of {len(found)} loads")
    return 0 if all(median(found) <= ERROR_MAX for found in errors.values()) else 1


def host_errors(directory: Path) -> list[float]:
    """Of loads out of memory."""
    with Daemon(directory, HOST_BYTES, settings={"host.slab_bytes": 16 * MIB}) as daemon:
        daemon.populated()
        with daemon.client() as client:
            return _Loads(client, "host", chains=1).errors()


def nvme_errors(directory: Path, drive: Path) -> list[float]:
    """Of loads from the drive: memory is so small that what was fetched before has left it."""
    settings = {
        "host.slab_bytes": 16 * MIB,
        "nvme.paths": drive / "tier",
        "nvme.bytes": NVME_BYTES,
        "nvme.slab_bytes": 16 * MIB,
    }
    with Daemon(directory, SMALL_HOST_BYTES, settings=settings) as daemon:
        daemon.populated()
        with daemon.client() as client:
            return _Loads(client, "nvme", chains=3).errors()


class _Loads:
    """Chains of `LENGTHS`, so many of each, fetched in turn."""

    def __init__(self, client: Client, tier: str, chains: int) -> None:
        self._client, self._tier = client, tier
        spec = NamespaceSpec("eta", "", "uint8", 16, (BLOCK_BYTES,))
        self._ns = client.open_namespace(spec)
        self._memory = np.zeros((max(LENGTHS), BLOCK_BYTES), np.uint8)
        self._chains = [chain(f"eta {number} {blocks}", blocks) for number in range(chains) for blocks in LENGTHS]
        for names in self._chains:
            client.store(self._ns, names, self._memory[: len(names)])
            if tier == "nvme" and client.persist(self._ns, names, timeout_ms=PERSIST_MS).durable < len(names):
                raise BenchError("a chain did not become durable")

    def errors(self) -> list[float]:
        """One for each load of a chain that lay whole in the tier, once the daemon has measured some."""
        found: list[float] = []
        warm_until_s = time.monotonic() + WARM_S
        while time.monotonic() < warm_until_s:
            for names in self._chains:
                self._error(names)
        rounds, until_s = 0, time.monotonic() + MEASURED_S
        while rounds < ROUNDS or time.monotonic() < until_s:
            found += [error for error in map(self._error, self._chains) if error is not None]
            rounds += 1
        if len(found) < ROUNDS:
            raise BenchError(f"only {len(found)} loads came from {self._tier} alone")
        return found

    def _error(self, names: Sequence[bytes]) -> float | None:
        said = self._client.lookup(self._ns, names)
        begun_s = time.perf_counter()
        fetched = self._client.fetch(self._ns, names, self._memory[: len(names)])
        took_s = time.perf_counter() - begun_s
        if said.by_tier.get(self._tier) != len(names) or fetched.blocks != len(names):
            return None
        return abs(said.load_us / 1e6 - took_s) / took_s


if __name__ == "__main__":
    sys.exit(main())
