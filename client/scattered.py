"""Blocks asked for one by one, over calls that answer for leading blocks: which are stored, and fetch those that are.

An engine's host cache asks for pages with gaps: windows of a sliding window, states of a recurrent layer, a page that
was evicted. Lookup and fetch tell how many *leading* blocks there are, so a gap is stepped over, and a long absent
stretch is told by one count (an eviction's dry run) instead of a question for each of its blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from forebay.client.core import FETCH_DEADLINE_MS
from forebay.client.namespaces import Namespace
from forebay.client.results import BlockOutcome
from forebay.client.segments import SegmentTable
from forebay.client.sync import Client

_LOST = frozenset(("miss", "stale", "corrupt", "failed"))
"""Reasons that concern one block; after any other the daemon did not answer, and the rest is not asked for."""

_STORED = frozenset((BlockOutcome.STORED, BlockOutcome.PRESENT, BlockOutcome.IN_FLIGHT))


def stored(client: Client, ns: Namespace, hashes: Sequence[bytes]) -> list[bool]:
    """Whether each block is stored and complete; all False without a daemon.

    Blocking: one round trip when all are, two when none is, about ``2 k log n`` for k stretches among n blocks.
    """
    return _behind(client, ns, hashes, client.lookup(ns, hashes).blocks) if hashes else []


def worth_loading(client: Client, ns: Namespace, hashes: Sequence[bytes]) -> list[bool]:
    """The same of blocks whose leading ones an engine loads, to compute the rest.

    False for all from where, by the daemon's plan, computing is faster. Blocking: as `stored`.
    """
    if not hashes:
        return []
    answer = client.lookup(ns, hashes)
    if answer.worth_loading < answer.blocks:
        return [True] * answer.worth_loading + [False] * (len(hashes) - answer.worth_loading)
    return _behind(client, ns, hashes, answer.blocks)


def _behind(client: Client, ns: Namespace, hashes: Sequence[bytes], leading: int) -> list[bool]:
    """Which blocks are stored, where it is known of the leading ones."""
    found = [True] * leading + [False] * (len(hashes) - leading)
    if leading + 1 < len(hashes):  # the first block behind those is known to be absent
        _mark(client, ns, hashes, found, leading + 1, len(hashes))
    return found


def _mark(client: Client, ns: Namespace, hashes: Sequence[bytes], found: list[bool], first: int, last: int) -> None:
    """Set what is stored of blocks `first` to `last - 1`: halve as long as a part holds some but not all."""
    part = hashes[first:last]
    counted = client.evict(ns, part, dry_run=True)
    if counted.removed + counted.kept == 0:
        return
    leading = client.lookup(ns, part).blocks
    found[first : first + leading] = [True] * leading
    rest = first + leading + 1
    if rest >= last:
        return
    middle = (rest + last) // 2
    for start, end in ((rest, middle), (middle, last)):
        if start < end:
            _mark(client, ns, hashes, found, start, end)


def fetch_each(
    client: Client, ns: Namespace, hashes: Sequence[bytes], destination: SegmentTable, block_ids: Sequence[int]
) -> list[bool]:
    """Fetch every block that is stored; which of them are right. The memory of the others is undefined.

    A block whose bytes are not those of its checksum is evicted, so that a right one can take its place.
    Raises LayoutError, BadRequest: memory, ids or hashes do not fit the namespace.
    Blocking: a round trip and a copy for each stretch of blocks between two that are missing; blocks of slower tiers
    are waited for as long as one fetch would, all stretches together.
    """
    right = [False] * len(hashes)
    until_s = time.monotonic() + FETCH_DEADLINE_MS / 1000
    first = 0
    while first < len(hashes):
        left_ms = max(0.0, (until_s - time.monotonic()) * 1000)
        result = client.fetch(ns, hashes[first:], destination, block_ids[first:], deadline_ms=left_ms)
        right[first : first + result.blocks] = [True] * result.blocks
        first += result.blocks
        if first < len(hashes) and result.reason not in _LOST:
            break
        if result.reason == "corrupt":
            client.evict(ns, hashes[first : first + 1])
        first += 1
    return right


def store_chain(
    client: Client,
    ns: Namespace,
    hashes: Sequence[bytes],
    source: SegmentTable,
    block_ids: Sequence[int],
    parent: bytes,
) -> list[bool]:
    """Store blocks that follow each other; which are stored now. `parent` is the block before, empty if not known.

    When the block before is not stored, the chain is stored all the same: the engine may hold that one elsewhere.
    Raises LayoutError, BadRequest: memory, ids or hashes do not fit the namespace.
    """
    result = client.store(ns, hashes, source, block_ids, parent=parent)
    if parent and result.outcomes[:1] == (BlockOutcome.ORPHAN,):
        result = client.store(ns, hashes, source, block_ids)
    return [outcome in _STORED for outcome in result.outcomes]
