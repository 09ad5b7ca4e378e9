"""The few things an engine may set about its client; all have defaults that need no thought."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from forebay.client.copy_threads import THREADS_MAX, ParallelCopier, auto_threads
from forebay.client.device_copier import DeviceCopier
from forebay.kvstore.errors import BadRequest
from forebay.transports.packets import CLIENT_GROUP_BYTES_MAX, CLIENT_NAME_CHARS_MAX

Verify: TypeAlias = Literal["off", "load"]
Planning: TypeAlias = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How to reach the daemon and how long to wait for it.

    Attributes:
        runtime_dir: the daemon's runtime directory; None: where the daemon puts it by itself.
        name: what the daemon's status calls this client, at most 128 characters.
        client_group: sessions of one engine that give the same 1 to 32 bytes may resolve each other's leases.
        strict: raise typed errors (for tools) instead of answering misses (for engines).
        budget_ms: the longest a call may wait to find out that no daemon is there; where one hangs, one call after each
            pause may wait a hundredth of that pause if it is longer: 50 ms every 5 s at most.
        timeout_ms: the longest a call waits for one answer of a daemon that is there, or for the next blocks of a
            lease to be read into memory.
        copy_threads: how many threads share a large copy, the calling one among them; 0: one per core this process
            may use, at most 4.
        copy_cpus: cores for the helping threads, one each in turn; empty: any that the process may use. For engines
            that pin their own threads, and for kernels that pack threads on one core.
        verify: ``load`` compares the checksum of each fetched block, where one is known, with the bytes that
            arrived in the engine's memory; a fetch then reads what it wrote once more. A GPU hashes as it copies.
        checksum_stores: send the checksum of each block stored; whoever verifies can then tell a bit that flipped.
            A store then reads what it wrote once more.
        plan: ``auto`` loads as much of what is stored as the daemon advises, ``always`` all of it, ``never`` nothing:
            what lookups' `worth_loading` says, which engines' connectors go by. With ``auto`` fetches also give up, and
            leave the rest to be computed, when the drive takes three times as long as the daemon foresaw, and longer
            than a quarter of what computing takes.
    """

    runtime_dir: str | Path | None = None
    name: str = ""
    client_group: bytes = b""
    strict: bool = False
    budget_ms: float = 5.0
    timeout_ms: float = 1000.0
    copy_threads: int = 0
    copy_cpus: tuple[int, ...] = ()
    verify: Verify = "off"
    checksum_stores: bool = False
    plan: Planning = "auto"

    def __post_init__(self) -> None:
        if len(self.name) > CLIENT_NAME_CHARS_MAX:
            raise BadRequest(f"a client's name has at most {CLIENT_NAME_CHARS_MAX} characters")
        if len(self.client_group) > CLIENT_GROUP_BYTES_MAX:
            raise BadRequest(f"a client group has at most {CLIENT_GROUP_BYTES_MAX} bytes")
        if not 0 < self.budget_ms <= self.timeout_ms:
            raise BadRequest("budget_ms must be positive and at most timeout_ms")
        if not 0 <= self.copy_threads <= THREADS_MAX:
            raise BadRequest(f"copy_threads must be from 0 to {THREADS_MAX}")
        if self.verify not in ("off", "load"):
            raise BadRequest("verify must be 'off' or 'load'")
        if self.plan not in ("auto", "always", "never"):
            raise BadRequest("plan must be 'auto', 'always' or 'never'")

    def probe_ms(self, fair_s: float) -> float:
        """How long to wait for a daemon that was not there, or did not answer, when `fair_s` may be spent on it."""
        return max(self.budget_ms, min(self.timeout_ms, 1000 * fair_s))

    def copier(self) -> DeviceCopier:
        """What moves the bytes of a client with these options."""
        return DeviceCopier(ParallelCopier(self.copy_threads or auto_threads(), self.copy_cpus))
