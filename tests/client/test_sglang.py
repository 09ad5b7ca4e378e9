"""The SGLang backend against a daemon of the real protocol: right bytes, honest misses, nothing shared wrongly.

SGLang's own types are used where SGLang is installed, small stand-ins elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from forebay.kvstore.errors import BadRequest, Busy  # noqa: E402
from forebay.transports.messages import Verb  # noqa: E402
from support import fake_sglang  # noqa: E402
from support.fake_daemon import FakeDaemon  # noqa: E402
from support.fake_sglang import HostPool, OpaquePool, config  # noqa: E402

fake_sglang.install()

from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer  # noqa: E402

from forebay.client import sglang as backend_module  # noqa: E402
from forebay.client.sglang import ForebayStorage  # noqa: E402

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "engines.md"
PAGES = 8
TRAILING, ALL = PoolHitPolicy.TRAILING_PAGES, PoolHitPolicy.ALL_PAGES


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with FakeDaemon(capacity=256) as fake:
        yield fake


def keys_of(label: str, count: int) -> list[str]:
    return [hashlib.sha256(f"{label}{number}".encode()).hexdigest() for number in range(count)]


def backend(daemon: FakeDaemon, pool: Any, *, options: dict[str, Any] | None = None, **changed: Any) -> ForebayStorage:
    """A backend with one registered pool, made as SGLang makes it."""
    extra = {"interface_v1": 1, "forebay": {"runtime_dir": str(daemon.runtime_dir), **(options or {})}}
    made = ForebayStorage(config(**{"extra_config": extra, **changed}), {})
    made.register_mem_pool_host(pool)
    return made


def fill(pool: HostPool, seed: int) -> Any:
    """Random bytes in every page; returns a copy."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(1, 255, pool.kv_buffer.shape, generator=generator, dtype=torch.uint8)
    pool.kv_buffer.view(torch.uint8)[:] = raw if pool.dtype == torch.uint8 else raw.repeat_interleave(2, dim=-1)
    return pool.kv_buffer.clone()


def page_equal(pool: HostPool, number: int, before: Any, other: int) -> bool:
    axis = 1 if pool.layout == "page_first" else 2
    return torch.equal(pool.page(number), before.narrow(axis, other * pool.page_size, pool.page_size))


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
@pytest.mark.parametrize("kind", [HostPool, OpaquePool])
def test_pages_come_back_to_other_places(daemon: FakeDaemon, layout: str, kind: type[HostPool]) -> None:
    pool = kind(PAGES, layout=layout)
    storage, keys = backend(daemon, pool), keys_of("a", 4)
    before = fill(pool, 1)
    assert storage.batch_set_v1(keys, pool.slots([5, 0, 7, 2])) == [True] * 4
    assert storage.batch_exists(keys) == 4
    pool.kv_buffer.zero_()
    assert storage.batch_get_v1(keys, pool.slots([1, 3, 4, 6])) == [True] * 4
    for target, source in zip([1, 3, 4, 6], [5, 0, 7, 2], strict=True):
        assert page_equal(pool, target, before, source)
    assert not pool.page(0).any(), "a page that was not asked for was written"
    storage.close()


def test_pages_move_by_their_addresses(daemon: FakeDaemon) -> None:
    """One fetch for all pages, and as many segments as the layout has runs."""
    pool = HostPool(PAGES, layout="layer_first", layers=5)
    storage, keys = backend(daemon, pool), keys_of("a", PAGES)
    assert len(daemon.run(daemon.namespace).spec.segment_bytes) == 10
    fill(pool, 1)
    storage.batch_set_v1(keys, pool.slots(list(range(PAGES))))
    asked = daemon.sent(Verb.ACQUIRE)
    assert storage.batch_get_v1(keys, pool.slots(list(range(PAGES)))) == [True] * PAGES
    assert daemon.sent(Verb.ACQUIRE) == asked + 1
    storage.close()


def test_pages_that_are_sooner_computed_count_as_absent(daemon: FakeDaemon) -> None:
    """The engine prefetches what exists, so the advice is given there; stores are decided elsewhere."""
    pool = HostPool(PAGES, layout="layer_first", layers=5)
    storage, keys = backend(daemon, pool), keys_of("a", PAGES)
    storage.batch_set_v1(keys, pool.slots(list(range(PAGES))))
    found = []
    for daemon.worth in (None, 2, 0):
        found.append(storage.batch_exists(keys))
    assert found == [PAGES, 2, 0]
    storage.close()


