"""Traces are read as they are published, and what is none is refused with its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from forebay.bench.trace import BadTrace, read_trace

GOOD = (
    '{"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [7, 9]}\n\n'
    '{"timestamp": 0, "input_length": 512, "hash_ids": [7]}\n'
)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_plain_and_gzip_are_the_same_in_the_order_of_time(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(GOOD.encode()) if name.endswith(".gz") else GOOD.encode())
    trace = read_trace(path)
    assert (trace.name, trace.unique_blocks, trace.references) == ("t", 2, 3)
    assert [(request.now_s, request.tokens, len(request.names)) for request in trace.requests] == [
        (0.0, 512, 1),
        (3.0, 700, 2),
    ]
    assert trace.requests[0].names == trace.requests[1].names[:1]


def test_answers_that_were_stored_are_told_apart_from_prompts(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 512, "hash_ids": [7], "output_hash_ids": [8, 9]}\n' + GOOD)
    trace = read_trace(path)
    first, second, third = trace.requests
    assert (len(first.answer), second.answer, third.answer, trace.unique_blocks) == (2, (), (), 3)
    assert first.answer[1] == third.names[1]


def test_size_of_blocks_is_told_or_not_but_not_differently(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(GOOD)
    assert read_trace(path).block_tokens == 0
    sized = '{"timestamp": 0, "input_length": 16, "block_size": %d, "hash_ids": [1]}\n'
    path.write_text(sized % 16 + GOOD)
    assert read_trace(path).block_tokens == 16
    path.write_text(sized % 16 + sized % 32)
    with pytest.raises(BadTrace, match="2 sizes, 16 to 32 tokens"):
        read_trace(path)


def test_wanted_again_are_the_leading_blocks_that_later_requests_name(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(GOOD)
    assert read_trace(path).wanted_again() == [1, 0]


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        '{"timestamp": 0, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": -1, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 1, "hash_ids": ["x"]}',
        '{"timestamp": 0, "input_length": 1, "hash_ids": [1, 1]}',
        '{"timestamp": 0, "input_length": 1, "hash_ids": [1], "block_size": 0}',
        '{"timestamp": 0, "input_length": 1, "hash_ids": [1], "output_hash_ids": [1]}',
    ],
)
def test_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(GOOD + line + "\n")
    with pytest.raises(BadTrace, match=r"t\.jsonl:4:"):
        read_trace(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b broken", gzip.compress(GOOD.encode())[:-9]], ids=("empty", "broken", "cut short")
)
def test_empty_or_broken_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(BadTrace):
        read_trace(path)
