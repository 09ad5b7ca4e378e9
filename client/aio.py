"""The asyncio client.

The other thin shell over `core`: the same operations, results and rules as the blocking client, many at a time on
one event loop. Copies run in the loop's thread pool without the GIL, so the loop goes on turning.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from forebay.client import core
from forebay.client.async_link import AsyncLink
from forebay.client.breaker import Breaker
from forebay.client.copier import LEGACY_STREAM, Copier
from forebay.client.counters import Counters
from forebay.client.device_copier import DeviceCopier
from forebay.client.grants import BaseLease, BaseReservation, nothing_granted, nothing_held
from forebay.client.namespaces import Namespace
from forebay.client.options import ClientOptions, Planning, Verify
from forebay.client.results import (
    BlockOutcome,
    ClientStats,
    FetchResult,
    LookupResult,
    PersistResult,
    PrefetchResult,
    RemovalResult,
    StoreResult,
    reason_of,
)
from forebay.client.segments import SegmentTable
from forebay.kvstore.errors import BadRequest, ForebayError, LayoutError, PeerLost, Timeout
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import StopReason
from forebay.kvstore.planner import NO_BACKLOG, Backlog
from forebay.transports.messages import (
    CheckReply,
    CheckRequest,
    EvictScope,
    PingReply,
    PingRequest,
    StatusReply,
    StatusRequest,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Tried(Generic[T]):
    """What became of an operation: a value and the link it came over, or an error."""

    value: T | None
    link: AsyncLink | None
    error: ForebayError | None


class AsyncClient:
    """A connection to the daemon on this machine, for one event loop at a time.

    The same promises as `forebay.client.Client`: with no daemon, a hung one or a restarted one every call answers a
    miss, within `budget_ms` or once within `timeout_ms`; LayoutError and BadRequest, the caller's own bugs, raise
    whether a daemon is there or not; `strict` raises every error typed.

    Tasks: any number may call at once. A cancelled call first lets a copy under way end, then gives back its lease
    or slots. Threads: not safe; each loop needs a client of its own. Fork: a child with a loop of its own may go on
    using the client, as a session of its own. Close: `await close()`, or use it as an async context manager.
    """

    def __init__(
        self,
        runtime_dir: str | Path | None = None,
        name: str = "",
        client_group: bytes = b"",
        *,
        strict: bool = False,
        budget_ms: float = 5.0,
        timeout_ms: float = 1000.0,
        copy_threads: int = 0,
        copy_cpus: Sequence[int] = (),
        verify: Verify = "off",
        checksum_stores: bool = False,
        plan: Planning = "auto",
        copier: Copier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Does not connect yet. For the options see `ClientOptions`; `copier` and `clock` are for tests."""
        self.options = ClientOptions(
            runtime_dir,
            name,
            client_group,
            strict,
            budget_ms,
            timeout_ms,
            copy_threads,
            tuple(copy_cpus),
            verify,
            checksum_stores,
            plan,
        )
        self._copier = copier or self.options.copier()
        self._breaker = Breaker(clock)
        self._counters = Counters()
        self._attaching: asyncio.Task[AsyncLink] | None = None
        self._link: AsyncLink | None = None
        self._closed = False
        _live.add(self)

    # Set-up

    async def prepare(self, device: int) -> None:
        """Make what moves blocks of that CUDA device's memory now, not with its first block.

        Raises DmaError in any mode: no cupy, no driver, no such device. Blocking: seconds, where kernels are compiled.
        """
        copier = self._copier
        if isinstance(copier, DeviceCopier):
            await asyncio.to_thread(copier.prepare, device)

    # Namespaces

    async def open_namespace(self, spec: NamespaceSpec) -> Namespace:
        """A handle for the spec, valid for the client's life, over restarts of the daemon too.

        With a daemon there, the namespace is opened at once. Raises BadRequest (the spec) and LayoutError (a block
        fits no slab) in any mode: set-up is when an engine should hear of them.
        """
        ns = Namespace.of(spec)
        tried = await self._try(lambda attachment: core.open_namespace(attachment, ns))
        if isinstance(tried.error, (BadRequest, LayoutError)):
            raise tried.error
        return ns

    async def find_namespace(self, fingerprint_prefix: bytes, rank: int = 0) -> Namespace:
        """A namespace that exists, by the first bytes of its group fingerprint; for tools. Always raises."""
        tried = await self._try(lambda attachment: core.find_namespace(attachment, fingerprint_prefix, rank))
        if tried.value is None:
            raise tried.error or PeerLost("no daemon")
        return tried.value

    # Reading

    async def lookup(self, ns: Namespace, hashes: Sequence[bytes], backlog: Backlog = NO_BACKLOG) -> LookupResult:
        """How many leading blocks are stored, and how many are worth loading; takes no lease.

        `backlog` is what waits in front of the engine: it may load meanwhile, and computing delays it.
        Blocking: one round trip.
        """
        blob, mode = ns.blob(hashes), self.options.plan
        return await self._run(lambda attachment: core.lookup(attachment, ns, blob, backlog, mode), LookupResult())

    async def acquire(self, ns: Namespace, hashes: Sequence[bytes], ttl_ms: int = 0) -> AsyncLease:
        """Lease the leading blocks to read them in place; use it in a `with`. 0: the daemon's time to live.

        (A plain `with`, not an `async with`: giving back does not wait.)

        A lease of no blocks is a miss, and false.
        """
        ns.check_hashes(hashes)
        tried = await self._try(lambda attachment: core.acquire(attachment, ns, hashes, ttl_ms))
        return AsyncLease(tried.value or nothing_held(ns), tried.link, self, owned=True)

    async def resolve(self, ns: Namespace, lease: int) -> AsyncLease:
        """This shard's blocks of a lease that another session of the client group holds; not released here."""
        tried = await self._try(lambda attachment: core.resolve(attachment, ns, lease))
        return AsyncLease(tried.value or nothing_held(ns), tried.link, self, owned=False)

    async def fetch(
        self,
        ns: Namespace,
        hashes: Sequence[bytes],
        destination: object,
        block_ids: Iterable[int] | None = None,
        *,
        ttl_ms: int = 0,
        deadline_ms: float = core.FETCH_DEADLINE_MS,
        stream: int | None = LEGACY_STREAM,
    ) -> FetchResult:
        """Copy the leading stored blocks into the engine's memory; only `result.blocks` of them are right.

        Args:
            destination: a writable SegmentTable, or an array, tensor or list of them with blocks on axis 0.
            block_ids: where in it each block goes; None: 0, 1, 2, ...
            ttl_ms: how long the blocks are kept from being evicted; 0: the daemon's time to live.
            deadline_ms: how long blocks are waited for altogether, however steadily they come; 0: only those that
                are in memory are copied.
            stream: of blocks in a GPU's memory: handle of the CUDA stream that used them last, such as
                ``torch.cuda.current_stream().cuda_stream``; None: nothing uses them any more. The default comes after
                all streams but those made non-blocking, as torch's own side streams are.
        Raises:
            LayoutError, BadRequest: the memory, the ids or the hashes do not fit the namespace.
        Blocking: one round trip and the copy; blocks of slower tiers are copied as they are read into memory, and the
        fetch ends, with what has come, when none has come for `timeout_ms` or when `deadline_ms` have passed.
        """
        work = core.transfer(ns, hashes, destination, block_ids, writable=True, stream=stream)
        strict, verify = self.options.strict, self.options.verify == "load"
        patience = core.Patience(time.monotonic() + deadline_ms / 1000, plans=self.options.plan == "auto")
        tried = await self._try(
            lambda attachment: core.fetch(attachment, work, ttl_ms, patience, strict=strict, verify=verify)
        )
        if tried.value is None:
            return FetchResult(reason=reason_of(tried.error or PeerLost()))
        self._counters.fetched(tried.value)
        return tried.value

    async def prefetch(self, ns: Namespace, hashes: Sequence[bytes]) -> PrefetchResult:
        """Ask that the leading blocks be brought to memory; returns at once."""
        ns.check_hashes(hashes)
        return await self._run(lambda attachment: core.prefetch(attachment, ns, hashes), PrefetchResult())

    # Writing

    async def reserve(
        self, ns: Namespace, hashes: Sequence[bytes], parent: bytes = b"", *, priority: int = 0
    ) -> AsyncReservation:
        """Take slots for blocks that continue `parent`, to write them in place; use it in a plain `with`.

        `priority` is that of `store`.
        """
        ns.check_hashes(hashes)
        priority = core.checked_priority(priority)
        tried = await self._try(lambda attachment: core.reserve(attachment, ns, parent, hashes, priority), keep=True)
        return AsyncReservation(tried.value or nothing_granted(ns, len(hashes)), tried.link, self)

    async def store(
        self,
        ns: Namespace,
        hashes: Sequence[bytes],
        source: object,
        block_ids: Iterable[int] | None = None,
        *,
        parent: bytes = b"",
        priority: int = 0,
        stream: int | None = LEGACY_STREAM,
    ) -> StoreResult:
        """Store the blocks of a chain that are not stored yet; the result has each block's outcome.

        Args:
            hashes: a chain: each block continues the one before it, the first continues `parent`.
            source: a SegmentTable, or an array, tensor or list of them with blocks on axis 0. It must not change
                until the call returns.
            block_ids: where in it each block lies; None: 0, 1, 2, ...
            priority: 0 to 3: the blocks stay in memory as if a hit on them were worth 4 ** priority hits. Blocks of any
                priority are a quarter of it at most, the rest has 0; for what is here already nothing changes.
            stream: of blocks in a GPU's memory: the CUDA stream that writes them, as for `fetch`.
        Raises:
            LayoutError, BadRequest: the memory, the ids or the hashes do not fit the namespace.
        Blocking: a round trip and the copy per batch of at most 256 MiB or 256 blocks, and one more.
        """
        work = core.transfer(ns, hashes, source, block_ids, writable=False, stream=stream)
        work = replace(work, priority=core.checked_priority(priority))
        strict, sums = self.options.strict, self.options.checksum_stores
        tried = await self._try(
            lambda attachment: core.store(attachment, work, parent, strict=strict, with_checksums=sums)
        )
        if tried.value is None:
            reason = reason_of(tried.error or PeerLost())
            return StoreResult.nothing(len(hashes), BlockOutcome.UNAVAILABLE, reason)
        self._counters.stored(tried.value)
        return tried.value

    # Keeping and removing

    async def pin(self, ns: Namespace, hashes: Sequence[bytes]) -> int:
        """Keep the leading blocks until unpinned; returns how many. Strict: QuotaExceeded beyond the quota."""
        ns.check_hashes(hashes)
        return await self._run(lambda attachment: core.pin(attachment, ns, hashes), 0)

    async def persist(self, ns: Namespace, hashes: Sequence[bytes], timeout_ms: float | None = None) -> PersistResult:
        """Have the leading blocks written to storage that outlives the daemon, and wait until they are.

        Asks again, at growing intervals, for `timeout_ms` (None: the client's; 0: asks once) and then tells how many
        are durable and how many were still being written; those go on being written.
        """
        ns.check_hashes(hashes)
        wait_s = (self.options.timeout_ms if timeout_ms is None else timeout_ms) / 1000
        return await self._run(lambda attachment: core.persist(attachment, ns, hashes, wait_s), PersistResult())

    async def report_prefill(self, tokens: int, depth_tokens: int, seconds: float) -> bool:
        """Tell how long it took to compute `tokens` after `depth_tokens` that were there; lookups' advice follows.

        Returns whether the daemon was told.
        """
        return await self._run(lambda _: core.report(tokens, depth_tokens, seconds), False)

    async def report_copy(self, size_bytes: int, seconds: float) -> bool:
        """Tell how long it took to copy blocks out of host memory; returns whether the daemon was told."""
        return await self._run(lambda _: core.report(copied_bytes=size_bytes, copy_s=seconds), False)

    async def unpin(self, ns: Namespace, hashes: Sequence[bytes]) -> int:
        """Returns how many pins ended."""
        ns.check_hashes(hashes)
        return await self._run(lambda attachment: core.unpin(attachment, ns, hashes), 0)

    async def evict(
        self,
        ns: Namespace,
        hashes: Sequence[bytes] = (),
        scope: EvictScope = EvictScope.BLOCKS,
        *,
        dry_run: bool = False,
    ) -> RemovalResult:
        """Remove the blocks, these and all that continue them (PREFIX), or the whole NAMESPACE."""
        ns.check_hashes(hashes)
        return await self._run(lambda attachment: core.evict(attachment, ns, hashes, scope, dry_run), RemovalResult())

    async def touch(self, ns: Namespace, hashes: Sequence[bytes]) -> int:
        """Hint: these blocks are in use. Returns how many are stored."""
        ns.check_hashes(hashes)
        return await self._run(lambda attachment: core.touch(attachment, ns, hashes), 0)

    async def done(self, ns: Namespace, hashes: Sequence[bytes], keep: int = 0) -> int:
        """Hint: the conversation that ends with these blocks is over: those that only it uses go first.

        They stay readable until their room is needed, and whoever asks for them takes the hint back. Blocks that others
        were seen to share stay as they are, and so do the first `keep` of the prompt: others may still ask for them.
        Returns how many blocks go first. Raises BadRequest where `keep` is below 0.
        """
        ns.check_hashes(hashes)
        keep = core.kept_blocks(keep)
        return await self._run(lambda attachment: core.done(attachment, ns, hashes, keep), 0)

    async def stopped(self, ns: Namespace, hashes: Sequence[bytes], reason: StopReason) -> int:
        """Hint: how the answer stopped that these blocks end with; when such conversations go on is learned by that.

        Returns of how many blocks the daemon takes that into account, 0 where it evicts by recency alone.
        """
        ns.check_hashes(hashes)
        reason = core.checked_reason(reason)
        return await self._run(lambda attachment: core.stopped(attachment, ns, hashes, reason), 0)

    async def expect(self, ns: Namespace, hashes: Sequence[bytes], within_s: float) -> int:
        """Hint: these blocks will be asked for again within so long, as after a tool has run: keep them where they are.

        What is in memory stays there, what is on a drive alone stays on that, until the time has passed or this client
        is closed. Returns how many leading ones are kept: a quarter of what the namespace has there, at most. Raises
        BadRequest unless it is from 0.001 to 3600 s.
        """
        ns.check_hashes(hashes)
        within_ms = core.within_ms(within_s)
        return await self._run(lambda attachment: core.expect_blocks(attachment, ns, hashes, within_ms), 0)

    # Telling

    async def ping(self) -> bool:
        """Whether the daemon answers. Blocking: one round trip."""
        return await self._run(lambda _: core.call(PingRequest(), PingReply), None) is not None

    async def status(self) -> dict[str, Any]:
        """The daemon's status document; empty without a daemon."""
        reply = await self._run(lambda _: core.call(StatusRequest(), StatusReply), None)
        document: dict[str, Any] = json.loads(reply.document) if reply is not None else {}
        return document

    async def check(self) -> list[str]:
        """Broken invariants of the daemon, in words. Costs it a walk over everything; for tools. Always raises."""
        tried = await self._try(lambda _: core.call(CheckRequest(), CheckReply))
        if tried.value is None:
            raise tried.error or PeerLost("no daemon")
        return list(tried.value.problems)

    async def clear(self, *, dry_run: bool = False) -> RemovalResult:
        """Remove every block of every namespace; for operators. Strict: Forbidden for others."""
        return await self._run(lambda _: core.clear(dry_run), RemovalResult())

    def stats(self) -> ClientStats:
        """Totals of this client; asks nobody."""
        attached = self._link is not None and self._link.fault is None
        return self._counters.snapshot(self._copier, breaker=self._breaker.state, attached=attached)

    # Life

    async def close(self) -> None:
        """End the session; leases end with it. Later calls are misses. Idempotent."""
        self._closed = True
        if self._attaching is not None:
            await asyncio.wait([self._attaching])
        link, self._link = self._link, None
        if link is not None:
            link.abandon(PeerLost("the client was closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, operation: core.Operation[T], miss: T) -> T:
        tried = await self._try(operation)
        return miss if tried.value is None else tried.value

    async def _try(self, operation: core.Operation[T], *, keep: bool = False) -> _Tried[T]:
        """Run an operation; an error is raised in strict mode, else counted and returned.

        With `keep` a success leaves the link entered, for the caller to leave.
        """
        self._counters.calls += 1
        try:
            link = await self._attached()
            kept = False
            try:
                value = await link.drive(operation(link.attachment))
                kept = keep
                return _Tried(value, link, None)
            finally:
                self._settle(link)
                if not kept:
                    link.leave()
        except ForebayError as error:
            self._counters.failed(error)
            if self.options.strict:
                raise
            return _Tried(None, None, error)

    async def _drive(self, link: AsyncLink, steps: core.Steps[T], miss: T) -> T:
        """Go on with a grant, over the link it came by."""
        link.enter()
        try:
            return await link.drive(steps)
        except ForebayError as error:
            self._counters.failed(error)
            if self.options.strict:
                raise
            return miss
        finally:
            self._settle(link)
            link.leave()

    async def _attached(self) -> AsyncLink:
        """A living link, entered: the one there is, or a new one if the breaker lets us try."""
        link = self._entered()
        if link is not None:
            return link
        if self._closed:
            raise PeerLost("the client was closed")
        if self._attaching is None:
            if not self._breaker.allows():
                raise PeerLost("no daemon; not trying again yet")
            self._attaching = asyncio.get_running_loop().create_task(self._attach())
        link = await asyncio.shield(self._attaching)
        link.enter()
        return link

    def _entered(self) -> AsyncLink | None:
        link = self._link
        if link is None:
            return None
        if link.fault is not None:
            self._settle(link)
            return None
        link.enter()
        return link

    async def _attach(self) -> AsyncLink:
        first = self._breaker.state == "closed"
        wait_ms = self.options.timeout_ms if first else self.options.probe_ms(self._breaker.probe_s)
        try:
            link = await AsyncLink.open(self.options, self._copier, wait_ms / 1000)
        except BaseException:
            self._breaker.failed()
            raise
        finally:
            self._attaching = None
        self._breaker.succeeded()
        self._counters.attachments += 1
        self._link = link
        return link

    def _settle(self, link: AsyncLink) -> None:
        """Throw the link away if it failed; a daemon that hangs is left alone for a while."""
        fault = link.fault
        if fault is None or self._link is not link:
            return
        self._link = None
        if isinstance(fault, Timeout):
            self._breaker.failed()
        link.abandon(fault)

    def _after_fork(self) -> None:
        self._attaching = None
        self._breaker = self._breaker.renewed()
        link, self._link = self._link, None
        if link is not None:
            link.disown()
            _inherited.append(link)


class AsyncLease(BaseLease):
    """A lease of the asyncio client."""

    def __init__(self, held: core.Held, link: AsyncLink | None, client: AsyncClient, *, owned: bool) -> None:
        super().__init__(held, link, owned=owned)
        self._link = link
        self._client = client

    async def wait(self, blocks: int | None = None, timeout_ms: float | None = None) -> int:
        """Wait until `blocks` leading blocks (None: all) may be read; returns how many may.

        Fewer when the others will not come, or not within `timeout_ms` (None: the client's), and 0 when the daemon
        died; strict: the error.
        """
        wanted = len(self) if blocks is None else min(blocks, len(self))
        if self.ready() >= wanted or self._progress.ended or self._link is None or self._holder is None:
            return self._readable()
        wait_s = None if timeout_ms is None else timeout_ms / 1000
        steps = core.more_ready(self.lease_id, wanted - 1, wait_s)
        told = await self._client._drive(self._link, steps, None)
        if told is None:
            return 0
        self._progress = self._progress.merged(told)
        return self._readable()


class AsyncReservation(BaseReservation):
    """A reservation of the asyncio client."""

    def __init__(self, grant: core.Grant, link: AsyncLink | None, client: AsyncClient) -> None:
        super().__init__(grant, link)
        self._link = link
        self._client = client

    async def gather(
        self, source: SegmentTable, block_ids: Iterable[int], *, stream: int | None = LEGACY_STREAM
    ) -> Sequence[int]:
        """Copy the engine's blocks into the slots, one id for each block to write; then commit.

        Returns the positions whose copy failed, ascending: commit them as failed. Where bytes may still be moving all
        have failed, the slots stay with the daemon's quarantine, and commit and abort do nothing.

        Args:
            stream: as for `Client.store`.
        Raises:
            LayoutError: the ids or the memory do not fit.
        Blocking: until the bytes have moved.
        """
        ids = self._checked(source, block_ids)
        if self._holder is None or self._link is None:
            return range(len(ids))
        sums = self._client.options.checksum_stores
        steps = core.fill(self._grant, source, ids, stream, with_checksums=sums)
        return self._filled(await self._client._drive(self._link, steps, None), len(ids))

    async def commit(self, failed: Sequence[int] = ()) -> int:
        """Publish what was written, but for the positions in `failed`; returns how many blocks that were.

        0 when the daemon is gone or the reservation ran out; strict: the error.
        """
        holder, self._holder = self._holder, None
        if holder is None or self._link is None:
            return 0
        try:
            sums = self._client.options.checksum_stores
            steps = core.commit(self._grant, failed, with_checksums=sums, known=self._sums)
            return await self._client._drive(self._link, steps, 0)
        finally:
            holder.leave()


_live: weakref.WeakSet[AsyncClient] = weakref.WeakSet()
_inherited: list[AsyncLink] = []
"""Links of the parent process, kept so that nothing finalizes their sockets in the child."""


def _after_fork_in_child() -> None:
    for client in list(_live):
        client._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
