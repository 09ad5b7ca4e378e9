"""`forebay explain` of a daemon that serves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from forebay.client import Client, NamespaceSpec, PrefixHasher
from forebay.daemon import cli
from forebay.daemon.cli import Exit
from support.live import LiveDaemon

SPEC = NamespaceSpec(model="m", revision="1", dtype="uint8", block_tokens=16, segment_bytes=(1 << 16,))
Capture = pytest.CaptureFixture[str]


def test_stored_and_unknown_blocks_are_explained(capsys: Capture) -> None:
    """Exit 0 and 1; the same as JSON; a hash of another width is refused."""
    hashes = PrefixHasher(SPEC).hashes(range(64))
    with LiveDaemon({"economics.prefill_tokens_per_s": 1000}) as daemon:
        with Client(runtime_dir=str(daemon.runtime_dir)) as client:
            ns = client.open_namespace(SPEC)
            client.store(ns, hashes, np.zeros((4, 1 << 16), np.uint8))
        name = daemon.store()["namespaces"][0]["fingerprint"][:12]

        def run(*words: str) -> tuple[int, str]:
            code = cli.run(["explain", "--runtime-dir", str(daemon.runtime_dir), *words])
            return code, capsys.readouterr().out

        code, text = run(name, hashes[3].hex())
        assert code == Exit.OK
        assert "block 3 of its prompt" in text
        assert "lies in    host" in text
        assert "class      turn 0" in text
        assert "plan       load 4 blocks" in text
        assert text.count("<-") == 1
        code, text = run(name, "--json", hashes[3].hex())
        assert json.loads(text)["plan"]["blocks"] == 4
        unknown = "00" * SPEC.hash_bytes
        assert run(name, unknown) == (Exit.NEGATIVE, f"block {unknown}: not stored, and nothing is known of it\n")
        assert json.loads(run(name, "--json", unknown)[1]) == {"hash": unknown, "stored": False}
        assert run(name, "00")[0] == Exit.REFUSED
