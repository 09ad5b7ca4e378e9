"""What this machine's memory is like: how much, which page kinds, swap, lock limit, NUMA nodes, cgroup limit.

Read from /proc and /sys at each call, since most of it changes under a running daemon. Tests point `root` at a
folder of their own. A fact that cannot be read counts as absent: no huge pages, no swap, no limit.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

HUGE_PAGE_BYTES = 2 << 20

_CAP_IPC_LOCK = 14  # linux/capability.h
_NVIDIA, _DISPLAY_CLASS = "0x10de", "0x03"  # of PCI devices
_CGROUP_MOUNTS = {  # hierarchy -> (mount points, file of the limit)
    "v2": (("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max"),
    "v1": (("sys/fs/cgroup/memory",), "memory.limit_in_bytes"),
}


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """Facts about memory, each read when asked for."""

    root: Path = Path("/")

    def available_bytes(self) -> int:
        """What can be taken without pushing others out, never more than the cgroup's limit."""
        available = self._meminfo_bytes("MemAvailable")
        return min([available, *self._cgroup_limits_bytes()])

    def swap_bytes(self) -> int:
        return self._meminfo_bytes("SwapTotal")

    def free_hugetlb_bytes(self) -> int:
        """2 MiB pages of the hugetlb pool that nobody holds or has reserved."""
        pool = "sys/kernel/mm/hugepages/hugepages-2048kB"
        pages = self._number(f"{pool}/free_hugepages") - self._number(f"{pool}/resv_hugepages")
        return max(0, pages) * HUGE_PAGE_BYTES

    def shmem_thp(self) -> bool:
        """Whether shared memory that asks with MADV_HUGEPAGE gets transparent huge pages."""
        modes = self._text("sys/kernel/mm/transparent_hugepage/shmem_enabled")
        return any(f"[{mode}]" in modes for mode in ("always", "within_size", "advise", "force"))

    def numa_nodes(self) -> tuple[int, ...]:
        """Nodes that have memory; (0,) where the kernel knows none."""
        return tuple(_ranges(self._text("sys/devices/system/node/has_memory"))) or (0,)

    def gpu_nodes(self) -> tuple[int, ...]:
        """Nodes that NVIDIA GPUs are on, each once; without those of which the machine does not know it."""
        nodes = set()
        for device in sorted(self.root.glob("sys/bus/pci/devices/*")):
            path = device.relative_to(self.root)
            words = [self._text(f"{path}/{name}").strip() for name in ("vendor", "class", "numa_node")]
            if words[0] == _NVIDIA and words[1].startswith(_DISPLAY_CLASS) and words[2].isdigit():
                nodes.add(int(words[2]))
        return tuple(sorted(nodes))

    def lock_limit_bytes(self) -> int | None:
        """RLIMIT_MEMLOCK of this process, or None where nothing limits it (CAP_IPC_LOCK)."""
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        for line in self._text("proc/self/status").splitlines():
            if line.startswith("CapEff:") and int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1:
                return None
        return None if soft == resource.RLIM_INFINITY else soft

    def _cgroup_limits_bytes(self) -> Iterator[int]:
        """Limits of this process' memory cgroup and of all above it; a container sees its own as the root."""
        for line in self._text("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mounts, name = _CGROUP_MOUNTS["v1" if controllers else "v2"]
            inside = PurePosixPath(path.lstrip("/"))
            for folder in (inside, *inside.parents):
                for mount in mounts:
                    text = self._text(f"{mount}/{folder}/{name}").strip()
                    if text.isdigit():  # "max" otherwise
                        yield int(text)

    def _meminfo_bytes(self, field: str) -> int:
        for line in self._text("proc/meminfo").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
        return 0

    def _number(self, path: str) -> int:
        text = self._text(path).strip()
        return int(text) if text.isdigit() else 0

    def _text(self, path: str) -> str:
        try:
            return (self.root / path).read_text()
        except OSError:
            return ""


def _ranges(text: str) -> Iterator[int]:
    """The numbers of a kernel list such as "0-3,8"."""
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
