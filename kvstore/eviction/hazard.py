"""Learned reuse hazard: the block goes that pays least for its place, by when blocks of its class come back.

A block's class is what was seen of its use: how often requests left the path after it to continue otherwise (system
prompts, documents), or else how many turns its conversation has had and, where an engine tells, how the last of them
stopped: an agent that runs a tool comes back sooner than who reads an answer. Per class it is learned at which age
blocks are asked for again, of ghosts too (`hazard_model`). The hazard of most classes rises to a peak and falls, so the
least index is at one end of the ages: the candidates are the oldest and the newest piece of each class whose tail may
go. Giving up the newest is what stops thrashing; of what is about to be stored it means not to store it (BYPASS).

Which blocks may go at all is the caller's answer. Where none of the candidates may, and before anything is learned, the
victim is that of plain LRU, which is kept beside; so it is while LRU does better (`guard`). A request costs time in its
pieces and its new blocks, not in its length.

Source: Gittins index over a Kaplan-Meier estimate; LHD (hit density, NSDI'18) and Alibaba's "KVCache in the wild"
(ATC'25, reuse predictable per class of request) come nearest. Rejected: an exponential per class, which does not see
the hazard rise; more classes (sizes, gaps, later turns), which change less than a point.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from forebay.kvstore.eviction import BYPASS, PRIORITY_STEP
from forebay.kvstore.eviction.chances import Chances
from forebay.kvstore.eviction.guard import LruGuard
from forebay.kvstore.eviction.hazard_model import BINS, HORIZON_S, HazardModel, bin_of
from forebay.kvstore.eviction.lru import LruPolicy
from forebay.kvstore.eviction.pieces import NO_ROW, Piece, Pieces
from forebay.kvstore.outcome import StopReason

SHARED_CLASSES = 5
TURN_CLASSES = 4
STOP_CLASSES = 1 + len(StopReason)
"""Each turn has a class for every way in which its answer may have stopped, and one where that is not known."""
CLASSES = SHARED_CLASSES + TURN_CLASSES * STOP_CLASSES
FINISHED = CLASSES
"""Not a class of its own: conversations of which somebody said that they are over."""

REFRESH_REQUESTS = 200
STRIDE_MAX = 256
"""Pieces that are counted at a request, at most: 0.1 ms. Where there are more in all than 200 requests count so, the
indices are computed as seldom as that needs."""
GRAIN_BLOCKS = 64
"""Victims taken from one piece before the candidates are compared again."""
SKIPS_MAX = 8
REPEAT_S = 0.03
"""A chain that is known whole and was looked up so lately is the same request, of another rank of the engine. With ten
seconds instead, of prompts that came again within a second LRU hit up to 30 points more."""
LEASE_S = 10.0
"""So long after a lookup a lease of what it found is the same request."""


_SIDES = (True, False)
"""A ring's oldest and newest end."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the policy thinks of a block. `value_hz` is the index: hits per second of a place, at best."""

    kind: str
    age_s: float
    turn: int
    shared: int
    resident: bool
    value_hz: float
    within_1m: float
    within_10m: float
    within_1h: float
    reason: str