def test_gap_is_told_and_stepped_over(daemon: FakeDaemon) -> None:
    pool = HostPool(PAGES)
    storage, keys = backend(daemon, pool), keys_of("a", 4)
    fill(pool, 1)
    for number in (0, 2, 3):
        storage.batch_set_v1([keys[number]], pool.slots([number]))
    assert storage.batch_exists(keys) == 1
    assert storage.batch_get_v1(keys, pool.slots([4, 5, 6, 7])) == [True, False, True, True]
    assert page_equal(pool, 6, pool.kv_buffer, 2)
    storage.close()


def test_chain_goes_on_where_the_prefix_is_stored_and_where_it_is_not(daemon: FakeDaemon) -> None:
    pool = HostPool(PAGES)
    storage, keys = backend(daemon, pool), keys_of("a", 4)
    storage.batch_set_v1(keys[:2], pool.slots([0, 1]))

    class Prefix:
        prefix_keys = keys[:2]

    class Unknown:
        prefix_keys = keys_of("nobody", 2)

    assert storage.batch_set_v1(keys[2:], pool.slots([2, 3]), Prefix) == [True, True]
    assert storage.batch_exists(keys) == 4
    assert storage.batch_set_v1(keys_of("b", 2), pool.slots([2, 3]), Unknown) == [True, True]
    storage.close()


def tensors(daemon: FakeDaemon, pool: Any) -> ForebayStorage:
    return backend(daemon, pool, extra_config={"forebay": {"runtime_dir": str(daemon.runtime_dir)}})


def test_without_interface_v1_pages_are_tensors(daemon: FakeDaemon) -> None:
    pool = HostPool(PAGES, layout="layer_first")
    storage, keys = tensors(daemon, pool), keys_of("a", 3)
    before = fill(pool, 1)
    assert storage.batch_set(keys[:2], [pool.get_data_page(n * 4, flat=False) for n in (0, 1)])
    assert [storage.exists(key) for key in keys] == [True, True, False]
    found = storage.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
    assert found[2] is None
    pool.set_from_flat_data_page(4 * 4, found[1])
    assert page_equal(pool, 4, before, 1)
    assert storage.get(keys[0]) is None
    assert not storage.set(keys[2])
    storage.close()


def test_tensors_and_addresses_never_mix(daemon: FakeDaemon) -> None:
    """A page in one order of bytes must not be read in another."""
    pool = HostPool(PAGES, layout="layer_first")
    flat, mapped, keys = tensors(daemon, pool), backend(daemon, pool), keys_of("a", 2)
    assert flat.batch_set(keys, [pool.get_data_page(0)] * 2)
    assert mapped.batch_exists(keys) == 0
    assert not mapped.set(keys[0], pool.get_data_page(0))
    assert mapped.get(keys[0], pool.get_dummy_flat_data_page()) is None
    flat.close()
    mapped.close()


APART: list[dict[str, Any]] = [
    {"model_name": "other"},
    {"options": {"revision": "2"}},
    {"tp_size": 2},
    {"tp_size": 2, "tp_rank": 1},
    {"pp_size": 2},
    {"pp_size": 2, "pp_rank": 1},
    {"attn_cp_size": 2},
    {"is_mla_model": True},
    {"pool": {"layout": "layer_first"}},
    {"pool": {"page_size": 8, "layers": 3, "width": 4}},
    {"pool": {"dtype": torch.bfloat16, "width": 4}},
    {"pool": {"layers": 4, "width": 6}},
]


@pytest.mark.parametrize("changed", APART, ids=repr)
def test_what_makes_pages_incompatible_keeps_them_apart(daemon: FakeDaemon, changed: dict[str, Any]) -> None:
    pool = HostPool(PAGES)
    keys = keys_of("a", 2)
    one = backend(daemon, pool)
    assert one.batch_set_v1(keys, pool.slots([0, 1])) == [True, True]
    other_pool = HostPool(PAGES, **changed.pop("pool", {}))
    other = backend(daemon, other_pool, **changed)
    assert other.batch_exists(keys) == 0
    assert other.batch_get_v1(keys, other_pool.slots([0, 1])) == [False, False]
    one.close()
    other.close()


SETTINGS: list[dict[str, Any]] = [
    {"json_model_override_args": '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}'},
    {"quantization_param_path": "/scales.json"},
    {"modelopt_quant": "fp8"},
    {"speculative_draft_model_path": "draft"},
    {"load_format": "dummy"},
    {"kv_cache_dtype": "fp8_e4m3"},
    {"quantization": "fp8"},
]


