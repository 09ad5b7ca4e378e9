"""What the vLLM connector counts, by vLLM's own hooks: its periodic log line and its Prometheus endpoint."""

from __future__ import annotations

from typing import Any

try:
    from prometheus_client import Counter
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
except ImportError as error:
    raise ImportError(f"forebay.client.vllm runs inside vLLM, which could not be imported: {error}") from error

SERIES = {
    "loads": "Loads of a request's blocks that ended.",
    "loaded_blocks": "Blocks loaded from forebay into the engine.",
    "loaded_bytes": "Bytes of those.",
    "load_seconds": "Time that loads took, on their own threads.",
    "late_loads": "Loads given up since they took three times what was foreseen; the engine computed the rest.",
    "failed_blocks": "Blocks promised and not loaded; the engine computed them.",
    "stores": "Stores that ended.",
    "stored_blocks": "Blocks stored in forebay.",
    "stored_bytes": "Bytes of those.",
    "store_seconds": "Time that stores took, on their own thread.",
    "present_blocks": "Blocks offered that forebay had already.",
    "rejected_blocks": "Blocks offered and not stored: no room, or no daemon.",
    "revoked_blocks": "Blocks that the engine needed back before they were copied.",
    "dropped_blocks": "Blocks not offered because too many stores were waiting.",
    "told_hints": "Hints of ended requests that the daemon was told, for each cache group.",
    "ignored_hints": "Hints in requests that were wrong, and ignored.",
    "store_errors": "Stores that ended by an error.",
}


class ForebayStats(KVConnectorStats):
    """Sums since the last report: a name of `SERIES` -> number. Adds up over ranks and steps."""

    def reset(self) -> None:
        self.data: dict[str, float] = {}

    def aggregate(self, other: Any) -> ForebayStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 4) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class ForebayMetrics(KVConnectorPromMetrics):
    """One counter for each name of `SERIES`, called ``vllm:forebay_<name>``, with vLLM's own labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        families = {
            name: metric_types[Counter](f"vllm:forebay_{name}", text, labelnames=labelnames)
            for name, text in SERIES.items()
        }
        self._series = {
            (engine, name): family.labels(*values)
            for engine, values in per_engine_labelvalues.items()
            for name, family in families.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            series = self._series.get((engine_idx, name))
            if series is not None:
                series.inc(value)
