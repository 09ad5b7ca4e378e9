"""vLLM's KV events about what forebay holds, for routers that choose an engine by them.

Like vLLM's own events of blocks that left the GPU they carry the blocks' hashes and not their tokens: whoever listens
has learnt those from the event of the same hash on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from forebay.client.vllm_ledger import Notice

try:
    from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVConnectorKVEvents
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
except ImportError as error:
    raise ImportError(f"forebay.client.vllm runs inside vLLM, which could not be imported: {error}") from error

MEDIUM, LOCALITY, OWNERSHIP = "CPU", "LOCAL", "forebay"


class ForebayEvents(KVConnectorKVEvents):
    """Notices on their way from the workers to the scheduler, which puts them together by itself."""

    def __init__(self, notices: Iterable[Notice]) -> None:
        self._notices = list(notices)
        self._workers = 1

    def add_events(self, events: Any) -> None:
        self._notices += events

    def aggregate(self) -> ForebayEvents:
        return self

    def increment_workers(self, count: int = 1) -> None:
        self._workers += count

    def get_all_events(self) -> Any:
        return list(self._notices)

    def get_number_of_workers(self) -> int:
        return self._workers

    def clear_events(self) -> None:
        self._notices.clear()


def engine_events(notices: Iterable[Notice]) -> list[Any]:
    """vLLM's events of what all ranks agree on."""
    return [_stored(notice) if notice.stored else _removed(notice) for notice in notices]


def _stored(notice: Notice) -> Any:
    return BlockStored(
        block_hashes=[maybe_convert_block_hash(name) for name in notice.hashes],
        parent_block_hash=maybe_convert_block_hash(notice.parent) if notice.parent else None,
        token_ids=[],
        block_size=0,
        lora_id=None,
        medium=MEDIUM,
        lora_name=None,
        group_idx=notice.group,
        locality=LOCALITY,
        ownership=OWNERSHIP,
    )


def _removed(notice: Notice) -> Any:
    return BlockRemoved(
        block_hashes=[maybe_convert_block_hash(name) for name in notice.hashes],
        medium=MEDIUM,
        group_idx=notice.group,
        locality=LOCALITY,
        ownership=OWNERSHIP,
    )
