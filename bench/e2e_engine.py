"""One engine process of the end-to-end run: vLLM's own engine, asked by JSON lines, timed to the first token.

It is vLLM's `LLMEngine` without the HTTP server in front of it. Usage: e2e_engine.py MODEL [RUNTIME_DIR]; without a
runtime directory it runs without forebay, and without a prefix cache of its own: the reference.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

POOL_BYTES = 512 << 20
MAX_TOKENS = 4096


def main(model: str, runtime_dir: str | None) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to stdout what belongs into the log
    engine = _engine(model, runtime_dir)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        print(json.dumps(_answer(engine, str(number), asked["ids"], asked["tokens"])), file=answers, flush=True)
    engine.engine_core.shutdown()


def _engine(model: str, runtime_dir: str | None) -> Any:
    from vllm import LLM

    settings: dict[str, Any] = {}
    if runtime_dir is not None:
        settings["kv_transfer_config"] = {
            "kv_connector": "ForebayConnector",
            "kv_connector_module_path": "forebay.client.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"runtime_dir": runtime_dir},
        }
    return LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_TOKENS,
        max_num_batched_tokens=MAX_TOKENS,
        block_size=32,
        kv_cache_memory_bytes=POOL_BYTES,
        enforce_eager=True,
        disable_log_stats=False,
        enable_prefix_caching=runtime_dir is not None,
        **settings,
    ).llm_engine


def _answer(engine: Any, name: str, ids: list[int], tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams

    before = _counters(engine)
    parameters = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
    begun, first, out = time.perf_counter(), 0.0, []
    engine.add_request(name, {"prompt_token_ids": ids}, parameters)
    while engine.has_unfinished_requests():
        for output in engine.step():
            first = first or time.perf_counter() - begun
            out = list(output.outputs[0].token_ids)
    engine.step()  # what the last step told the workers' statistics is only counted by one more
    return {"ids": out, "ttft_ms": first * 1000, **{key: _counters(engine)[key] - before[key] for key in before}}


def _counters(engine: Any) -> dict[str, int]:
    sources = {"local_compute": "computed", "external_kv_transfer": "restored", "local_cache_hit": "local"}
    found = dict.fromkeys(sources.values(), 0)
    for metric in engine.get_metrics():
        if metric.name == "vllm:prompt_tokens_by_source" and metric.labels.get("source") in sources:
            found[sources[metric.labels["source"]]] += int(metric.value)
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
