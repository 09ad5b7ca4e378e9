"""Chains cut into pieces: runs of one request's path that no later request has touched, resident or remembered.

Every name that is known belongs to one piece, at the place of its depth. What was evicted stays known, as a *ghost*,
until it is too old or there are too many: that a block came back, and when, is learned of ghosts above all. A piece's
resident part is a leading run, but for blocks removed on request and tiers that are filled in another order.

Pieces with resident blocks of one class lie in a ring, longest untouched first. A piece costs what five blocks do, so
that a ghost costs under 200 bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

NO_ROW = -1
GHOSTS_MIN = 4096
GHOSTS_PER_BLOCK = 16
"""So many ghosts are kept for each block that is or was resident at one time, and `GHOSTS_MIN` in any case."""


class Piece:
    """Attributes:
    start: depth of its first block.
    names: of its blocks, in order.
    rows: of the leading ones, up to the last that is resident; NO_ROW for one that is not.
    live: how many are resident.
    touched: when a request last named it.
    kind: its class, and with `priority` the ring it is in while a block is resident.
    priority: of its resident blocks.
    shared: how many requests have left its path after it, to continue otherwise.
    turn, chain: of the request that touched it: how many it continues, and its length in blocks.
    place: in `Pieces.all`.
    """

    __slots__ = (
        *("chain", "kind", "live", "names", "newer", "older", "place", "priority", "rows", "shared", "start"),
        *("touched", "turn"),
    )

    def __init__(self, start: int, kind: int, priority: int = 0) -> None:
        self.start = start
        self.names: list[bytes] = []
        self.rows = array("i")
        self.live = 0
        self.touched = 0.0
        self.kind = kind
        self.priority = priority
        self.shared = 0
        self.turn = 0
        self.chain = 0
        self.place = -1
        self.older: Piece = self
        self.newer: Piece = self


class Pieces:
    """All pieces of one policy, by name and by class."""

    def __init__(self, kinds: int, given_up: Callable[[Piece, int], None]) -> None:
        """`given_up(piece, blocks)` is told of each ghost that is forgotten."""
        self._given_up = given_up
        self._kinds = kinds
        self.rings = [Piece(0, kind) for kind in range(kinds)]
        """Sentinels: `ring.newer` is the oldest piece of its class, `ring.older` the newest. Of priority 0, and of each
        other so far as there were such pieces."""
        self.known: dict[bytes, Piece] = {}
        self.all: list[Piece] = []
        self.unswept = 0
        """So many of them, the leading ones, `sweep` has still to give."""
        self.live = 0
        self._dead: dict[Piece, None] = {}
        """Pieces that are ghosts altogether, first those that have been so for longest."""
        self._most_live = 0

    @property
    def ghosts(self) -> int:
        return len(self.known) - self.live

    def match(self, hashes: Sequence[bytes]) -> tuple[list[tuple[Piece, int]], int]:
        """The pieces along a chain, each with how many of its leading blocks the chain names, and the sum of those."""
        path: list[tuple[Piece, int]] = []
        known, at, count = self.known, 0, len(hashes)
        while at < count:
            piece = known.get(hashes[at])
            if piece is None or piece.start != at:
                break
            names = piece.names
            blocks = min(len(names), count - at)
            if names[:blocks] != hashes[at : at + blocks]:
                blocks = next(i for i in range(blocks) if names[i] != hashes[at + i])
                if not blocks:
                    break
            path.append((piece, blocks))
            at += blocks
        return path, at

    def fresh(self, names: Sequence[bytes]) -> Sequence[bytes]:
        """The leading ones that are not known; a name that is known elsewhere contradicts what it was known by."""
        if self.known.keys().isdisjoint(names) and len(set(names)) == len(names):
            return names
        taken: set[bytes] = set()
        for at, name in enumerate(names):
            if name in self.known or name in taken:
                return names[:at]
            taken.add(name)
        return names

    def new(self, start: int, kind: int, now: float) -> Piece:
        piece = Piece(start, kind)
        piece.touched = now
        self._enter(piece)
        self._dead[piece] = None
        return piece

    def extend(self, piece: Piece, names: Sequence[bytes]) -> None:
        """Names that were not known continue the piece."""
        piece.names += names
        self.known.update(dict.fromkeys(names, piece))

    def head(self, piece: Piece, blocks: int) -> Piece:
        """Cut a piece after its leading blocks; the rest keeps its label and its place in the ring."""
        if blocks == len(piece.names):
            return piece
        rest = Piece(piece.start + blocks, piece.kind, piece.priority)
        rest.names, rest.rows = piece.names[blocks:], piece.rows[blocks:]
        rest.touched, rest.shared, rest.turn, rest.chain = piece.touched, piece.shared, piece.turn, piece.chain
        rest.live = len(rest.rows) - rest.rows.count(NO_ROW)
        self._enter(rest)
        self.known.update(dict.fromkeys(rest.names, rest))
        del piece.names[blocks:], piece.rows[blocks:]
        if rest.live:
            _link(rest, piece.older)
            piece.live -= rest.live
            self._strip(piece)
        else:
            self._dead[rest] = None
        return piece

    def join(self, piece: Piece, following: Piece) -> None:
        """Make one piece of two of which the second continues the first."""
        if following.live:
            piece.rows.extend(array("i", [NO_ROW]) * (len(piece.names) - len(piece.rows)))
            piece.rows += following.rows
            piece.live += following.live
            _unlink(following)
            if piece.live == following.live:  # it was a ghost
                self._dead.pop(piece)
                _link(piece, self._ring(piece).older)
        else:
            self._dead.pop(following)
        self._leave(following)
        piece.names += following.names
        self.known.update(dict.fromkeys(following.names, piece))

    def label(self, piece: Piece, kind: int, now: float) -> None:
        """Touched now, it is the newest of its class."""
        piece.kind, piece.touched = kind, now
        if piece.live:
            _unlink(piece)
            _link(piece, self._ring(piece).older)
        else:
            self._dead.pop(piece)
            self._dead[piece] = None

    def prefer(self, piece: Piece, at: int, priority: int) -> Piece:
        """Give the piece's blocks from `at` on this priority; returns the piece of those, cut off if need be."""
        if at:
            name = piece.names[at]
            self.head(piece, at)
            piece = self.known[name]
        piece.priority = priority
        if piece.live:
            _unlink(piece)
            _link(piece, self._ring(piece).older)
        return piece

    def _ring(self, piece: Piece) -> Piece:
        at = piece.priority * self._kinds + piece.kind
        while at >= len(self.rings):
            priority = len(self.rings) // self._kinds
            self.rings += [Piece(0, kind, priority) for kind in range(self._kinds)]
        return self.rings[at]

    def insert(self, piece: Piece, at: int, row: int) -> None:
        """The piece's block `at` has become resident."""
        rows = piece.rows
        if at < len(rows):
            rows[at] = row
        else:
            if at > len(rows):
                rows.extend(array("i", [NO_ROW]) * (at - len(rows)))
            rows.append(row)
        piece.live += 1
        self.live += 1
        self._most_live = max(self._most_live, self.live)
        if piece.live == 1:
            del self._dead[piece]
            _link(piece, self._ring(piece).older)

    def remove(self, piece: Piece, at: int) -> None:
        """The piece's block `at` is resident no more; it is a ghost, while there is room for one."""
        piece.rows[at] = NO_ROW
        piece.live -= 1
        self.live -= 1
        self._strip(piece)
        self.limit(piece)

    def limit(self, at_hand: Piece) -> None:
        """Forget the ghosts of longest standing, or those of the piece at hand, while there are too many."""
        most = GHOSTS_MIN + GHOSTS_PER_BLOCK * self._most_live
        while self.ghosts > most and self._dead:
            self.forget(next(iter(self._dead)))
        if self.ghosts > most and at_hand.live:
            self.trim(at_hand)

    def trim(self, piece: Piece) -> None:
        """Forget the ghosts at the end of a piece of which something is resident."""
        self._cut_off(piece, len(piece.rows))

    def forget(self, piece: Piece) -> None:
        """Know nothing more of a piece that is all ghosts."""
        self._cut_off(piece, 0)
        self._leave(piece)
        del self._dead[piece]

    def unname(self, name: bytes) -> None:
        """Forget a ghost that turns out to be a block of another depth, and all that came after it."""
        piece = self.known[name]
        rest = piece if piece.names[0] == name else None
        if rest is None:
            self.head(piece, piece.names.index(name))
            rest = self.known[name]
        after = self.head(rest, 1)
        self.forget(after)

    def _cut_off(self, piece: Piece, keep: int) -> None:
        names = piece.names[keep:]
        if names:
            self._given_up(piece, len(names))
        for name in names:
            del self.known[name]
        del piece.names[keep:]

    def sweep_anew(self) -> None:
        """From here on `sweep` gives each piece that there is now, once, unless it is gone by then."""
        self.unswept = len(self.all)

    def sweep(self, most: int) -> Iterator[Piece]:
        """The next pieces. The piece at hand may be forgotten, or others joined, meanwhile."""
        for _ in range(most):
            if not self.unswept:
                return
            self.unswept -= 1
            yield self.all[self.unswept]

    def _enter(self, piece: Piece) -> None:
        piece.place = len(self.all)
        self.all.append(piece)

    def _leave(self, piece: Piece) -> None:
        """Fill its place with the last that is unswept, and that one's with the last of all."""
        if piece.place < self.unswept:
            self.unswept -= 1
            self._exchange(piece, self.all[self.unswept])
        self._exchange(piece, self.all[-1])
        self.all.pop()

    def _exchange(self, one: Piece, other: Piece) -> None:
        one.place, other.place = other.place, one.place
        self.all[one.place], self.all[other.place] = one, other

    def check(self) -> Iterator[str]:
        """Yield each violated invariant."""
        names = live = 0
        if any(piece.place != at for at, piece in enumerate(self.all)) or not 0 <= self.unswept <= len(self.all):
            yield "a piece is not in its place"
        for piece in self.all:
            names += len(piece.names)
            resident = len(piece.rows) - piece.rows.count(NO_ROW)
            live += resident
            if resident != piece.live or (piece.rows and piece.rows[-1] == NO_ROW):
                yield f"a piece of {len(piece.names)} blocks with {resident} resident ones counts {piece.live}"
            if any(self.known.get(name) is not piece for name in piece.names):
                yield "a name of a piece is known elsewhere"
            if (piece in self._dead) == bool(piece.live):
                yield "a piece is among the ghosts and is none, or the other way round"
        if names != len(self.known) or live != self.live:
            yield f"{names} names and {live} resident blocks in pieces, {len(self.known)} and {self.live} counted"
        linked = sum(piece.live > 0 and self._ring(piece) is ring for ring in self.rings for piece in around(ring))
        if linked != len(self.all) - len(self._dead):
            yield f"{linked} pieces in rings, {len(self.all) - len(self._dead)} have resident blocks"

    def _strip(self, piece: Piece) -> None:
        """Let the rows end with the last resident block; without one the piece leaves its ring."""
        rows = piece.rows
        while rows and rows[-1] == NO_ROW:
            rows.pop()
        if not piece.live and piece not in self._dead:
            _unlink(piece)
            self._dead[piece] = None


def around(ring: Piece) -> Iterator[Piece]:
    """The pieces of a ring, oldest first."""
    piece = ring.newer
    while piece is not ring:
        yield piece
        piece = piece.newer


def _link(piece: Piece, older: Piece) -> None:
    piece.older = older
    piece.newer = older.newer
    older.newer.older = piece
    older.newer = piece


def _unlink(piece: Piece) -> None:
    piece.older.newer = piece.newer
    piece.newer.older = piece.older
    piece.older = piece.newer = piece
