"""`python -P -m forebay.bench.gpu_lmcache --lmcache DIR`: how fast LMCache's code copies paged KV on this GPU.

A process of its own, started by `forebay.bench.gpu`, for foreign machine code may end it. DIR is an unpacked wheel of
LMCache 0.5.6, of which only the compiled code is used. The last line of output is one object: `reason`, empty or why
nothing can be copied here; `rates`, shape -> path -> "load" or "store" -> GB/s; `errors`, shape -> path -> text. What
is tried next is said on standard error, so that a crash has a name.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from forebay.bench.figures import GIB
from forebay.bench.gpu_lmcache_copies import PATHS, KvShape, LmcacheCopies, refusal

SHAPES = {"llama": KvShape(32, 2, 16, 2048), "mla": KvShape(61, 1, 16, 1152)}
TURNS = 7
REHEARSALS = 2


def measure(folder: Path, shape: KvShape, path: str) -> dict[str, float]:
    """GB/s of a load and a store of a GiB, from the call until all bytes arrived. Raises RuntimeError: wrong bytes."""
    chunks = -(-GIB // shape.chunk_bytes)
    copies = LmcacheCopies(folder, shape, chunks, path)
    copies.check()
    block_ids = random.Random(7).sample(range(copies.blocks), copies.blocks // 2)

    def gb_per_s(move: Callable[[Sequence[int]], None]) -> float:
        seconds = []
        for _ in range(REHEARSALS + TURNS):
            began = time.perf_counter()
            move(block_ids)
            copies.synchronize()
            seconds.append(time.perf_counter() - began)
        return chunks * shape.chunk_bytes / median(seconds[REHEARSALS:]) / 1e9

    return {"store": gb_per_s(copies.store), "load": gb_per_s(copies.load)}


def unavailable(folder: Path) -> str:
    """Why LMCache's code cannot be run here, for whatever reason; empty where it can."""
    try:
        return refusal(folder)
    except Exception as error:  # noqa: BLE001  # foreign libraries fail in ways of their own
        return f"{type(error).__name__}: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="forebay.bench.gpu_lmcache", description=__doc__)
    parser.add_argument("--lmcache", type=Path, required=True, metavar="DIR", help="an unpacked wheel of LMCache 0.5.6")
    folder = parser.parse_args(arguments).lmcache
    reason = unavailable(folder)
    rates: dict[str, dict[str, dict[str, float]]] = {}
    errors: dict[str, dict[str, str]] = {}
    for name, shape in SHAPES.items() if not reason else ():
        for path in PATHS:
            print(f"{name} {path}", file=sys.stderr, flush=True)
            try:
                rates.setdefault(name, {})[path] = measure(folder, shape, path)
            except Exception as error:  # noqa: BLE001  # the other paths are still wanted
                errors.setdefault(name, {})[path] = f"{type(error).__name__}: {error}"
    print(json.dumps({"reason": reason, "rates": rates, "errors": errors}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
