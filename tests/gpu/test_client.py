"""The client with a real GPU and a daemon: blocks of cupy and torch stored, fetched, verified, in stream order."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

for needed in ("zmq", "lmdb", "msgpack", "psutil", "prometheus_client", "xxhash"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: no daemon can run here")

from forebay.client import Client, FetchResult, NamespaceSpec, PrefixHasher, SegmentTable  # noqa: E402
from support.live import LiveDaemon, eventually  # noqa: E402

try:
    import cupy
except ImportError:
    cupy = None

POISON = 0xA5
BLOCKS = 48
# Name: arrays, shape of one with blocks on axis 0, in 2-byte elements.
SHAPES = {
    "llama-8b": (64, (BLOCKS, 16, 8, 128)),
    "mla": (61, (BLOCKS, 16, 576)),
    "odd": (3, (BLOCKS, 5, 7, 3)),
}
LIBRARIES = ["cupy", "torch"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[LiveDaemon]:
    with LiveDaemon(host_bytes="1GiB") as live:
        yield live


@pytest.fixture
def client(daemon: LiveDaemon) -> Iterator[Client]:
    made = Client(daemon.runtime_dir, strict=True, timeout_ms=20_000.0, checksum_stores=True, verify="load")
    made.prepare(0)
    made.clear()
    yield made
    made.close()


class Paged:
    """The paged memory of an engine on GPU 0, filled with random bytes or with poison."""

    def __init__(self, library: str, count: int, shape: tuple[int, ...], *, seed: int | None = None) -> None:
        self.library = library
        random = np.random.default_rng(seed)
        fill = [
            np.full(shape, POISON << 8 | POISON, np.uint16) if seed is None
            else random.integers(0, 1 << 16, shape).astype(np.uint16)
            for _ in range(count)
        ]  # fmt: skip
        if library == "torch":
            torch = pytest.importorskip("torch", reason="torch is not installed")
            if not torch.cuda.is_available():
                pytest.skip("this torch has no CUDA")
            self.arrays = [torch.from_numpy(part.view(np.int16)).cuda().view(torch.bfloat16) for part in fill]
            torch.cuda.synchronize()
        else:
            self.arrays = [cupy.asarray(part) for part in fill]
            cupy.cuda.runtime.deviceSynchronize()
        self.table = SegmentTable.of(self.arrays)
        assert self.table.device == 0

    def host(self) -> list[Any]:
        """Copies in host memory, as uint16."""
        if self.library == "torch":
            import torch

            return [array.view(torch.int16).cpu().numpy().view(np.uint16) for array in self.arrays]
        return [cupy.asnumpy(array) for array in self.arrays]


def spec_of(name: str) -> NamespaceSpec:
    count, shape = SHAPES[name]
    return NamespaceSpec(f"gpu-{name}", "1", "bfloat16", 16, (2 * int(np.prod(shape[1:])),) * count)


def chain(spec: NamespaceSpec, blocks: int, seed: int = 0) -> list[bytes]:
    return PrefixHasher(spec).hashes(range(seed, seed + 16 * blocks))


def pinned(client: Client) -> Any:
    return client._copier.engines()[0].pinned  # type: ignore[attr-defined]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", SHAPES)
def test_blocks_come_back_into_other_blocks_and_nothing_else_is_touched(
    client: Client, name: str, library: str
) -> None:
    """Stored through the bounce buffer at first, fetched through it and then from pinned slabs."""
    spec = spec_of(name)
    ns, count = client.open_namespace(spec), 32
    source, target = Paged(library, *SHAPES[name], seed=1), Paged(library, *SHAPES[name])
    random = np.random.default_rng(3)
    from_ids, to_ids = random.permutation(BLOCKS)[:count], random.permutation(BLOCKS)[:count]
    assert client.store(ns, chain(spec, count), source.table, from_ids).committed == count
    expected = [np.full_like(array, POISON << 8 | POISON) for array in source.host()]
    for there, here in zip(expected, source.host(), strict=True):
        there[to_ids] = here[from_ids]
    for _ in range(2):
        target = Paged(library, *SHAPES[name])
        fetched = client.fetch(ns, chain(spec, count), target.table, to_ids)
        assert fetched == FetchResult(count, count * spec.block_bytes, "")
        assert all(np.array_equal(*pair) for pair in zip(target.host(), expected, strict=True))
        assert pinned(client).wait(60)
    status = pinned(client).status()
    rate = status.pinned / status.seconds / 1e9 if status.seconds else 0.0
    print(
        f"{name}, {library}: pinned {status.pinned >> 20} MiB at {rate:.1f} GB/s, refused: {status.refused or 'none'}"
    )


@pytest.mark.parametrize("name", SHAPES)
def test_checksums_of_the_gpu_are_those_of_the_cpu(client: Client, name: str) -> None:
    """Hashed on the GPU by the store, on the CPU by the fetch; then the other way round."""
    spec = spec_of(name)
    ns, (count, shape) = client.open_namespace(spec), SHAPES[name]
    source = Paged("cupy", count, shape, seed=2)
    assert client.store(ns, chain(spec, BLOCKS), source.table).committed == BLOCKS
    host = [np.zeros(shape, np.uint16) for _ in range(count)]
    assert client.fetch(ns, chain(spec, BLOCKS), host).blocks == BLOCKS
    assert all(np.array_equal(*pair) for pair in zip(host, source.host(), strict=True))
    client.clear()
    assert client.store(ns, chain(spec, BLOCKS), host).committed == BLOCKS
    target = Paged("cupy", count, shape)
    assert client.fetch(ns, chain(spec, BLOCKS), target.table).blocks == BLOCKS
    assert all(np.array_equal(*pair) for pair in zip(target.host(), host, strict=True))


def test_a_store_comes_after_a_slow_producer_and_a_load_after_a_slow_reader(client: Client) -> None:
    """On a stream that does not wait for the legacy one: only its handle tells the order."""
    spec = spec_of("llama-8b")
    ns, (count, shape) = client.open_namespace(spec), SHAPES["llama-8b"]
    source, target = Paged("cupy", count, shape, seed=4), Paged("cupy", count, shape)
    stream = cupy.cuda.Stream(non_blocking=True)
    busy = cupy.ones((4096, 4096), cupy.float32)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        for _ in range(20):
            busy = busy @ busy * 1e-4
        for array in source.arrays:
            array[...] = 0x1234
    assert client.store(ns, chain(spec, BLOCKS), source.table, stream=stream.ptr).committed == BLOCKS
    with stream:
        for _ in range(20):
            busy = busy @ busy * 1e-4
        seen = target.arrays[0].copy()
    assert client.fetch(ns, chain(spec, BLOCKS), target.table, stream=stream.ptr).blocks == BLOCKS
    stream.synchronize()
    assert bool((seen == (POISON << 8 | POISON)).all()), "the load overtook the reader"
    assert all(bool((array == 0x1234).all()) for array in target.arrays), "the store overtook the producer"


def test_the_default_stream_is_waited_for_without_a_word(client: Client) -> None:
    spec = spec_of("llama-8b")
    ns, (count, shape) = client.open_namespace(spec), SHAPES["llama-8b"]
    source, target = Paged("cupy", count, shape, seed=5), Paged("cupy", count, shape)
    busy = cupy.ones((4096, 4096), cupy.float32)
    for _ in range(20):
        busy = busy @ busy * 1e-4
    for array in source.arrays:
        array[...] = 0x4321
    assert client.store(ns, chain(spec, BLOCKS), source.table).committed == BLOCKS
    assert client.fetch(ns, chain(spec, BLOCKS), target.table).blocks == BLOCKS
    assert all(bool((array == 0x4321).all()) for array in target.arrays)


def test_blocks_too_small_for_the_gpus_checksum(client: Client) -> None:
    spec = NamespaceSpec("gpu-small", "1", "uint8", 16, (120, 120))
    ns = client.open_namespace(spec)
    source = [cupy.random.randint(0, 256, (BLOCKS, 120)).astype(cupy.uint8) for _ in range(2)]
    target = [cupy.zeros((BLOCKS, 120), cupy.uint8) for _ in range(2)]
    assert client.store(ns, chain(spec, BLOCKS), source).committed == BLOCKS
    assert client.fetch(ns, chain(spec, BLOCKS), target).blocks == BLOCKS
    assert all(bool((a == b).all()) for a, b in zip(source, target, strict=True))


def test_a_reservation_is_filled_on_the_gpu(client: Client) -> None:
    spec = spec_of("mla")
    ns, (count, shape) = client.open_namespace(spec), SHAPES["mla"]
    source, target = Paged("cupy", count, shape, seed=6), Paged("cupy", count, shape)
    with client.reserve(ns, chain(spec, 8)) as reservation:
        assert list(reservation.gather(source.table, range(8), stream=None)) == []
        assert reservation.commit() == 8
    assert client.fetch(ns, chain(spec, 8), target.table).blocks == 8
    assert all(np.array_equal(a[:8], b[:8]) for a, b in zip(target.host(), source.host(), strict=True))


def test_slabs_of_a_dead_daemon_are_unpinned_and_those_of_the_next_pinned() -> None:
    spec = spec_of("mla")
    with LiveDaemon(host_bytes="256MiB") as own:
        client = Client(own.runtime_dir, timeout_ms=20_000.0)
        ns, (count, shape) = client.open_namespace(spec), SHAPES["mla"]
        source, target = Paged("cupy", count, shape, seed=7), Paged("cupy", count, shape)
        assert client.store(ns, chain(spec, 16), source.table, range(16)).committed == 16
        assert pinned(client).wait(60)
        own.kill()
        assert client.fetch(ns, chain(spec, 16), target.table, range(16)).blocks == 0
        gc.collect()
        eventually(lambda: pinned(client).status().pinned == 0, "nothing is pinned any more", 30.0)
        own.start()
        ids = range(16)
        eventually(
            lambda: client.store(ns, chain(spec, 16), source.table, ids).committed == 16, "the daemon is found", 30.0
        )
        assert client.fetch(ns, chain(spec, 16), target.table, ids).blocks == 16
        assert all(np.array_equal(a[:16], b[:16]) for a, b in zip(target.host(), source.host(), strict=True))
        client.close()


def test_a_transformers_model_on_the_gpu_answers_the_same_from_the_cache(client: Client) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    from forebay.client.transformers import PrefixCache
    from support.tiny import GREEDY, plain, prompt_of, tiny_model

    model = tiny_model().cuda()
    prompt = prompt_of(200).cuda()
    expected = plain(model, prompt)
    cache = PrefixCache(client, model, revision="tiny")
    for restored in (0, 192):
        output, report = cache.generate(prompt, **GREEDY)
        assert (report.failure, report.bypassed, report.restored_tokens) == ("", "", restored)
        assert output[0].tolist() == expected
