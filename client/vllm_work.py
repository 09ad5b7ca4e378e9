"""What the scheduler's side tells the workers each step: plain records, engine-free, safe to send between processes."""

from __future__ import annotations

from dataclasses import dataclass

from forebay.client.hints import Hints


@dataclass(frozen=True, slots=True)
class Part:
    """A load's blocks of one cache group.

    Attributes:
        group: the cache group, by its position.
        hashes: names of consecutive blocks of one prompt.
        block_ids: where each goes; nobody else uses these until the load is reported finished.
    """

    group: int
    hashes: tuple[bytes, ...]
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks to bring into the engine's memory before the request may run."""

    request_id: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Store:
    """Blocks of one cache group that are whole once this step has run.

    Attributes:
        group: the cache group, by its position.
        parent: name of the block before the first; empty at the start of a prompt.
        orphans: they are worth storing where that block is not stored.
        priority: as of the client's `store`.
    """

    request_id: str
    group: int
    parent: bytes
    hashes: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    orphans: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt, or a part of one, that a step computes: so many tokens after so many that are there."""

    tokens: int
    depth_tokens: int


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of a request that has ended, to be told of its blocks of one cache group when they are stored.

    Attributes:
        keep: leading blocks of the prompt that others begin with too.
    """

    group: int
    hashes: tuple[bytes, ...]
    hints: Hints
    keep: int


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step's work.

    Attributes:
        endings: of requests all stores of which were given to the workers in earlier steps.
        fresh: block ids that this step may overwrite: what is still being copied out of them counts no more.
        reset: names the private namespace after the engine's caches were reset; empty before that.
        prefill: what nearly all of the step's time will be that of; None where it is of no one prompt.
    """

    loads: tuple[Load, ...] = ()
    stores: tuple[Store, ...] = ()
    fresh: frozenset[int] = frozenset()
    reset: str = ""
    prefill: Prefill | None = None
    endings: tuple[Ending, ...] = ()
