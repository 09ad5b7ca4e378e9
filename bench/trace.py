"""Request traces in Mooncake's open format: JSON lines, plain or gzip, of one request each.

``timestamp`` (ms), ``input_length`` (tokens) and ``hash_ids``, one id for each block of the prompt; the same id is the
same block after the same blocks. ``output_hash_ids``, which ``forebay record`` adds, are blocks of the answer that were
stored too. ``block_size``, of a block in tokens, may be told by each line. Other keys are ignored.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LINE_BYTES_MAX = 16 << 20
_BLOCK_TOKENS_END = 1_000_000


class BadTrace(ValueError):
    """A file is no trace; the text names the line."""


@dataclass(frozen=True, slots=True)
class Request:
    """`names` are the hashes of its blocks, root first; all but the last block are whole.

    `answer`: of those that were stored after them.
    """

    now_s: float
    tokens: int
    names: tuple[bytes, ...]
    answer: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    requests: tuple[Request, ...]
    unique_blocks: int
    block_tokens: int = 0
    """0: the trace does not tell."""

    @property
    def references(self) -> int:
        return sum(len(request.names) for request in self.requests)

    @property
    def seconds(self) -> float:
        """From the first request to the last."""
        return self.requests[-1].now_s - self.requests[0].now_s

    def wanted_again(self) -> list[int]:
        """Of each request, with its answer, how many leading blocks a later one names."""
        wanted: list[int] = []
        seen: set[bytes] = set()
        for request in reversed(self.requests):
            names = request.names + request.answer
            wanted.append(next((at for at, name in enumerate(names) if name not in seen), len(names)))
            seen.update(request.names)
        return wanted[::-1]


def read_trace(path: Path) -> Trace:
    """Raises BadTrace, OSError."""
    names: dict[int, bytes] = {}
    requests = []
    sizes: set[int] = set()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            requests.append(_request(line, names, sizes))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise BadTrace(f"{path}:{number}: no request of a trace: {error!r}") from error
    if not requests:
        raise BadTrace(f"{path}: holds no request")
    if len(sizes) > 1:
        raise BadTrace(f"{path}: its blocks have {len(sizes)} sizes, {min(sizes)} to {max(sizes)} tokens")
    requests.sort(key=lambda request: request.now_s)
    return Trace(path.name.removesuffix(".gz").removesuffix(".jsonl"), tuple(requests), len(names), *sizes)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else path.open("rb") as lines:
            while line := lines.readline(LINE_BYTES_MAX):
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadTrace(f"{path}: {error}") from error


def _request(line: bytes, names: dict[int, bytes], sizes: set[int]) -> Request:
    found = json.loads(line)
    chain = []
    for block in (*found["hash_ids"], *found.get("output_hash_ids", ())):
        if not isinstance(block, int):
            raise TypeError(f"{block!r} in hash_ids is no whole number")
        name = names.get(block)
        if name is None:
            name = names[block] = hashlib.sha256(b"%d" % block).digest()
        chain.append(name)
    now_s, tokens = float(found["timestamp"]) / 1000, found["input_length"]
    if not isinstance(tokens, int) or tokens < 0 or now_s != now_s or len(set(chain)) != len(chain):
        raise ValueError("a length below 0, a time that is none, or one block twice")
    if (size := found.get("block_size")) is not None:
        if not isinstance(size, int) or not 0 < size < _BLOCK_TOKENS_END:
            raise ValueError(f"block_size {size!r} is no number of tokens")
        sizes.add(size)
    prompt = len(found["hash_ids"])
    return Request(now_s, tokens, tuple(chain[:prompt]), tuple(chain[prompt:]))
