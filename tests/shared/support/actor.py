"""A client process that stops at a chosen step of a store or a fetch, so that a test can kill or freeze it there.

    python -P actor.py RUNTIME_DIR STEP SEED BLOCKS [freeze]

It prints the step's name when it is there and goes on when told to on standard input; with `freeze` it stops itself
(SIGSTOP) instead. At the end it prints what came of it as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from forebay.client import Client
from forebay.client.copier import CopyPlan, NumpyCopier
from forebay.kvstore.hashing import PrefixHasher
from forebay.kvstore.namespace import NamespaceSpec

BLOCK_BYTES = 256 << 10
SPEC = NamespaceSpec("actor", "1", "uint8", 4, (BLOCK_BYTES,))
STORE_STEPS = ("reserved", "half_written", "written")
FETCH_STEPS = ("leased", "half_read", "read")
WAIT_S = 30.0


def chain(seed: int, blocks: int) -> list[bytes]:
    """The hashes of a conversation that differs from that of any other seed from its first block on."""
    return PrefixHasher(SPEC).hashes(range(seed * 100_000, seed * 100_000 + 4 * blocks))


def payload(seed: int, blocks: int) -> NDArray[np.uint8]:
    """Bytes that tell whose they are, (blocks, BLOCK_BYTES)."""
    return np.random.default_rng(seed).integers(1, 255, (blocks, BLOCK_BYTES), dtype=np.uint8)


class _PausingCopier:
    """Copies as usual, but pauses at `step`: before, in the middle of, or after the copy."""

    def __init__(self, step: str, freeze: bool) -> None:
        self._copier = NumpyCopier()
        self._step = step
        self._freeze = freeze

    def gather(self, plan: CopyPlan) -> Sequence[int]:
        return self._copy(plan, self._copier.gather, STORE_STEPS)

    def scatter(self, plan: CopyPlan) -> Sequence[int]:
        return self._copy(plan, self._copier.scatter, FETCH_STEPS)

    def _copy(self, plan: CopyPlan, copy: Any, steps: tuple[str, str, str]) -> Sequence[int]:
        before, middle, after = steps
        self._pause_at(before)
        half = len(plan.addresses) // 2
        failed = list(copy(_part(plan, slice(0, half))))
        self._pause_at(middle)
        failed += [half + position for position in copy(_part(plan, slice(half, None)))]
        self._pause_at(after)
        return failed

    def _pause_at(self, step: str) -> None:
        if step != self._step:
            return
        print(step, flush=True)
        if self._freeze:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            sys.stdin.readline()


def _part(plan: CopyPlan, part: slice) -> CopyPlan:
    return replace(plan, block_ids=plan.block_ids[part], addresses=plan.addresses[part])


def main(runtime_dir: str, step: str, seed: int, blocks: int, freeze: bool) -> None:
    with Client(runtime_dir, copier=_PausingCopier(step, freeze), timeout_ms=10_000) as client:
        ns = client.open_namespace(SPEC)
        if step in STORE_STEPS:
            stored = client.store(ns, chain(seed, blocks), payload(seed, blocks))
            print(json.dumps({"committed": stored.committed, "outcomes": [o.name for o in stored.outcomes]}))
            return
        memory = np.zeros((blocks, BLOCK_BYTES), np.uint8)
        fetched = client.fetch(ns, chain(seed, blocks), memory)
        right = bool((memory[: fetched.blocks] == payload(seed, blocks)[: fetched.blocks]).all())
        print(json.dumps({"blocks": fetched.blocks, "reason": fetched.reason, "right": right}))


class Actor:
    """The test's side: a running actor that has reached its step."""

    def __init__(self, runtime_dir: Path, step: str, *, seed: int = 1, blocks: int = 8, freeze: bool = False) -> None:
        command = [sys.executable, "-P", __file__, str(runtime_dir), step, str(seed), str(blocks)]
        self.process = subprocess.Popen(
            command + ["freeze"] * freeze, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        reached = self.process.stdout.readline().strip()
        assert reached == step, f"the actor said {reached!r} instead of reaching {step!r}"
        if freeze:
            _, status = os.waitpid(self.process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), "the actor did not freeze"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL, frozen or not."""
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)

    def go_on(self) -> dict[str, Any]:
        """Let it finish; what came of it."""
        self.process.send_signal(signal.SIGCONT)
        output, _ = self.process.communicate("go\n", timeout=WAIT_S)
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return answer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), "freeze" in sys.argv[5:])
