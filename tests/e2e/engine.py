"""An engine process for the end-to-end tests: the tiny model answers one prompt, several times, as JSON.

python engine.py RUNTIME_DIR DTYPE PROMPT_TOKENS PROMPT_SEED REPEATS        (with tests/shared on PYTHONPATH)
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from forebay.client import Client
from forebay.client.transformers import PrefixCache
from support.tiny import GREEDY, prompt_of, tiny_model

BLOCK_TOKENS = 16


def main(runtime_dir: str, dtype: str, tokens: int, seed: int, repeats: int) -> None:
    with Client(runtime_dir, name="engine under test") as client:
        cache = PrefixCache(client, tiny_model(dtype=dtype), block_tokens=BLOCK_TOKENS)
        answers = []
        for _ in range(repeats):
            output, report = cache.generate(prompt_of(tokens, seed), **GREEDY)
            answers.append({"ids": output[0].tolist(), **asdict(report)})
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
