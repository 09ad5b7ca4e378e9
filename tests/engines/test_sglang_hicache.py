"""Our SGLang backend beside SGLang's own file backend: one random sequence of calls, the same answers and bytes.

Needs SGLang (0.5.23), without its CUDA parts; a real daemon; the backend is made by SGLang's own factory.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from support.fake_sglang import REAL, HostPool, OpaquePool  # noqa: E402

if not REAL:
    pytest.skip("SGLang is not installed", allow_module_level=True)
hicache = pytest.importorskip("sglang.srt.mem_cache.hicache_storage", reason="SGLang's imports are not complete")

from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory  # noqa: E402

from support.live import LiveDaemon  # noqa: E402

PAGES, SEEDS, CALLS = 12, 12, 120
KV, SWA, MAMBA, INDEXER = (getattr(hicache.PoolName, name) for name in ("KV", "SWA", "MAMBA", "INDEXER"))
POLICIES = {INDEXER: hicache.PoolHitPolicy.ALL_PAGES}
CHAINS = [[hashlib.sha256(f"{salt}/{n}".encode()).hexdigest() for n in range(PAGES)] for salt in ("a", "b", "c")]
Pools = dict[Any, HostPool]


@pytest.fixture(scope="module")
def daemon() -> Iterator[LiveDaemon]:
    with LiveDaemon() as live:
        yield live


def config(daemon: LiveDaemon, model: str) -> Any:
    return hicache.HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name=model,
        extra_config={
            "backend_name": "forebay",
            "module_path": "forebay.client.sglang",
            "class_name": "ForebayStorage",
            "interface_v1": 1,
            "forebay": {"runtime_dir": str(daemon.runtime_dir), "budget_ms": 500},
        },
    )


def pools(layout: str) -> Pools:
    return {
        KV: HostPool(PAGES, layout=layout),
        SWA: HostPool(PAGES, layout=layout, width=16),
        MAMBA: OpaquePool(PAGES, page_size=1, width=32),
        INDEXER: HostPool(PAGES, layout=layout, layers=1),
    }


def register(backend: Any, hosts: Pools) -> None:
    backend.register_mem_pool_host(hosts[KV])
    for name, host in hosts.items():
        backend.register_mem_host_pool_v2(host, name)


class Pair:
    """Both backends, each with pools of its own that hold the same."""

    def __init__(self, daemon: LiveDaemon, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        layout = self.chance.choice(["page_first", "layer_first"])
        self.ours, self.theirs = pools(layout), pools(layout)
        setup = config(daemon, f"model {seed}")
        self.forebay = StorageBackendFactory.create_backend("dynamic", setup, self.ours[KV])
        self.files = hicache.HiCacheFile(setup, file_path=str(folder))
        register(self.forebay, self.ours)
        register(self.files, self.theirs)
        self.true = self.false = 0

    def keys(self) -> list[str]:
        chain = self.chance.choice(CHAINS)
        first = self.chance.choice([0, 0, self.chance.randrange(PAGES)])
        return chain[first : first + self.chance.randint(1, PAGES)]

    def scribble(self) -> None:
        """New bytes in every page, the same on both sides."""
        for name, host in self.ours.items():
            generator = torch.Generator().manual_seed(self.chance.getrandbits(30))
            host.kv_buffer[:] = torch.randint(0, 255, host.kv_buffer.shape, generator=generator, dtype=torch.uint8)
            self.theirs[name].kv_buffer[:] = host.kv_buffer

    def transfers(self, hosts: Pools, plan: list[tuple[Any, list[str], list[int]]]) -> list[Any]:
        return [
            hicache.PoolTransfer(name=name, keys=keys, host_indices=hosts[name].slots(pages))
            for name, keys, pages in plan
        ]

    def plan(self) -> list[tuple[Any, list[str], list[int]]]:
        chosen = self.chance.sample(list(self.ours), self.chance.randint(1, len(self.ours)))
        return [(name, keys := self.keys(), self.chance.sample(range(PAGES), len(keys))) for name in chosen]

    def set_v2(self) -> None:
        self.scribble()
        plan = self.plan()
        ours = self.forebay.batch_set_v2(self.transfers(self.ours, plan))
        assert ours == self.files.batch_set_v2(self.transfers(self.theirs, plan))

    def get_v2(self) -> None:
        self.scribble()
        plan = self.plan()
        ours = self.forebay.batch_get_v2(self.transfers(self.ours, plan))
        assert ours == self.files.batch_get_v2(self.transfers(self.theirs, plan))
        self.compare(plan, ours)

    def set_v1(self) -> None:
        self.scribble()
        _, keys, pages = plan = (KV, self.keys(), self.chance.sample(range(PAGES), PAGES))
        plan = (KV, keys, pages[: len(keys)])
        extra = hicache.HiCacheStorageExtraInfo(prefix_keys=self.chance.choice([None, CHAINS[0][:1]]))
        ours = self.forebay.batch_set_v1(keys, self.ours[KV].slots(plan[2]), extra)
        assert ours == self.files.batch_set_v2(self.transfers(self.theirs, [plan]))[KV]

    def get_v1(self) -> None:
        self.scribble()
        keys = self.keys()
        plan = (KV, keys, self.chance.sample(range(PAGES), len(keys)))
        ours = self.forebay.batch_get_v1(keys, self.ours[KV].slots(plan[2]))
        assert ours == self.files.batch_get_v2(self.transfers(self.theirs, [plan]))[KV]
        self.compare([plan], {KV: ours})

    def exists(self) -> None:
        keys = self.keys()
        assert self.forebay.batch_exists(keys) == self.files.batch_exists(keys)
        assert [self.forebay.exists(key) for key in keys] == [self.files.exists(key) for key in keys]

    def exists_v2(self) -> None:
        keys = self.keys()
        transfers = [
            hicache.PoolTransfer(
                name=name,
                keys=keys[-self.chance.randint(1, 3) :],
                hit_policy=POLICIES.get(name, hicache.PoolHitPolicy.TRAILING_PAGES),
            )
            for name in self.chance.sample([SWA, MAMBA, INDEXER], self.chance.randint(0, 3))
        ]
        assert self.forebay.batch_exists_v2(keys, transfers) == self.files.batch_exists_v2(keys, transfers)

    def clear(self) -> None:
        assert self.forebay.clear()
        self.files.clear()

    def compare(self, plan: list[tuple[Any, list[str], list[int]]], right: dict[Any, list[bool]]) -> None:
        """Pages that came are the same; where one did not, the memory is not looked at."""
        for name, _, pages in plan:
            for page, came in zip(pages, right[name], strict=True):
                self.true += came
                self.false += not came
                assert not came or torch.equal(self.ours[name].page(page), self.theirs[name].page(page))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_same_answers_and_bytes_as_the_file_backend(daemon: LiveDaemon, tmp_path: Path, seed: int) -> None:
    pair = Pair(daemon, tmp_path, seed)
    calls = [pair.set_v2, pair.get_v2, pair.set_v1, pair.get_v1, pair.exists, pair.exists_v2]
    for number in range(CALLS):
        if number == CALLS // 2:
            pair.clear()
        pair.chance.choice(calls)()
    print(f"seed {seed}: {pair.true} pages came, {pair.false} did not")
    assert pair.true > 50, "hardly anything was found"
    assert pair.false > 20, "hardly anything was missed"
    pair.forebay.close()


@pytest.fixture
def mha_pool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's host pool of keys and values, whose module imports torchvision and does not use it here."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            stand_in = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None), __path__=[])
            monkeypatch.setitem(sys.modules, name, stand_in)
    return pytest.importorskip("sglang.srt.mem_cache.pool_host.mha").MHATokenToKVPoolHost


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
def test_pages_of_sglangs_own_host_pool_come_back(daemon: LiveDaemon, mha_pool: Any, layout: str) -> None:
    """Its geometry and its addresses, without the device that its constructor wants."""
    pages, size, layers, heads, width = 6, 4, 3, 2, 8
    shapes = {
        "page_first": (2, pages * size, layers, heads, width),
        "page_first_direct": (2, pages, layers, size, heads, width),
        "layer_first": (2, layers, pages * size, heads, width),
    }
    pool = mha_pool.__new__(mha_pool)
    pool.layout, pool.page_size, pool.page_num, pool.size = layout, size, pages, pages * size
    pool.layer_num, pool.head_num, pool.head_dim, pool.dtype = layers, heads, width, torch.bfloat16
    pool.kv_buffer = torch.randn(shapes[layout]).to(torch.bfloat16)
    backend = StorageBackendFactory.create_backend("dynamic", config(daemon, f"real {layout}"), pool)
    backend.register_mem_pool_host(pool)
    assert type(backend._pools["kv"]).__name__ == "_MappedPool"
    before = [pool.get_data_page(page * size).clone() for page in range(pages)]
    keys = CHAINS[0][:3]

    def slots(chosen: list[int]) -> Any:
        return torch.cat([torch.arange(size) + page * size for page in chosen])

    assert backend.batch_set_v1(keys, slots([5, 0, 2])) == [True] * 3
    pool.kv_buffer.zero_()
    assert backend.batch_get_v1(keys, slots([1, 3, 4])) == [True] * 3
    for target, source in zip([1, 3, 4], [5, 0, 2], strict=True):
        assert torch.equal(pool.get_data_page(target * size), before[source])
    assert not pool.get_data_page(0).any()
    backend.close()