class HazardPolicy:
    """See the module's text.

    Args:
        parents, depths, hashes, priorities: the index's live columns, read by row; without the last all blocks have the
            same. What is learned does not depend on it, but what a place pays counts by it.
        equal_depth: depth in blocks at which attention over what is before costs as much to recompute as all the rest
            of a block; blocks then count by what they cost. 0: all blocks count the same.
        sole: what is given up here is lost. Where a slower tier is to keep it, what goes next has to be known early
            enough to be written, so the least recently used goes; what is learned then serves predictions alone.
        guarded: compare with LRU and fall back to it.
        refresh_requests: after so many requests the indices are computed anew.
    """

    def __init__(
        self,
        parents: array[int],
        depths: array[int],
        hashes: Sequence[bytes | None],
        priorities: bytearray | None = None,
        *,
        equal_depth: float = 0.0,
        sole: bool = True,
        guarded: bool = True,
        refresh_requests: int = REFRESH_REQUESTS,
    ) -> None:
        self._depths = depths
        self._hashes = hashes
        self._equal_depth = equal_depth
        self._sole = sole
        self._refresh_requests = refresh_requests
        self._priorities = priorities
        self._lru = LruPolicy(parents, depths, priorities)
        self._guard = LruGuard() if guarded else None
        self._model = HazardModel(CLASSES)
        self._chances = Chances(self._model)
        self._pieces = Pieces(CLASSES + 1, self._given_up)
        self._now = 0.0
        self._current: Piece | None = None
        self._left = 0
        self._ends: list[_End] = []
        """Candidates, least index first; empty when they have to be looked for."""
        self._looks_anew = True
        self._learned = False
        self._stride = 1
        self._requests = 0
        self._waiting = _nothing()

    def request(self, hashes: Sequence[bytes], rows: Sequence[int], now: float, *, opens: bool = True) -> None:
        self._lru.request(hashes, rows, now)
        self._now = max(now, self._now)
        self._new_candidates()
        if not hashes:
            return
        hashes = list(hashes)
        path, matched = self._pieces.match(hashes)
        if matched == len(hashes) and self._is_repeated(path[-1][0], opens=opens):
            return
        if self._guard is not None:
            self._guard.request(hashes, len(rows), self._now)
        fresh = self._pieces.fresh(hashes[matched:])
        last = path[-1][0] if path else None
        goes_on = last is not None and matched >= last.chain - 1
        turn = last.turn + 1 if last is not None and goes_on else 0
        for piece, blocks in path:
            if piece.kind != FINISHED:
                age = self._now - piece.touched
                self._model.returned(piece.kind, age, blocks)
                self._chances.returned(piece.kind, _length(piece), age, blocks)
        self._relabel(path, fresh, turn, branches=not goes_on, length=matched + len(fresh))
        self._learn()

    def _is_repeated(self, last: Piece, *, opens: bool) -> bool:
        """A chain that is known as far as this piece is named by the request that named it before."""
        return last.kind != FINISHED and self._now - last.touched < (REPEAT_S if opens else LEASE_S)

    def _relabel(
        self, path: Sequence[tuple[Piece, int]], fresh: Sequence[bytes], turn: int, *, branches: bool, length: int
    ) -> None:
        """Join the path's pieces and what is new to one piece for each shared class, and one for the rest."""
        pieces = self._pieces
        made: list[Piece] = []
        for piece, blocks in path:
            head = pieces.head(piece, blocks)
            head.shared += branches
            if made and _is_like(made[-1], head):
                pieces.join(made[-1], head)
            else:
                made.append(head)
        if fresh:
            if not made or made[-1].shared:
                made.append(pieces.new(length - len(fresh), 0, self._now))
            pieces.extend(made[-1], fresh)
        for piece in made:
            piece.turn, piece.chain = turn, length
            pieces.label(piece, _kind(piece.shared, turn), self._now)
        if made:
            pieces.limit(made[-1])

    def grow(self, hashes: Sequence[bytes], rows: Sequence[int], above: int, now: float) -> None:
        self._lru.grow(hashes, rows, above, now)
        self._now = max(now, self._now)
        self._new_candidates()
        known = self._pieces.known
        new = next((at for at, name in enumerate(hashes) if name not in known), None)
        if new is None:
            return
        before = hashes[new - 1] if new else self._hashes[above] if above >= 0 else None
        start = (self._depths[above] + 1 if above >= 0 else 0) + new
        self._continue(before, start, hashes[new:])

    def _continue(self, before: bytes | None, start: int, names: Sequence[bytes]) -> Piece | None:
        """New names after a known one, or none, are more of the same request, unless that has other ends already."""
        pieces = self._pieces
        names = pieces.fresh(names)
        piece = pieces.known.get(before) if before is not None else None
        if not names:
            return None
        if piece is None or piece.names[-1] != before or piece.start + len(piece.names) != start or piece.shared:
            piece = pieces.new(start, _kind(0, 0), self._now)
        pieces.extend(piece, names)
        piece.chain = start + len(names)
        pieces.label(piece, piece.kind, self._now)
        pieces.limit(piece)
        return piece

    def insert(self, rows: Sequence[int], now: float) -> None:
        self._lru.insert(rows, now)
        self._now = max(now, self._now)
        self._new_candidates()
        hashes, depths, known, insert = self._hashes, self._depths, self._pieces.known, self._pieces.insert
        priorities = self._priorities
        for row in rows:
            name, depth = hashes[row], depths[row]
            assert name is not None, f"row {row} is not in use"
            piece = known.get(name)
            if piece is None or not _is_at(piece, depth, name):
                piece = self._place(name, row, depth)
            if priorities is not None and priorities[row] != piece.priority:
                piece = self._pieces.prefer(piece, depth - piece.start, priorities[row])
            insert(piece, depth - piece.start, row)

    def _place(self, name: bytes, row: int, depth: int) -> Piece:
        """Begin or go on with a piece for a block that no request had named, or had named at another depth."""
        if name in self._pieces.known:
            self._pieces.unname(name)
        parent = self._lru.parents[row]
        piece = self._continue(self._hashes[parent] if parent >= 0 else None, depth, [name])
        assert piece is not None
        return piece

    def remove(self, row: int) -> None:
        self._lru.remove(row)
        name = self._hashes[row]
        assert name is not None, f"row {row} is not in use"
        piece = self._pieces.known[name]
        self._pieces.remove(piece, self._depths[row] - piece.start)

    def demote(self, rows: Sequence[int]) -> None:
        """What others were seen to share stays as it is."""
        self._new_candidates()
        pieces, hashes, depths, at = self._pieces, self._hashes, self._depths, 0
        while at < len(rows):
            name = hashes[rows[at]]
            assert name is not None, f"row {rows[at]} is not in use"
            piece = pieces.known[name]
            if piece.shared:
                break
            above = depths[rows[-1]] - piece.start
            if above > 0:
                pieces.head(piece, above)
                piece = pieces.known[name]
            self._finish(piece)
            while at < len(rows) and depths[rows[at]] >= piece.start:
                at += 1
        self._lru.demote(rows[:at])

    def _finish(self, piece: Piece) -> None:
        """How it would have gone on without the hint is not known: it has reached its age and no more."""
        if piece.kind != FINISHED:
            self._given_up(piece, len(piece.names))
            self._pieces.label(piece, FINISHED, piece.touched)

    def stopped(self, names: Sequence[bytes], reason: StopReason) -> int:
        """What only this conversation uses of it belongs to another class from now on."""
        known = self._pieces.known
        piece = next((known[name] for name in reversed(names) if name in known), None)
        if piece is None or piece.shared or piece.kind == FINISHED:
            return 0
        kind = _kind(0, piece.turn, reason)
        if kind != piece.kind:
            self._new_candidates()
            self._given_up(piece, len(piece.names))
            self._pieces.label(piece, kind, piece.touched)
        return piece.live

    def is_over(self, row: int) -> bool:
        return self._lru.is_over(row)

    def victim(self, evictable: Callable[[int], bool | None], newcomer: bytes | None = None) -> int | None:
        if self._guard is not None and self._looks_anew:
            self._guard.capacity_blocks = self._pieces.live
        self._looks_anew = False
        if self._is_lru:
            return self._lru.victim(evictable)
        piece = self._current
        if piece is not None and self._left > 0 and piece.live and evictable(piece.rows[-1]):
            self._left -= 1
            return piece.rows[-1]
        end = self._least(evictable)
        if end is None:
            return self._lru.victim(evictable)
        if newcomer is not None and self._is_worth_less(newcomer, end.value):
            return BYPASS
        self._current, self._left = end.piece, GRAIN_BLOCKS - 1
        return end.piece.rows[-1]

    def look_again(self) -> None:
        self._lru.look_again()

    def coldest(self, limit: int) -> list[int]:
        if self._is_lru:
            return self._lru.coldest(limit)
        pieces = [(ring.newer if old else ring.older, ring, old) for ring in self._pieces.rings for old in _SIDES]
        heap = [self._at_end(piece, ring, old) for piece, ring, old in pieces if piece is not ring]
        heapify(heap)
        rows: list[int] = []
        seen: set[Piece] = set()
        while heap and len(rows) < limit:
            end = heappop(heap)
            if end.piece in seen:
                continue
            seen.add(end.piece)
            tail_first = [row for row in reversed(end.piece.rows) if row != NO_ROW]
            rows += tail_first[: limit - len(rows)]
            following = end.piece.newer if end.is_oldest else end.piece.older
            if following is not end.ring and following not in seen:
                heappush(heap, self._at_end(following, end.ring, end.is_oldest))
        return rows

    def oldest_touch(self) -> float | None:
        return self._lru.oldest_touch()

    def check(self, rows: Iterable[int]) -> Iterator[str]:
        expected = set(rows)
        yield from self._lru.check(expected)
        yield from self._pieces.check()
        found = 0
        for piece in self._pieces.all:
            for at, row in enumerate(piece.rows):
                found += row != NO_ROW
                if row != NO_ROW and (row not in expected or not _is_at(piece, self._depths[row], self._hashes[row])):
                    yield f"row {row} lies at block {at} of a piece that is not its own"
        if found != len(expected):
            yield f"{found} resident rows in pieces, {len(expected)} in the index"

    def chances(self, rows: Sequence[int], within_s: float, now: float) -> Sequence[float] | None:
        if not self._learned:
            return None
        known, hashes = self._pieces.known, self._hashes
        chances: list[float] = []
        last: Piece | None = None
        for row in rows:
            name = hashes[row]
            assert name is not None, f"row {row} is not in use"
            piece = known[name]
            chances.append(chances[-1] if piece is last else self._chance(piece, within_s, now))
            last = piece
        return chances

    def _chance(self, piece: Piece, within_s: float, now: float) -> float:
        if piece.kind == FINISHED:
            return 0.0
        return self._chances.probability(piece.kind, _length(piece), max(0.0, now - piece.touched), within_s)

    def explain(self, name: bytes, now: float) -> Explanation | None:
        """What is thought of a block, or None where nothing is known of it."""
        piece = self._pieces.known.get(name)
        if piece is None:
            return None
        at = piece.names.index(name)
        age, kind = max(0.0, now - piece.touched), piece.kind
        chances = [self._chance(piece, within_s, now) for within_s in (60.0, 600.0, 3600.0)]
        return Explanation(
            kind=_kind_name(kind),
            age_s=age,
            turn=piece.turn,
            shared=piece.shared,
            resident=at < len(piece.rows) and piece.rows[at] != NO_ROW,
            value_hz=self._value(piece, now),
            within_1m=chances[0],
            within_10m=chances[1],
            within_1h=chances[2],
            reason=self._reason(kind),
        )

    def _reason(self, kind: int) -> str:
        if kind == FINISHED:
            return "its conversation is over: it goes first"
        if not self._learned:
            return f"least recently used goes first, until {self._refresh_requests} requests have been seen"
        if not self._sole:
            return "least recently used goes first, to the next tier"
        if self._is_lru:
            return "least recently used goes first, since that did better lately"
        return "least index goes first, among the oldest and the newest of each class"

    @property
    def _is_lru(self) -> bool:
        return not (self._learned and self._sole) or (self._guard is not None and self._guard.lru_ahead)

    def _new_candidates(self) -> None:
        self._current = None
        self._ends = []
        self._looks_anew = True

    def _least(self, evictable: Callable[[int], bool | None]) -> _End | None:
        """The candidate with the least index, of which the tail may go."""
        for anew in (False, True):
            if anew or not self._ends:
                used = [ring for ring in self._pieces.rings if ring.newer is not ring]
                sides = [(ring, old) for ring in used for old in _SIDES]
                self._ends = [end for ring, old in sides if (end := self._end(ring, old, evictable)) is not None]
                heapify(self._ends)
            while self._ends:
                end = self._ends[0]
                if end.piece.live and evictable(end.piece.rows[-1]):
                    return end
                heappop(self._ends)
                following = self._end(end.ring, end.is_oldest, evictable)
                if following is not None:
                    heappush(self._ends, following)
        return None

    def _end(self, ring: Piece, is_oldest: bool, evictable: Callable[[int], bool | None]) -> _End | None:
        """The oldest or newest piece of a class whose tail may go, of the first few."""
        piece = ring
        for _ in range(SKIPS_MAX + 1):
            piece = piece.newer if is_oldest else piece.older
            if piece is ring:
                return None
            if evictable(piece.rows[-1]):
                return self._at_end(piece, ring, is_oldest)
        return None

    def _at_end(self, piece: Piece, ring: Piece, is_oldest: bool) -> _End:
        place = (ring.priority, ring.kind)
        return _End(self._value(piece, self._now), piece.touched, place, not is_oldest, piece, ring)

    def _value(self, piece: Piece, now: float) -> float:
        if piece.kind == FINISHED:
            return -1.0
        value = self._model.value(piece.kind, max(0.0, now - piece.touched))
        if piece.priority:
            value *= PRIORITY_STEP**piece.priority
        if self._equal_depth:
            value *= 1 + (piece.start + (len(piece.rows) or len(piece.names))) / self._equal_depth
        return value

    def _is_worth_less(self, newcomer: bytes, than: float) -> bool:
        piece = self._pieces.known.get(newcomer)
        return piece is not None and self._value(piece, self._now) < than

    def _learn(self) -> None:
        """Go on counting what is waiting, a part at each request, and compute the indices when all is counted."""
        self._requests += 1
        pieces = self._pieces
        for piece in pieces.sweep(self._stride):
            self._count(piece)
        if self._requests >= self._refresh_requests and not pieces.unswept:
            self._model.refresh(self._waiting)
            self._chances.refresh()
            self._learned = True
            self._requests = 0
            pieces.sweep_anew()
            self._stride = min(STRIDE_MAX, pieces.unswept // self._refresh_requests + 1)
            self._waiting = _nothing()

    def _count(self, piece: Piece) -> None:
        if piece.kind == FINISHED or not piece.names:
            return
        age = self._now - piece.touched
        if age > HORIZON_S and not piece.live:
            self._pieces.forget(piece)
            return
        if age > HORIZON_S:
            self._pieces.trim(piece)
        self._waiting[piece.kind][bin_of(age)] += len(piece.names)
        self._chances.waits(piece.kind, _length(piece), age, len(piece.names))

    def _given_up(self, piece: Piece, blocks: int) -> None:
        if piece.kind != FINISHED:
            age = max(0.0, self._now - piece.touched)
            self._model.given_up(piece.kind, age, blocks)
            self._chances.given_up(piece.kind, _length(piece), age, blocks)


class _End(NamedTuple):
    """A candidate; they compare by index, then by age, as in LRU."""

    value: float
    touched: float
    place: tuple[int, int]
    is_newest: bool
    piece: Piece
    ring: Piece

    @property
    def is_oldest(self) -> bool:
        return not self.is_newest


def _is_like(piece: Piece, following: Piece) -> bool:
    """Both are of one class, as far as it depends on who shares them, and of one priority."""
    return piece.priority == following.priority and _shared_class(piece.shared) == _shared_class(following.shared)


def _shared_class(shared: int) -> int:
    return min(shared.bit_length(), SHARED_CLASSES - 1)


def _kind(shared: int, turn: int, stop: int = 0) -> int:
    """`stop` is a StopReason, 0 where none is known."""
    if shared:
        return _shared_class(shared)
    return SHARED_CLASSES + TURN_CLASSES * stop + min(turn, TURN_CLASSES - 1)


def _length(piece: Piece) -> int:
    """Of the request that a piece is of, in blocks; what requests of many lengths share has none."""
    return 0 if piece.kind < SHARED_CLASSES else piece.chain


def _kind_name(kind: int) -> str:
    if kind == FINISHED:
        return "finished"
    if kind < SHARED_CLASSES:
        return f"shared by {1 << kind >> 1} or more"
    stop, turn = divmod(kind - SHARED_CLASSES, TURN_CLASSES)
    after = f", after {StopReason(stop).name.lower().replace('_', ' ')}" if stop else ""
    return f"turn {turn}{' or later' if turn == TURN_CLASSES - 1 else ''}{after}"


def _is_at(piece: Piece, depth: int, name: bytes | None) -> bool:
    at = depth - piece.start
    return 0 <= at < len(piece.names) and piece.names[at] == name


def _nothing() -> list[list[float]]:
    return [[0.0] * BINS for _ in range(CLASSES)]
