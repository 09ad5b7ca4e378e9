"""The sweep over all pieces, while pieces come and go."""

from __future__ import annotations

import random

from forebay.kvstore.eviction.pieces import Piece, Pieces


def ghosts(pieces: Pieces, count: int, first: int = 0) -> list[Piece]:
    made = []
    for number in range(first, first + count):
        made.append(pieces.new(0, 0, 0.0))
        pieces.extend(made[-1], [b"%d" % number])
    return made


def test_each_piece_that_stays_is_swept_once() -> None:
    """Those that go in between are not, nor those that came since."""
    for seed in range(30):
        chosen = random.Random(seed)
        pieces = Pieces(1, lambda piece, blocks: None)
        old, new, gone, seen = ghosts(pieces, 40), list[Piece](), list[Piece](), list[Piece]()
        pieces.sweep_anew()
        while pieces.unswept:
            seen += pieces.sweep(chosen.randrange(4))
            new += ghosts(pieces, chosen.randrange(2), 1000 + len(new))
            leaving = chosen.choice(pieces.all)
            gone.append(leaving)
            pieces.forget(leaving)
            assert not list(pieces.check())
        assert len(set(seen)) == len(seen)
        assert set(seen) | set(gone) >= set(old)
        assert not set(seen) & set(new)


def test_a_piece_may_be_forgotten_while_it_is_swept() -> None:
    pieces = Pieces(1, lambda piece, blocks: None)
    ghosts(pieces, 10)
    pieces.sweep_anew()
    for piece in pieces.sweep(100):
        pieces.forget(piece)
    assert (pieces.all, pieces.known) == ([], {})
