"""Facts about memory are read right from /proc and /sys as various kernels and containers write them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from forebay.tiers.machine import MachineMemory

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> MachineMemory:
    files = {"proc/meminfo": f"MemTotal: {32 << 20} kB\nMemAvailable: {16 << 20} kB\nSwapTotal: 0 kB\n", **files}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return MachineMemory(root)


def test_this_machine_has_memory_and_a_node() -> None:
    machine = MachineMemory()
    assert machine.available_bytes() > 0
    assert machine.numa_nodes()


def test_available_memory_without_cgroups_is_the_kernels(tmp_path: Path) -> None:
    assert write(tmp_path, {}).available_bytes() == 16 * GIB


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": f"{GIB}\n"},
        {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/memory.max": f"{GIB}\n", "sys/fs/cgroup/a/b/memory.max": ""},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"},
        {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/unified/a/memory.max": f"{GIB}\n"},
        {"proc/self/cgroup": "4:cpu,memory:/a\n0::/\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{GIB}\n"},
        {"proc/self/cgroup": "4:memory:/host/path\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n"},
    ],
    ids=["v2", "v2 parent", "v2 container", "hybrid", "v1", "v1 container"],
)  # fmt: skip
def test_available_memory_is_bounded_by_the_cgroup(tmp_path: Path, files: dict[str, str]) -> None:
    assert write(tmp_path, files).available_bytes() == GIB


def test_cgroup_without_a_limit_bounds_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/a\n2:cpu:/\n0::/\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu/memory.limit_in_bytes": "1\n",
    }
    assert write(tmp_path, files).available_bytes() == 16 * GIB


def test_reserved_huge_pages_are_not_free(tmp_path: Path) -> None:
    pool = "sys/kernel/mm/hugepages/hugepages-2048kB"
    machine = write(tmp_path, {f"{pool}/free_hugepages": "10\n", f"{pool}/resv_hugepages": "3\n"})
    assert machine.free_hugetlb_bytes() == 7 * (2 << 20)
    assert MachineMemory(tmp_path / "absent").free_hugetlb_bytes() == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("always within_size advise [never] deny force", False),
        ("always within_size [advise] never deny force", True),
        ("always [within_size] advise never deny force", True),
        ("[always] within_size advise never deny force", True),
        ("always within_size advise never [deny] force", False),
        ("", False),
    ],
)
def test_shared_memory_thp_follows_the_bracketed_mode(tmp_path: Path, text: str, expected: bool) -> None:
    machine = write(tmp_path, {"sys/kernel/mm/transparent_hugepage/shmem_enabled": text})
    assert machine.shmem_thp() is expected


def test_numa_nodes_are_read_from_ranges(tmp_path: Path) -> None:
    assert write(tmp_path, {"sys/devices/system/node/has_memory": "0-2,8\n"}).numa_nodes() == (0, 1, 2, 8)
    assert MachineMemory(tmp_path / "absent").numa_nodes() == (0,)


def test_nodes_of_gpus_are_those_of_nvidias_display_devices(tmp_path: Path) -> None:
    def device(address: str, vendor: str, kind: str, node: str) -> dict[str, str]:
        folder = f"sys/bus/pci/devices/0000:{address}"
        return {f"{folder}/vendor": vendor, f"{folder}/class": kind, f"{folder}/numa_node": node}

    assert MachineMemory(tmp_path / "absent").gpu_nodes() == ()
    files = device("01:00.0", "0x10de\n", "0x030200\n", "1\n") | device("02:00.0", "0x10de\n", "0x030000\n", "1\n")
    files |= device("03:00.0", "0x10de\n", "0x068000\n", "0\n") | device("04:00.0", "0x1a03\n", "0x030000\n", "0\n")
    files |= device("05:00.0", "0x10de\n", "0x030200\n", "-1\n")
    assert write(tmp_path, files).gpu_nodes() == (1,)
    assert write(tmp_path, device("06:00.0", "0x10de\n", "0x030200\n", "0\n")).gpu_nodes() == (0, 1)


def test_swap_is_read_in_bytes(tmp_path: Path) -> None:
    assert write(tmp_path, {"proc/meminfo": "SwapTotal: 1024 kB\n"}).swap_bytes() == 1 << 20


def test_lock_limit_is_the_rlimit_unless_a_capability_lifts_it(tmp_path: Path) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    expected = None if soft == resource.RLIM_INFINITY else soft
    plain = write(tmp_path, {"proc/self/status": "Name: x\nCapEff:\t0000000000000000\n"})
    assert plain.lock_limit_bytes() == expected
    capable = write(tmp_path, {"proc/self/status": f"CapEff:\t{1 << 14:016x}\n"})
    assert capable.lock_limit_bytes() is None
