"""A real vLLM engine on the CPU, in this process, with or without forebay's connector."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)

import pytest
from vllm import LLM, SamplingParams

BLOCK = 32
TOKENS = 1000
WHOLE = (TOKENS - 1) // BLOCK
POOL_BYTES = 64 << 20
PIPELINE: dict[str, Any] = {
    "pipeline_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}
"""Two stages. On CPUs vLLM allocates what passes between them in a trial run, which it makes only where it compiles."""


def schedule_ahead(patch: pytest.MonkeyPatch) -> None:
    """Asynchronous scheduling, which vLLM turns off on CPUs: on, with stand-ins for the streams that it copies on."""
    import torch
    from vllm.platforms.cpu import CpuPlatform

    configure = CpuPlatform.check_and_update_config

    def configure_ahead(config: Any) -> None:
        configure(config)
        config.scheduler_config.async_scheduling = True

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    for name in ("Stream", "Event"):
        mark = type(name, (), {"__init__": nothing, **dict.fromkeys(("wait_stream", "record", "synchronize"), nothing)})
        patch.setattr(torch.cuda, name, mark)
    patch.setattr(torch.cuda, "current_stream", nothing)
    patch.setattr(torch.cuda, "stream", nullcontext)
    patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(configure_ahead))


def prompt_of(seed: int, tokens: int = TOKENS) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(500) for _ in range(tokens)]


class Engine:
    """`LLM` on one model. Outputs are greedy token ids."""

    def __init__(
        self, model: Path, runtime_dir: Path | None, extra: dict[str, object] | None = None, **args: Any
    ) -> None:
        settings: dict[str, Any] = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 4096,
            "block_size": BLOCK,
            "kv_cache_memory_bytes": POOL_BYTES,
            "enforce_eager": True,
            "disable_log_stats": False,
            **args,
        }
        if runtime_dir is not None:
            settings["kv_transfer_config"] = {
                "kv_connector": "ForebayConnector",
                "kv_connector_module_path": "forebay.client.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "runtime_dir": str(runtime_dir),
                    "scheduler_wait_ms": 50,
                    **(extra or {}),
                },
            }
        self.llm = LLM(**settings)

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def planning(self) -> Any:
        """The connector's half in the scheduler."""
        return self.scheduler.connector._planning

    @property
    def moving(self) -> Any:
        """The connector's half in the worker."""
        return self.halves[0]

    @property
    def halves(self) -> list[Any]:
        """Each connector's half in the worker, where vLLM has several of them."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        group: Any = get_kv_transfer_group()
        return [connector._moving for connector in getattr(group, "_connectors", [group])]

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int = 16,
        salts: Sequence[str] = (),
        hints: dict[str, object] | None = None,
    ) -> list[list[int]]:
        extra = {"kv_transfer_params": {"forebay": hints}} if hints else None
        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True, extra_args=extra
        )
        inputs: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        for entry, salt in zip(inputs, salts):
            entry["cache_salt"] = salt
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def settle(self) -> None:
        """Wait until everything offered is stored."""
        from support.live import eventually

        eventually(lambda: not any(half.open_stores for half in self.halves), "everything offered is stored")

    def restored(self) -> int:
        """Prompt tokens that came from forebay, by vLLM's own count."""
        return int(self.metric("vllm:external_prefix_cache_hits"))

    def computed(self) -> int:
        """Prompt tokens that were computed, by vLLM's own count."""
        return sum(
            int(metric.value)
            for metric in self.llm.get_metrics()
            if metric.name == "vllm:prompt_tokens_by_source" and metric.labels.get("source") == "local_compute"
        )

    def metric(self, name: str) -> float:
        return sum(float(metric.value) for metric in self.llm.get_metrics() if metric.name == name)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


@contextmanager
def engine(
    model: Path, runtime_dir: Path | None, extra: dict[str, object] | None = None, **args: Any
) -> Iterator[Engine]:
    running = Engine(model, runtime_dir, extra, **args)
    try:
        yield running
    finally:
        running.close()
