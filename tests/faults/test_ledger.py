"""The ledger tells right blocks from wrong ones and a lost block from one nobody promised."""

from __future__ import annotations

from support.ledger import Ledger, Verdict, block_bytes

HASHES = [bytes([number]) * 16 for number in range(4)]
SIZE = 4096


def test_contents_are_the_same_every_time_and_depend_on_everything() -> None:
    contents = block_bytes(1, HASHES[0], SIZE)
    assert contents == block_bytes(1, HASHES[0], SIZE)
    assert len(contents) == SIZE
    others = {block_bytes(2, HASHES[0], SIZE), block_bytes(1, HASHES[1], SIZE), block_bytes(1, HASHES[0], 2 * SIZE)}
    assert len({contents, *(other[:SIZE] for other in others)}) == 4


def test_fetch_is_judged_block_by_block() -> None:
    ledger = Ledger(seed=7)
    memory = memoryview(bytearray(4 * SIZE))
    ledger.fill(HASHES, memory)
    blocks = [memory[start : start + SIZE] for start in range(0, 4 * SIZE, SIZE)]
    ledger.durable(HASHES[:2])
    assert ledger.compare(HASHES, blocks) == Verdict(served=4)
    assert ledger.compare(HASHES, [None, blocks[0], None, blocks[3]]) == Verdict(served=2, wrong=1, missing=1)
    assert ledger.total == Verdict(served=6, wrong=1, missing=1)


def test_block_that_may_be_gone_is_not_missed() -> None:
    ledger = Ledger(seed=7)
    ledger.durable(HASHES)
    ledger.gone(HASHES[1:])
    assert ledger.compare(HASHES, [None] * 4) == Verdict(missing=1)
    assert HASHES[0] in ledger
    assert len(ledger) == 1