@pytest.mark.parametrize("given", SETTINGS, ids=repr)
def test_start_options_that_change_the_bytes_keep_pages_apart(
    daemon: FakeDaemon, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, keys = HostPool(PAGES), keys_of("a", 2)
    plain = {"json_model_override_args": "{}", "load_format": "auto", "quantization": None}
    monkeypatch.setattr(backend_module, "_served", lambda: plain)
    one, same = backend(daemon, pool), backend(daemon, pool)
    monkeypatch.setattr(backend_module, "_served", lambda: {**plain, **given})
    other = backend(daemon, pool)
    assert one.batch_set_v1(keys, pool.slots([0, 1])) == [True, True]
    assert (same.batch_exists(keys), other.batch_exists(keys)) == (2, 0)
    for storage in (one, same, other):
        storage.close()


def test_salted_keys_are_other_pages(daemon: FakeDaemon) -> None:
    """SGLang mixes cache_salt into the keys; a key is a page's whole name."""
    pool = HostPool(PAGES)
    storage = backend(daemon, pool)
    storage.batch_set_v1(keys_of("salt one", 2), pool.slots([0, 1]))
    assert storage.batch_exists(keys_of("salt two", 2)) == 0
    storage.close()


def test_mla_ranks_share_what_one_of_them_writes(daemon: FakeDaemon) -> None:
    pools = [HostPool(PAGES), HostPool(PAGES)]
    ranks = [backend(daemon, pool, is_mla_model=True, tp_rank=rank, tp_size=2) for rank, pool in enumerate(pools)]
    keys, before = keys_of("a", 2), fill(pools[0], 1)
    assert ranks[1].batch_set_v1(keys, pools[1].slots([0, 1])) == [True, True]
    assert ranks[0].batch_exists(keys) == 0, "the second rank wrote"
    assert ranks[0].batch_set_v1(keys, pools[0].slots([0, 1])) == [True, True]
    assert ranks[1].batch_get_v1(keys, pools[1].slots([4, 5])) == [True, True]
    assert page_equal(pools[1], 4, before, 0)
    for rank in ranks:
        rank.close()


def test_recurrent_state_is_each_ranks_own_under_mla(daemon: FakeDaemon) -> None:
    pool, state = HostPool(PAGES), HostPool(PAGES, page_size=1)
    storage = backend(daemon, pool, is_mla_model=True, tp_rank=1, tp_size=2)
    storage.register_mem_host_pool_v2(state, PoolName.MAMBA)
    kinds = daemon.run(lambda: {s.spec.kv_group[:5]: s.spec.shard_kind for s in daemon._namespaces.values()})
    assert kinds == {"kv/pp": "replicated", "mamba": "sharded"}
    storage.close()


# --- hybrid pools: the cases of SGLang's TestHiCacheFilePrefix -------------------------------------------------

SWA, MAMBA, INDEXER = PoolName.SWA, PoolName.MAMBA, PoolName.INDEXER
PREFIX_CASES: dict[str, tuple[set[int], list[tuple[Any, set[int], Any, int]], list[int], int]] = {
    "aligned": ({1, 2, 3}, [(SWA, {3}, TRAILING, 1), (MAMBA, {3}, TRAILING, 1)], [3], 3),
    "disjoint": ({1, 2, 3}, [(SWA, {3}, TRAILING, 1), (MAMBA, {2}, TRAILING, 1)], [], 3),
    "several ends": ({1, 2, 3}, [(MAMBA, {1, 3}, TRAILING, 1)], [1, 3], 3),
    "earlier common end": ({1, 2, 3}, [(SWA, {1, 3}, TRAILING, 1), (MAMBA, {1, 2}, TRAILING, 1)], [1], 3),
    "all pages cut trailing": ({1, 2, 3}, [(INDEXER, {1, 2}, ALL, 3), (MAMBA, {1, 3}, TRAILING, 1)], [1], 3),
    "window with holes": (
        {1, 2, 3, 4, 5},
        [(SWA, {1, 2, 4, 5}, TRAILING, 2), (MAMBA, {2, 4}, TRAILING, 1)],
        [2],
        5,
    ),
    "shorter than the window": ({1, 2}, [(SWA, {1, 2}, TRAILING, 3)], [1, 2], 3),
    "hole in kv": ({1, 3}, [(MAMBA, {3}, TRAILING, 1)], [], 3),
    "kv alone": ({1, 3}, [], [1], 3),
    "nothing stored": (set(), [], [], 3),
    "nothing asked": (set(), [], [], 0),
    "block groups have no say": ({1, 2}, [(SWA, set(), PoolHitPolicy.BLOCK_GROUPS, 1)], [1, 2], 3),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", PREFIX_CASES)
def test_restorable_prefixes(daemon: FakeDaemon, case: str, reverse: bool) -> None:
    kv_pages, pools, expected, count = PREFIX_CASES[case]
    storage = backend(daemon, HostPool(PAGES))
    keys = [f"page{number}" for number in range(1, count + 1)]
    everything: Sequence[tuple[Any, set[int]]] = [
        (PoolName.KV, kv_pages),
        *[(name, pages) for name, pages, _, _ in pools],
    ]
    for name, pages in everything:
        host = HostPool(PAGES, width=8 if name == PoolName.KV else 16)
        storage.register_mem_host_pool_v2(host, name)
        for page in pages:
            transfer = PoolTransfer(name=name, keys=[keys[page - 1]], host_indices=host.slots([page]))
            assert storage.batch_set_v2([transfer])[name] == [True]
    transfers = [PoolTransfer(name=name, keys=keys[-window:], hit_policy=policy) for name, _, policy, window in pools]
    result = storage.batch_exists_v2(keys, transfers[::-1] if reverse else transfers)
    assert result.kv_hit_pages == max(expected, default=0)
    assert result.restorable_prefix_pages == expected
    storage.close()


def test_pools_of_a_hybrid_model_come_back_each_in_its_place(daemon: FakeDaemon) -> None:
    kv, swa = HostPool(PAGES), HostPool(PAGES, width=16)
    storage, keys = backend(daemon, kv), keys_of("a", 2)
    storage.register_mem_host_pool_v2(swa, SWA)
    stored_kv, stored_swa = fill(kv, 1), fill(swa, 2)

    def transfers(pages: list[int]) -> list[Any]:
        named = ((PoolName.KV, kv), (SWA, swa))
        return [PoolTransfer(name=name, keys=keys, host_indices=pool.slots(pages)) for name, pool in named]

    assert storage.batch_set_v2(transfers([0, 1])) == {PoolName.KV: [True] * 2, SWA: [True] * 2}
    assert storage.batch_get_v2(transfers([6, 5])) == {PoolName.KV: [True] * 2, SWA: [True] * 2}
    assert page_equal(kv, 6, stored_kv, 0)
    assert page_equal(swa, 5, stored_swa, 1)
    storage.close()


def test_metrics_tell_of_each_transfer_once(daemon: FakeDaemon) -> None:
    pool = HostPool(PAGES)
    storage, keys = backend(daemon, pool, enable_storage_metrics=True), keys_of("a", 3)
    storage.batch_set_v1(keys, pool.slots([0, 1, 2]))
    storage.batch_get_v1([*keys[:2], *keys_of("b", 1)], pool.slots([0, 1, 2]))
    storage.batch_get_v1(keys_of("b", 1), pool.slots([0]))
    told, again = storage.get_stats(), storage.get_stats()
    assert (told.backup_pgs, told.prefetch_pgs) == ([3], [2])
    assert all(rate > 0 for rate in (*told.backup_bandwidth, *told.prefetch_bandwidth))
    assert (again.backup_pgs, again.prefetch_pgs) == ([], [])
    silent = backend(daemon, pool)
    assert silent.get_stats() is None
    for each in (storage, silent):
        each.close()


# --- what goes wrong -------------------------------------------------------------------------------------------


def test_wrong_arguments_are_misses_not_errors(daemon: FakeDaemon) -> None:
    """Slots that do not fit the keys, unaligned or outside the pool, and pools nobody registered."""
    pool = HostPool(PAGES)
    storage, keys = backend(daemon, pool), keys_of("a", 2)
    wrong = [pool.slots([0]), pool.slots([0, 1]) + 1, pool.slots([0, PAGES])]
    for slots in wrong:
        assert storage.batch_set_v1(keys, slots) == [False, False]
        assert storage.batch_get_v1(keys, slots) == [False, False]
    transfer = PoolTransfer(name=SWA, keys=keys, host_indices=pool.slots([0, 1]))
    assert storage.batch_get_v2([transfer]) == {SWA: [False, False]}
    assert storage.batch_set_v2([PoolTransfer(name=PoolName.KV, keys=keys)]) == {PoolName.KV: [False, False]}
    storage.close()


def test_dead_daemon_is_misses_and_a_new_one_serves(daemon: FakeDaemon) -> None:
    pool = HostPool(PAGES)
    storage, keys = backend(daemon, pool, options={"budget_ms": 200}), keys_of("a", 2)
    storage.batch_set_v1(keys, pool.slots([0, 1]))
    daemon.stop()
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v1(keys, pool.slots([0, 1])) == [False, False]
    assert storage.batch_set_v1(keys, pool.slots([0, 1])) == [False, False]
    assert storage.batch_exists_v2(keys, [PoolTransfer(name=PoolName.KV, keys=keys)]).kv_hit_pages == 0
    assert not storage.clear()
    daemon.start()
    storage._client._breaker.succeeded()  # its back-off is over
    assert storage.batch_set_v1(keys, pool.slots([0, 1])) == [True, True]
    storage.close()


def test_engine_starts_without_a_daemon(tmp_path: Any) -> None:
    pool = HostPool(PAGES)
    storage = ForebayStorage(config(extra_config={"interface_v1": 1, "forebay": {"runtime_dir": str(tmp_path)}}), {})
    storage.register_mem_pool_host(pool)
    assert storage.batch_exists(keys_of("a", 2)) == 0
    storage.close()


def test_clear_removes_the_pages_of_this_model_only(daemon: FakeDaemon) -> None:
    pool = HostPool(PAGES)
    one, other, keys = backend(daemon, pool), backend(daemon, pool, model_name="other"), keys_of("a", 2)
    for storage in (one, other):
        storage.batch_set_v1(keys, pool.slots([0, 1]))
    assert one.clear()
    assert (one.batch_exists(keys), other.batch_exists(keys)) == (0, 2)
    one.close()
    other.close()


def test_clear_admits_that_pages_in_use_stay(daemon: FakeDaemon) -> None:
    """Who clears has often replaced the weights: pages of the old ones must not pass for removed."""
    pool = HostPool(PAGES)
    storage, keys = backend(daemon, pool), keys_of("a", 2)
    storage.batch_set_v1(keys, pool.slots([0, 1]))
    ns, held = storage._pools[str(PoolName.KV.value)].ns, [bytes.fromhex(keys[0])]
    storage._client.pin(ns, held)
    assert not storage.clear()
    storage._client.unpin(ns, held)
    assert storage.clear()
    assert storage.batch_exists(keys) == 0
    storage.close()


def test_clear_admits_that_the_daemon_refused(daemon: FakeDaemon) -> None:
    pool = HostPool(PAGES)
    storage = backend(daemon, pool)
    daemon.run(lambda: daemon.fail.update({Verb.EVICT: Busy("later")}))
    assert not storage.clear()
    storage.close()


def test_key_that_only_looks_like_hex_is_hashed(daemon: FakeDaemon) -> None:
    pool = HostPool(PAGES)
    storage, keys = backend(daemon, pool), [" " * 64, "ab " * 21 + "a", "x" * 64]
    assert storage.batch_exists(keys) == 0
    assert storage.batch_set_v1(keys, pool.slots([0, 1, 2])) == [True] * 3
    assert storage.batch_exists(keys) == 3
    storage.close()


@pytest.mark.parametrize(
    "extra",
    [
        {"forebay": {"budgetms": 3}},
        {"forebay": {"budget_ms": "3"}},
        {"forebay": {"revision": 3}},
        {"forebay": 3},
        {"budget_ms": 3},
        {"revision": "r"},
    ],
    ids=repr,
)
def test_wrong_options_stop_the_engine(extra: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        ForebayStorage(config(extra_config=extra), {})


def test_the_guides_options_are_taken_as_printed(daemon: FakeDaemon) -> None:
    found = re.search(r"--hicache-storage-backend-extra-config '(\{.*?\})'", GUIDE.read_text(), flags=re.DOTALL)
    assert found is not None
    extra = json.loads(found[1])
    assert (extra["module_path"], extra["class_name"]) == (ForebayStorage.__module__, ForebayStorage.__name__)
    extra["forebay"]["runtime_dir"] = str(daemon.runtime_dir)
    pool = HostPool(PAGES)
    storage = ForebayStorage(config(extra_config=extra), {})
    storage.register_mem_pool_host(pool)
    assert storage.batch_set_v1(keys_of("a", 2), pool.slots([0, 1])) == [True] * 2
    assert storage.batch_exists(keys_of("a", 2)) == 2
    assert [pool.ns.spec.revision for pool in storage._pools.values() if pool.ns.spec] == ["2026-11"]
    storage.close()


def test_missing_model_name_stops_the_engine() -> None:
    with pytest.raises(BadRequest, match="model name"):
        ForebayStorage(config(model_name=None), {})
