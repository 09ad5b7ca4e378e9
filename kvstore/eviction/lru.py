"""Least recently used, tail first: the plain policy, exact, at O(pieces) per request.

Touching a chain from its tail to its root makes every ancestor more recent than its descendants, so a flat
LRU list never gives up a parent before its child. Touching 1 000 blocks one by one would cost more than the
lookup that caused it, so the list holds *pieces*: runs of one chain that were last touched together. A piece
moves as a whole and is split only where a later request leaves it. The order is that of the flat list.

A tail that may not go just now (leased, pinned, being written, or with a child in a younger piece) takes its
piece to the young end: it is in use, so it is recent.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence


class _Piece:
    __slots__ = ("newer", "older", "rows", "touched")

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.touched = 0.0
        self.older: _Piece = self
        self.newer: _Piece = self


class LruPolicy:
    """Pieces in a ring around a sentinel: ``_ring.newer`` is the oldest, ``_ring.older`` the newest."""

    def __init__(self, parents: array[int], depths: array[int]) -> None:
        """`parents` and `depths` are the index's live columns, read by row."""
        self._parents = parents
        self._depths = depths
        self._piece_of: list[_Piece | None] = []
        self._ring = _Piece()
        self._pieces = 0

    def request(self, hashes: Sequence[bytes], rows: Sequence[int], now: float) -> None:
        del hashes
        if rows:
            self._touch_path(rows[-1], now)

    def insert(self, rows: Sequence[int], now: float) -> None:
        for row in rows:
            self._append(row)
        if rows:
            self._touch_path(rows[-1], now)

    def remove(self, row: int) -> None:
        piece = self._piece_of[row]
        assert piece is not None, f"row {row} is not known to the policy"
        if piece.rows[-1] != row:
            self._split(piece, self._position(piece, row) + 1)
        piece.rows.pop()
        self._piece_of[row] = None
        if not piece.rows:
            self._unlink(piece)
            self._pieces -= 1

    def demote(self, rows: Sequence[int]) -> None:
        piece = self._find(rows[-1]) if rows else None
        if piece is None:
            return
        if piece.rows[-1] != rows[-1]:
            self._split(piece, self._position(piece, rows[-1]) + 1)
        self._unlink(piece)
        self._link_after(piece, self._ring)

    def victim(self, evictable: Callable[[int], bool]) -> int | None:
        for _ in range(self._pieces):
            piece = self._ring.newer
            tail = piece.rows[-1]
            if evictable(tail):
                return tail
            self._refresh(piece, piece.touched)
        return None

    def oldest_touch(self) -> float | None:
        return self._ring.newer.touched if self._pieces else None

    def check(self, rows: Iterable[int]) -> Iterator[str]:
        seen: set[int] = set()
        pieces = 0
        piece = self._ring.newer
        while piece is not self._ring:
            pieces += 1
            for position, row in enumerate(piece.rows):
                if self._piece_of[row] is not piece or row in seen:
                    yield f"row {row} is not in exactly one piece"
                if position and self._parents[row] != piece.rows[position - 1]:
                    yield f"row {row} does not follow its parent in its piece"
                seen.add(row)
            if not piece.rows:
                yield "an empty piece"
            piece = piece.newer
        if pieces != self._pieces:
            yield f"{pieces} pieces in the ring, {self._pieces} counted"
        if seen != set(rows):
            yield f"the policy knows {len(seen)} rows, the index {len(set(rows))} resident ones"

    def _find(self, row: int) -> _Piece | None:
        return self._piece_of[row] if row < len(self._piece_of) else None

    def _append(self, row: int) -> None:
        """Let the row continue its parent's piece if it is that piece's tail, else begin a piece."""
        if row >= len(self._piece_of):
            self._piece_of.extend([None] * (row + 1 - len(self._piece_of)))
        parent = self._parents[row]
        piece = self._find(parent) if parent >= 0 else None
        if piece is None or piece.rows[-1] != parent:
            piece = _Piece()
            self._pieces += 1
            self._link_after(piece, self._ring.older)
        piece.rows.append(row)
        self._piece_of[row] = piece

    def _touch_path(self, row: int, now: float) -> None:
        """Move the pieces from `row` up to its root to the young end, the root's last."""
        while row >= 0:
            piece = self._find(row)
            if piece is None:
                row = self._parents[row]
                continue
            if piece.rows[-1] != row:
                self._split(piece, self._position(piece, row) + 1)
            self._refresh(piece, now)
            row = self._parents[piece.rows[0]]

    def _split(self, piece: _Piece, position: int) -> None:
        """Cut rows[position:] off into a piece of their own that keeps the old one's place in the ring."""
        tail = _Piece()
        tail.rows = piece.rows[position:]
        tail.touched = piece.touched
        del piece.rows[position:]
        for row in tail.rows:
            self._piece_of[row] = tail
        self._link_after(tail, piece.older)
        self._pieces += 1

    def _position(self, piece: _Piece, row: int) -> int:
        return self._depths[row] - self._depths[piece.rows[0]]

    def _refresh(self, piece: _Piece, now: float) -> None:
        piece.touched = now
        self._unlink(piece)
        self._link_after(piece, self._ring.older)

    def _unlink(self, piece: _Piece) -> None:
        piece.older.newer = piece.newer
        piece.newer.older = piece.older

    def _link_after(self, piece: _Piece, older: _Piece) -> None:
        piece.older = older
        piece.newer = older.newer
        older.newer.older = piece
        older.newer = piece
