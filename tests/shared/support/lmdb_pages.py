"""The pages of an LMDB file that is not open: which bytes of it anything depends on, read without LMDB.

Source: the structures MDB_meta, MDB_page, MDB_node and MDB_db of LMDB 0.9's mdb.c, on a 64-bit little-endian machine.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

PAGE = 4096
AIMS = ("tree", "meta", "tree", "tree", "meta", "tree", "tree", "meta", "tree", "anywhere")
"""What flipped bits are aimed at, in turn."""
_PAGE_HEAD = struct.Struct("<QHHHH")
_NODE_HEAD = struct.Struct("<HHHH")
_BRANCH, _LEAF = 1, 2
_SUB_DATABASE = 2
META_AT = _PAGE_HEAD.size
META_BYTES = 136
MAIN_ROOT_AT, TXNID_AT = META_AT + 24 + 48 + 40, META_AT + 24 + 2 * 48 + 8
"""In a meta page: the root of the main database, and the number of its transaction."""
_DATABASE_BYTES, _ROOT_AT = 48, 40
_NO_PAGE = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of the file."""

    start: int
    length: int


def aimed_bit(data: bytes, aim: str, rng: random.Random) -> int:
    """A bit of what LMDB reads of both meta pages, of the used parts of the tree, or of the whole file."""
    spans = {"meta": meta_spans(data), "tree": tree_spans(data), "anywhere": [Span(0, len(data))]}[aim]
    span = rng.choices(spans, [each.length for each in spans])[0]
    return 8 * span.start + rng.randrange(8 * span.length)


def newest_meta(data: bytes) -> int:
    """The number of the meta page, 0 or 1, that LMDB goes by."""
    return int(_u64(data, PAGE + TXNID_AT) > _u64(data, TXNID_AT))


def meta_spans(data: bytes) -> list[Span]:
    """What LMDB reads of both meta pages."""
    return [Span(page * PAGE + META_AT, META_BYTES) for page in (0, 1)]


def tree_spans(data: bytes) -> list[Span]:
    """The used parts of all pages that are reached from the newest meta page."""
    root = _u64(data, newest_meta(data) * PAGE + MAIN_ROOT_AT)
    return list(_spans(data, root))


def sub_databases(data: bytes, meta: int) -> dict[bytes, Span]:
    """By name, where one meta page's tree says where the root of a named database is and what it counts."""
    root = _u64(data, meta * PAGE + MAIN_ROOT_AT)
    return {key: span for key, span, flags in _nodes(data, root) if flags & _SUB_DATABASE}


def entries_of(data: bytes, database: Span) -> int:
    return _u64(data, database.start + _ROOT_AT - 8)


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _spans(data: bytes, page: int) -> Iterator[Span]:
    if page == _NO_PAGE:
        return
    start = page * PAGE
    _, _, flags, lower, upper = _PAGE_HEAD.unpack_from(data, start)
    yield Span(start, lower)
    yield Span(start + upper, PAGE - upper)
    if flags & _BRANCH:
        for child in _children(data, page):
            yield from _spans(data, child)
    else:
        for _, span, node_flags in _nodes(data, page):
            if node_flags & _SUB_DATABASE:
                yield from _spans(data, _u64(data, span.start + _ROOT_AT))


def _places(data: bytes, page: int) -> Iterator[int]:
    start = page * PAGE
    lower = _PAGE_HEAD.unpack_from(data, start)[3]
    for at in range(start + _PAGE_HEAD.size, start + lower, 2):
        yield start + int.from_bytes(data[at : at + 2], "little")


def _children(data: bytes, page: int) -> Iterator[int]:
    for at in _places(data, page):
        low, high, top, _ = _NODE_HEAD.unpack_from(data, at)
        yield low | high << 16 | top << 32


def _nodes(data: bytes, page: int) -> Iterator[tuple[bytes, Span, int]]:
    """Key, place of the value and flags of a leaf's nodes."""
    assert _PAGE_HEAD.unpack_from(data, page * PAGE)[2] & _LEAF
    for at in _places(data, page):
        low, high, flags, key_bytes = _NODE_HEAD.unpack_from(data, at)
        key_at = at + _NODE_HEAD.size
        yield data[key_at : key_at + key_bytes], Span(key_at + key_bytes, low | high << 16), flags
