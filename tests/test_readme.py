"""The front page, tried: its Python runs as printed against a live daemon, its commands are ones that exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay.daemon import cli
from support.live import LiveDaemon

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md")])
RUN_TIMEOUT_S = 100

# A page cannot count on a network: the names that load a model give a tiny random one and one token per byte.
STUB = """
import torch, transformers

class Tokenizer:
    def __call__(self, text, return_tensors):
        return transformers.BatchEncoding({"input_ids": torch.tensor([list(text.encode())])})

def model(name):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)

transformers.AutoTokenizer.from_pretrained = lambda name: Tokenizer()
transformers.AutoModelForCausalLM.from_pretrained = model
"""


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def run(program: str, runtime_dir: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error::SyntaxWarning", "-c", program],
        env={**os.environ, "FOREBAY_RUNTIME_DIR": str(runtime_dir), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def daemon() -> Iterator[LiveDaemon]:
    with LiveDaemon() as running:
        yield running


def test_client_snippet_stores_and_fetches(daemon: LiveDaemon) -> None:
    """As printed, in a process of its own."""
    (snippet,) = (block for block in blocks(ROOT / "README.md", "python") if "transformers" not in block)
    printed = run(snippet, daemon.runtime_dir)
    assert printed.splitlines()[0] == str(["STORED"] * 4)
    assert "4 blocks, 524288 bytes, equal: True" in printed


def test_client_snippet_without_a_daemon_sees_misses(tmp_path: Path) -> None:
    """The promise beside it: no exception when nobody is there."""
    (snippet,) = (block for block in blocks(ROOT / "README.md", "python") if "transformers" not in block)
    printed = run(snippet, tmp_path)
    assert "UNAVAILABLE" in printed
    assert "0 blocks, 0 bytes" in printed


def test_transformers_snippet_restores_on_its_second_run(daemon: LiveDaemon) -> None:
    """With a tiny random model in the place of the one it names."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    (snippet,) = (block for block in blocks(ROOT / "README.md", "python") if "transformers" in block)
    computed, restored = run(STUB + snippet, daemon.runtime_dir).splitlines()
    assert computed.startswith("computed: 0 of ")
    assert re.match(r"restored: [1-9]\d* of ", restored)


def test_engines_guide_restores_what_its_chats_share(daemon: LiveDaemon) -> None:
    """The same of the guide's example, of three questions that begin alike."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    (snippet,) = blocks(ROOT / "docs" / "engines.md", "python")
    told = [re.findall(r"\d+", line)[:2] for line in run(STUB + snippet, daemon.runtime_dir).splitlines()]
    restored = [int(line[0]) for line in told]
    assert restored[0] == 0
    assert restored[1] > restored[2] >= 800
    assert [sum(map(int, line)) for line in told] == [859, 859, 855]


def commands(document: Path) -> Iterator[str]:
    """What the document's shell lines hand to forebay, without comments; continued lines joined."""
    for block in blocks(document, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            named = [position for position, word in enumerate(words) if Path(word).name == "forebay"]
            arguments = words[named[-1] + 1 :] if named else []
            if arguments and arguments != ["."]:  # `podman build -t forebay .`
                yield shlex.join(arguments)


@pytest.mark.parametrize(
    "command", [pytest.param(line, id=f"{path.name}: {line}") for path in DOCUMENTS for line in commands(path)]
)
def test_documented_command_is_in_the_grammar(command: str) -> None:
    """Parsed, not run."""
    words = shlex.split(command)
    if words[0] != "bench":
        cli.parser().parse_args(words)


def test_documented_make_targets_exist() -> None:
    """In prose as well as in shell blocks."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        name for path in DOCUMENTS for name in re.findall(r"(?:^|`)make ([a-z0-9-]+)", path.read_text(), re.MULTILINE)
    }
    assert {"demo", "test", "bench"} <= named
    assert named <= targets
