"""Namespaces keep apart: by every field of their spec, by session, and by user."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace

import numpy as np
import pytest

from forebay.client import Client
from forebay.daemon.control_link import ControlLink
from forebay.kvstore.errors import UnknownNamespace
from forebay.kvstore.namespace import NamespaceSpec
from forebay.transports.messages import LookupReply, LookupRequest, ReserveReply, ReserveRequest
from forebay.transports.session import SessionClient
from support.live import LiveDaemon

BASE = NamespaceSpec("model", "rev", "bfloat16", 16, (4096, 4096), shard_size=4)
OTHER = {
    "model": "model2",
    "revision": "rev2",
    "dtype": "float16",
    "block_tokens": 32,
    "segment_bytes": (8192,),
    "layout": "HND",
    "shard_rank": 1,
    "shard_size": 2,
    "shard_kind": "replicated",
    "kv_group": "1",
    "lora": "adapter",
    "tenant_salt": b"another tenant",
    "hash_scheme": "engine",
    "hash_bytes": 16,
}
HASHES = [bytes([number]) * 32 for number in range(1, 5)]


@pytest.fixture(scope="module")
def daemon() -> Iterator[LiveDaemon]:
    with LiveDaemon() as running:
        yield running


def test_every_field_of_the_spec_is_tried() -> None:
    assert set(OTHER) == {field.name for field in fields(NamespaceSpec)}


@pytest.mark.parametrize("name", OTHER)
def test_namespaces_that_differ_in_one_field_never_hit_each_other(daemon: LiveDaemon, name: str) -> None:
    """All shards of one are stored, so that the same hashes there are complete, and asked for in the other."""
    base = replace(BASE, shard_size=1) if name != "shard_rank" else BASE
    other = replace(base, **{name: OTHER[name]})
    with Client(daemon.runtime_dir, strict=True) as client:
        ns = client.open_namespace(replace(base, kv_group=f"base of {name}"))
        blocks = np.full((len(HASHES), base.block_bytes), 7, np.uint8)
        client.store(ns, HASHES, blocks)
        hashes = [value[: other.hash_bytes] for value in HASHES]
        far = other if name == "kv_group" else replace(other, kv_group=f"base of {name}")
        assert client.lookup(client.open_namespace(far), hashes).blocks == 0
        memory = np.zeros((len(HASHES), other.block_bytes), np.uint8)
        assert client.fetch(client.open_namespace(far), hashes, memory).blocks == 0
        assert not memory.any()


def test_rank_never_reads_another_ranks_bytes(daemon: LiveDaemon) -> None:
    """Both ranks of a group store their part under the same hash; each gets its own back."""
    with Client(daemon.runtime_dir, strict=True) as client:
        specs = [replace(BASE, shard_size=2, shard_rank=rank, kv_group="ranks") for rank in range(2)]
        ranks = [client.open_namespace(spec) for spec in specs]
        for number, ns in enumerate(ranks):
            assert client.lookup(ns, HASHES).blocks == 0, "a block with a shard missing counts as stored"
            client.store(ns, HASHES, np.full((len(HASHES), BASE.block_bytes), number + 1, np.uint8))
        for number, ns in enumerate(ranks):
            memory = np.zeros((len(HASHES), BASE.block_bytes), np.uint8)
            assert client.fetch(ns, HASHES, memory).blocks == len(HASHES)
            assert (memory == number + 1).all()


def test_session_cannot_name_or_map_a_namespace_it_did_not_open(daemon: LiveDaemon) -> None:
    with Client(daemon.runtime_dir, strict=True) as owner:
        ns = owner.open_namespace(replace(BASE, shard_size=1, tenant_salt=b"secret"))
        owner.store(ns, HASHES, np.ones((len(HASHES), BASE.block_bytes), np.uint8))
        session = SessionClient.connect(daemon.runtime_dir / "session.sock", "stranger", deadline=time.monotonic() + 10)
        with closing(session), ControlLink(str(daemon.runtime_dir), 10.0) as stranger:
            for handle in range(1, 64):
                with pytest.raises(UnknownNamespace):
                    stranger.call(LookupRequest(handle, b"".join(HASHES)), LookupReply)
                with pytest.raises(UnknownNamespace):
                    stranger.call(ReserveRequest(handle, b"", b"".join(HASHES)), ReserveReply)
                with pytest.raises(UnknownNamespace):
                    session.map_slab(handle, 0, time.monotonic() + 10)


STRANGER = """
import os, sys
from forebay.daemon.control_link import ControlLink
from forebay.kvstore.errors import Forbidden, PeerLost
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    ControlLink(sys.argv[1], 5.0)
except (Forbidden, PeerLost) as error:
    print(type(error).__name__, error)
    sys.exit(7)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("reachable", [False, True], ids=["closed folder", "open folder"])
def test_another_user_is_refused(daemon: LiveDaemon, reachable: bool) -> None:
    """By the folder's mode; and by the peer credentials where an operator left the folder and the socket open."""
    modes = {daemon.runtime_dir: 0o755, daemon.runtime_dir / "session.sock": 0o666}
    parents = [daemon.runtime_dir.parent]
    before = {path: path.stat().st_mode & 0o777 for path in [*modes, *parents]}
    try:
        for path in parents:
            path.chmod(0o755)
        for path, mode in modes.items():
            path.chmod(mode if reachable else before[path])
        stranger = subprocess.run(
            [sys.executable, "-P", "-c", STRANGER, str(daemon.runtime_dir)], capture_output=True, text=True, timeout=30
        )
    finally:
        for path, mode in before.items():
            path.chmod(mode)
    assert stranger.returncode == 7, stranger.stderr
    if reachable:
        assert "Forbidden" in stranger.stdout
