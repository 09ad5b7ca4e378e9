"""One engine of the demonstration: a process of its own, with a model of its own, that answers JSON lines.

Each request is generated twice: through forebay's prefix cache, and by plain `generate` without any cache, whose
tokens are the yardstick. Requests arrive on stdin and are answered on stdout in order; the end of stdin ends the
process, so an engine never outlives the demonstration.

    request  {"history": [token ids], "text": "...", "max_new_tokens": n}
    reply    {"ids": [...], "answer": "...", "identical": bool, "plain_ttft_s": s, "plain_generate_s": s,
              "report": {...}}
    first    {"ready": {"load_s": s, "fingerprint_s": s, "model": "..."}}

Two more requests serve the second act: one waits until the blocks of a chat are on the drive, one until they are found
again after a restart of the daemon.

    request  {"persist": [token ids], "timeout_s": s}    reply  {"durable": n, "wanted": n, "seconds": s}
    request  {"find": [token ids], "timeout_s": s}       reply  {"by_tier": {"nvme": n}, "wanted": n, "seconds": s}
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from forebay.bench import demo_model

demo_model.go_offline()

THREADS = 2
WARM_UP_TOKENS = 256
FIND_PAUSE_S = 0.02


class Engine:
    """A model behind a prefix cache, and the same model without one."""

    def __init__(self, model_name: str, runtime_dir: str, name: str) -> None:
        import torch

        from forebay.client import Client
        from forebay.client.transformers import PrefixCache

        torch.set_num_threads(THREADS)
        self._torch = torch
        begun = time.perf_counter()
        self._model, self._tokenizer = demo_model.load(model_name)
        loaded = time.perf_counter()
        self._client = Client(runtime_dir=runtime_dir, name=name)
        self._cache = PrefixCache(self._client, self._model, name=model_name)
        fingerprinted = time.perf_counter()
        self._plain([7] * WARM_UP_TOKENS, 2)
        self.ready = {
            "model": model_name,
            "load_s": loaded - begun,
            "fingerprint_s": fingerprinted - loaded,
            "block_tokens": self._cache.spec.block_tokens,
            "block_bytes": self._cache.spec.block_bytes,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Generate with and without forebay; the reply of the module's docstring."""
        ids = self._prompt(request["history"], request["text"])
        tokens = request["max_new_tokens"]
        output, report = self._cache.generate(**self._inputs(ids), **self._options(tokens))
        with_forebay = output[0].tolist()
        plain, plain_ttft_s, plain_generate_s = self._plain(ids, tokens)
        return {
            "ids": with_forebay,
            "answer": self._tokenizer.decode(with_forebay[len(ids) :], skip_special_tokens=True),
            "identical": with_forebay == plain,
            "plain_ttft_s": plain_ttft_s,
            "plain_generate_s": plain_generate_s,
            "report": {**asdict(report), "gb_per_s": report.gb_per_s},
        }

    def persist(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have the whole blocks of a chat written to the drive, and wait until they are."""
        begun = time.perf_counter()
        namespace, hashes = self._blocks(request["persist"])
        result = self._client.persist(namespace, hashes, timeout_ms=1000 * request["timeout_s"])
        return {"durable": result.durable, "wanted": len(hashes), "seconds": time.perf_counter() - begun}

    def find(self, request: dict[str, Any]) -> dict[str, Any]:
        """Look for the whole blocks of a chat until all are there or time is up: a new daemon finds them one by one."""
        begun = time.perf_counter()
        namespace, hashes = self._blocks(request["find"])
        pause = threading.Event()
        while True:
            found = self._client.lookup(namespace, hashes)
            seconds = time.perf_counter() - begun
            if found.blocks == len(hashes) or seconds > request["timeout_s"]:
                return {"by_tier": found.by_tier, "wanted": len(hashes), "seconds": seconds}
            pause.wait(FIND_PAUSE_S)

    def _blocks(self, ids: list[int]) -> tuple[Any, list[bytes]]:
        """The namespace, and the hashes of what was stored of a chat: the last token generated has no KV."""
        namespace = self._client.open_namespace(self._cache.spec)
        return namespace, namespace.hasher.hashes(ids[:-1])

    def close(self) -> None:
        self._client.close()

    def _prompt(self, history: list[int], text: str) -> list[int]:
        """The turns so far and the next one; a turn that was cut short gets its end marker."""
        end = [] if not history or history[-1] == self._tokenizer.eos_token_id else [self._tokenizer.eos_token_id]
        return history + end + self._tokenizer.encode(text, add_special_tokens=False)

    def _plain(self, ids: list[int], tokens: int) -> tuple[list[int], float, float]:
        clock = _Clock()
        output = self._model.generate(**self._inputs(ids), **self._options(tokens), streamer=clock)
        ended = time.perf_counter()
        return output[0].tolist(), clock.puts_at[1] - clock.begun, ended - clock.begun

    def _inputs(self, ids: list[int]) -> dict[str, Any]:
        tensor = self._torch.tensor([ids])
        return {"input_ids": tensor, "attention_mask": self._torch.ones_like(tensor)}

    def _options(self, tokens: int) -> dict[str, Any]:
        return {"do_sample": False, "max_new_tokens": tokens}


class _Clock:
    """A streamer that notes when `generate` hands over the prompt and then each token."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.puts_at: list[float] = []

    def put(self, value: Any) -> None:
        self.puts_at.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description="One engine of the demonstration; started by demo.py.")
    parser.add_argument("--model", choices=demo_model.MODELS, required=True)
    parser.add_argument("--runtime-dir", required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    engine = Engine(options.model, options.runtime_dir, options.name)
    print(json.dumps({"ready": engine.ready}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        serve = engine.persist if "persist" in request else engine.find if "find" in request else engine.answer
        print(json.dumps(serve(request)), flush=True)
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
