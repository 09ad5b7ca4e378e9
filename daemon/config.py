"""The daemon's configuration: one frozen, typed tree, built once from defaults, a TOML file and flags, in that order.

Every key is declared here with its default, unit, bounds and the consequence of changing it;
``docs/configuration.md`` is generated from these declarations. A tree is only made by ``build``, which checks
everything, so code that holds a Config need check nothing. Values derived from several keys are computed in
``derive`` alone. ``configfile.py`` finds and reads the file. Rejected: a variable per key, a second and hidden
configuration.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forebay.daemon.settings import BadValue, Listen, Machine, Setting, measure_machine, read_listen, setting
from forebay.transports.messages import HASH_BYTES_MAX, HASHES_MAX, MESSAGE_BYTES_MAX

GIB = 1 << 30
MIB = 1 << 20
SLABS_MAX = 4096


class ConfigError(ValueError):
    """The operator's configuration cannot be used; ``problems`` names each wrong key by its path."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def _auto_host_bytes(machine: Machine, _: Mapping[str, Any]) -> int:
    """A quarter of the first 64 GiB, so that a laptop still works, and half of what a node has above that."""
    memory_bytes = machine.memory_bytes
    share = min(memory_bytes, 64 * GIB) // 4 + max(0, memory_bytes - 64 * GIB) // 2
    return max(MIB, share // MIB * MIB)


def _auto_slab_bytes(_: Machine, before: Mapping[str, Any]) -> int:
    """About 64 slabs for a small tier, never more than SLABS_MAX for a large one; a power of two from 2 to 256 MiB."""
    host_bytes = max(1, int(before["bytes"]))
    wanted = max(2 * MIB, min(256 * MIB, 1 << ((host_bytes // 64) | 1).bit_length() - 1))
    while host_bytes // wanted > SLABS_MAX:
        wanted *= 2
    return wanted


def _auto_nvme_slab_bytes(_: Machine, before: Mapping[str, Any]) -> int:
    """About 256 slabs a drive; a power of two from 2 MiB to 1 GiB."""
    share = max(1, int(before["bytes"])) // 256
    return max(2 * MIB, min(GIB, 1 << (share | 1).bit_length() - 1))


def _auto_populate_threads(machine: Machine, _: Mapping[str, Any]) -> int:
    return max(1, min(8, machine.cpus // 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Where the daemon's sockets are and how it logs."""

    dir: str = setting(
        "text", "", "path",
        "Folder of the sockets and the lock; clients must look in the same one. Empty: $FOREBAY_RUNTIME_DIR, else "
        "$XDG_RUNTIME_DIR/forebay, else /run/forebay, else /tmp/forebay-UID.",
    )  # fmt: skip
    log_level: str = setting(
        "choice", "info", "",
        "Least severe records that are written; debug names every session and slab.",
        choices=("debug", "info", "warning", "error"), reloads=True,
    )  # fmt: skip
    log_format: str = setting(
        "choice", "logfmt", "",
        "logfmt for people and journald, json for log collectors; both go to standard error.",
        choices=("logfmt", "json"), reloads=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """The host tier: blocks in shared memory that engines map."""

    bytes: int = setting(
        "size", "auto", "bytes",
        "Hard cap of the host tier's memory, taken in whole slabs; more holds more blocks and leaves less to engines. "
        "auto: a quarter of the first 64 GiB of memory (or of the cgroup's limit) and half of the rest.",
        low=MIB, auto=_auto_host_bytes,
    )  # fmt: skip
    slab_bytes: int = setting(
        "size", "auto", "bytes",
        "Memory given to one namespace shard at a time: larger means fewer mappings and file descriptors, smaller lets "
        "more namespaces share the tier evenly; no block can be larger: larger ones that an earlier "
        "life left on nvme are given up at the start, with a warning. auto: 1/64 of host.bytes, 2 MiB to 256 MiB.",
        low=64 << 10, high=16 * GIB, auto=_auto_slab_bytes,
    )  # fmt: skip
    pages: Literal["auto", "hugetlb", "thp", "4k"] = setting(
        "choice", "auto", "",
        "Page kind of the slabs; larger pages make first use and disk I/O faster. hugetlb needs pages reserved by the "
        "administrator, thp needs shmem_enabled; where they lack the next kind is taken, with a warning in the status. "
        "auto: the best kind that the machine offers.",
        choices=("auto", "hugetlb", "thp", "4k"),
    )  # fmt: skip
    populate: str = setting(
        "choice", "background", "",
        "background touches all memory in threads after start, so no store pays for first use; off starts small and "
        "grows as blocks arrive.",
        choices=("background", "off"),
    )  # fmt: skip
    populate_threads: int = setting(
        "integer", "auto", "threads",
        "Threads that touch memory after start; more finishes sooner and takes more cores meanwhile. auto: half of the "
        "cores, at most 8.",
        low=1, high=64, auto=_auto_populate_threads,
    )  # fmt: skip
    lock: Literal["auto", "on", "off"] = setting(
        "choice", "auto", "",
        "on keeps the slabs from being swapped as far as RLIMIT_MEMLOCK allows and warns in the status about the rest, "
        "off leaves it to the kernel. auto: on where the machine has swap.",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    eviction: Literal["hazard", "lru"] = setting(
        "choice", "hazard", "",
        "Which block leaves memory for another: hazard learns when blocks of each kind of use are asked for again, "
        "does not store what is worth less than all that is there (without an nvme tier; outcome `bypassed`), and goes "
        "by plain recency while that does better; lru always goes by recency.",
        choices=("hazard", "lru"),
    )  # fmt: skip
    equal_cost_tokens: int = setting(
        "integer", 0, "tokens",
        "hazard: depth at which attention to what came before costs as much to recompute as all the rest of a token "
        "(70B: 54000, 8B: 31000); deeper blocks are then kept longer. 0: all blocks count the same.",
        low=0, high=100_000_000,
    )  # fmt: skip
    numa_node: int = setting(
        "integer", -1, "node number",
        "NUMA node that the slabs are allocated on; copies are fastest from the node of the engine. -1: the GPUs' "
        "node where all are on one, else any.",
        low=-1, high=1023,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeConfig:
    """The nvme tier: blocks that no longer fit in memory, on local drives, over restarts. Off without a path."""

    paths: tuple[str, ...] = setting(
        "paths", [], "folders",
        "One folder for each drive, made where it does not exist, used by one daemon only; blocks are spread over all. "
        "Empty: no nvme tier. A file system on the drive itself (ext4, xfs) is meant: in memory, over a network or "
        "beside the operating system it works, with a warning.",
    )  # fmt: skip
    bytes: int = setting(
        "size", "64GiB", "bytes",
        "Hard cap of the file in each folder, allocated at the first start. A tier that exists is not resized: with "
        "another size the daemon says so and runs without it.",
        low=4 * MIB,
    )  # fmt: skip
    slab_bytes: int = setting(
        "size", "auto", "bytes",
        "Part of a drive given to one namespace shard at a time; namespaces with larger blocks "
        "stay in memory alone. auto: 1/256 of nvme.bytes, "
        "2 MiB to 1 GiB.",
        low=1 * MIB, high=64 * GIB, auto=_auto_nvme_slab_bytes,
    )  # fmt: skip
    queue_depth: int = setting(
        "integer", 8, "requests",
        "Reads, and again writes, under way at each drive at one time; more may be faster on large drives and makes "
        "each read wait longer behind the others.",
        low=1, high=256,
    )  # fmt: skip
    staging: Literal["auto", "always", "never"] = setting(
        "choice", "auto", "",
        "Whether what is read and written goes through small buffers beside the host's memory, one copy more: faster "
        "where a virtual disk's host copies every byte, slower where a drive reaches memory by itself. auto: on "
        "virtio disks. Each drive's buffers are 3 times nvme.queue_depth at most, each as large as a call: 2 MiB, or "
        "a block of up to 9 MiB. `forebay bench nvme` measures what this machine has.",
        choices=("auto", "always", "never"),
    )  # fmt: skip
    io_nice: int = setting(
        "integer", 0, "nice steps",
        "How much less of a core hashing and copying in each drive's I/O process get than others (nice(1)) where cores "
        "are scarce, beside the whole process giving way to them as long as cores idle for a tenth of the time. It "
        "changes nothing where a core is free. Where none ever is, 19 brings drives almost to a stop (0.04 GB/s, with "
        "0 1.5).",
        low=0, high=19,
    )  # fmt: skip
    window_bytes: int = setting(
        "size", "256MiB", "bytes",
        "Most bytes on their way to the drives at one time, durable ones not counted; those blocks cannot leave memory "
        "meanwhile. Never more than a quarter of host.bytes. Too little leaves the drives idle between index flushes.",
        low=1 * MIB, high=16 * GIB, reloads=True,
    )  # fmt: skip
    clean_share: float = setting(
        "number", 0.05, "share of a namespace's blocks",
        "How much of memory, coldest first, is kept written ahead, so that room is made without waiting for a drive: "
        "more bears longer bursts of stores, less writes fewer blocks that are asked for again.",
        low=0.005, high=0.5, reloads=True,
    )  # fmt: skip
    idle_s: float = setting(
        "number", 2.0, "seconds",
        "Without a request for so long, what is only in memory is written too, so that a crash loses less.",
        low=0.1, high=86_400, reloads=True,
    )  # fmt: skip
    drive_bytes: int = setting(
        "size", 0, "bytes",
        "Capacity of all the drives together as their maker sells them; with nvme.dwpd and nvme.drive_years it limits "
        "what is written. 0: unlimited, unless nvme.write_bytes_per_day says otherwise.",
        low=0,
    )  # fmt: skip
    dwpd: float = setting(
        "number", 1.0, "drive writes a day",
        "What the drives are rated for: nvme.drive_bytes times this may be written in a day, evenly.",
        low=0.001, high=100,
    )  # fmt: skip
    drive_years: float = setting(
        "number", 5.0, "years",
        "How long the drives are rated to bear that; only for the drive life left that status and metrics show.",
        low=0.1, high=100,
    )  # fmt: skip
    write_bytes_per_day: int = setting(
        "size", 0, "bytes",
        "Most bytes written to the drives in a day, evenly, with bursts of at most an hour's share; beyond it blocks "
        "leave memory unwritten, and are counted. 0: what nvme.drive_bytes and nvme.dwpd make.",
        low=0,
    )  # fmt: skip
    admission: Literal["worth", "all"] = setting(
        "choice", "worth", "",
        "What is written. worth: where the chance that it is asked for again, times the GPU time that then is saved, "
        "costs more than the write, by the prices in [economics]; and the less likely less readily as the write budget "
        "runs out. Without prices and without a budget that is all, as with all.",
        choices=("worth", "all"), reloads=True,
    )  # fmt: skip
    least_chance: float = setting(
        "number", 0, "probability",
        "With nvme.admission = worth: write only what is asked for again within two hours with this probability, in "
        "place of what prices make. Of host.eviction = hazard alone such are known. 0: prices.",
        low=0, high=1, reloads=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EconomicsConfig:
    """What work and hardware cost: for advice whether to load or to compute, for what was saved, for `forebay advise`.

    `forebay model MODEL` prints the prefill keys for a model; engines that report their prefills outweigh them. Without
    them everything stored is loaded, and savings are counted in tokens alone. See docs/physics.md.
    """

    plan: Literal["auto", "always", "never"] = setting(
        "choice", "auto", "",
        "What lookups advise: auto loads what comes sooner than it is computed, always and never say one thing to "
        "everybody.",
        choices=("auto", "always", "never"), reloads=True,
    )  # fmt: skip
    prefill_tokens_per_s: float = setting(
        "number", 0, "tokens/s",
        "What one replica computes of a short prompt; assumed until engines report. 0: not known.",
        low=0, high=1e9,
    )  # fmt: skip
    prefill_double_tokens: float = setting(
        "number", 0, "tokens",
        "Depth at which a token takes twice the time of the first, for attention. 0: depth costs nothing.",
        low=0, high=1e9,
    )  # fmt: skip
    prefill_gflops_per_token: float = setting(
        "number", 0, "GFLOP",
        "Work of one token at the beginning of a prompt, for counting what was saved. 0: not counted.",
        low=0, high=1e9, reloads=True,
    )  # fmt: skip
    gpus: int = setting(
        "integer", 1, "GPUs",
        "GPUs of one replica: a second saved counts so many GPU-seconds.",
        low=1, high=65536, reloads=True,
    )  # fmt: skip
    host_gb_s: float = setting(
        "number", 20, "GB/s",
        "From host memory into the engine, all its GPUs together; assumed until engines report.",
        low=0.001, high=1e6,
    )  # fmt: skip
    nvme_gb_s: float = setting(
        "number", 0, "GB/s",
        "From the drives to host memory, all drives together; assumed until it was measured, which takes a few loads. "
        "0: what `forebay bench nvme --path` has left in the drives' folders, and 3 without.",
        low=0, high=1e6,
    )  # fmt: skip
    gpu_dollars_per_hour: float = setting(
        "number", 0, "dollars",
        "Price of one GPU; a changed price counts from then on in `forebay advise`, and for all of the past in the "
        "dollars saved. 0: no dollars are told.",
        low=0, high=1e6, reloads=True,
    )  # fmt: skip
    host_dollars_per_gib_month: float = setting(
        "number", 0, "dollars",
        "Price of memory, set against what more of it would save. 0: not told.",
        low=0, high=1e6, reloads=True,
    )  # fmt: skip
    nvme_dollars_per_gib_month: float = setting(
        "number", 0, "dollars",
        "Price of drive capacity, likewise. 0: not told.",
        low=0, high=1e6, reloads=True,
    )  # fmt: skip
    nvme_dollars_per_tb_written: float = setting(
        "number", 0, "dollars",
        "Price of wear: of the drives divided by what they are rated to bear. With a GPU's price and a known prefill "
        "rate it decides what is worth a write (nvme.admission). 0: not told.",
        low=0, high=1e6, reloads=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """Bounds of everything a client can make grow; beyond one the client is answered Busy or BadRequest."""

    sessions: int = setting(
        "integer", 256, "sessions",
        "Clients attached at once; each costs file descriptors, which are set aside at start, and some memory.",
        low=1, high=16384,
    )  # fmt: skip
    message_bytes: int = setting(
        "size", "4MiB", "bytes",
        "Longest request accepted; longer ones are refused unread. It must have room for limits.hashes hashes.",
        low=64 << 10, high=MESSAGE_BYTES_MAX,
    )  # fmt: skip
    hashes: int = setting(
        "integer", 65536, "hashes",
        "Most prefix hashes in one request; more lets longer prompts be asked at once and lets one request hold the "
        "owner thread longer.",
        low=1, high=HASHES_MAX,
    )  # fmt: skip
    leases: int = setting(
        "integer", 65536, "leases",
        "Leases alive at once, all sessions together; a leased block cannot be evicted.",
        low=1, high=1 << 24,
    )  # fmt: skip
    reservations: int = setting(
        "integer", 16384, "reservations",
        "Reservations alive at once, all sessions together; their slots hold no readable block meanwhile.",
        low=1, high=1 << 24,
    )  # fmt: skip
    namespaces: int = setting(
        "integer", 1024, "namespaces",
        "Namespace shards known at once; each has slabs and an index of its own.",
        low=1, high=65536,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesConfig:
    """How long a right lasts, and how much may be pinned."""

    ttl_ms: int = setting(
        "integer", 30_000, "milliseconds",
        "Life of a read lease whose client names none; shorter frees the blocks of a stuck reader sooner, longer lets "
        "a slow reader finish.",
        low=100, high=86_400_000, reloads=True,
    )  # fmt: skip
    ttl_max_ms: int = setting(
        "integer", 600_000, "milliseconds",
        "Longest read lease a client may ask for; what it asks beyond is cut to this.",
        low=100, high=86_400_000, reloads=True,
    )  # fmt: skip
    reservation_ttl_ms: int = setting(
        "integer", 60_000, "milliseconds",
        "Time a writer has to commit; after it the write is refused, and its slots stay out of use until the writer's "
        "session ends or aborts.",
        low=100, high=86_400_000, reloads=True,
    )  # fmt: skip
    pin_quota: float = setting(
        "number", 0.25, "share of the tier",
        "Most of the tier that pins may hold; pinned blocks are never evicted, so a high share starves everyone else.",
        low=0, high=1, reloads=True,
    )  # fmt: skip
    slab_idle_s: float = setting(
        "number", 60.0, "seconds",
        "Time a namespace must be unused before its slabs are given to others; shorter follows demand faster, longer "
        "keeps the blocks of a paused tenant.",
        low=0, high=86_400,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """The HTTP endpoint: /metrics, /livez, /readyz, /healthz."""

    listen: str = setting(
        "listen", "127.0.0.1:9471", "address",
        'HOST:PORT, "unix:/PATH" or "off"; whoever reaches it can read model names and counters, so keep it local.',
    )  # fmt: skip
    stalled_s: float = setting(
        "number", 10.0, "seconds",
        "Age of the owner thread's last turn at which /livez fails; lower notices a stuck daemon sooner and restarts a "
        "merely slow one.",
        low=0.5, high=600, reloads=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    """Who may attach."""

    allowed_uids: tuple[int, ...] = setting(
        "uids", [], "user ids",
        "Users besides the daemon's own and root whose processes may attach; each gets namespaces of its own.",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownConfig:
    """What SIGTERM does."""

    drain_s: float = setting(
        "number", 5.0, "seconds",
        "Longest wait for leases and reservations to end after SIGTERM; new ones are refused meanwhile. Keep it below "
        "the service manager's stop time-out.",
        low=0, high=3600, reloads=True,
    )  # fmt: skip
    flush_s: float = setting(
        "number", 30.0, "seconds",
        "Longest time after that in which blocks that are only in memory are written to the nvme tier, those last used "
        "first; together with shutdown.drain_s it must stay below the service manager's stop time-out.",
        low=0, high=3600, reloads=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole tree. Made by ``build`` or ``load``, never by hand."""

    runtime: RuntimeConfig
    host: HostConfig
    nvme: NvmeConfig
    economics: EconomicsConfig
    limits: LimitsConfig
    leases: LeasesConfig
    metrics: MetricsConfig
    access: AccessConfig
    shutdown: ShutdownConfig


SECTIONS: dict[str, type[Any]] = {
    "runtime": RuntimeConfig,
    "host": HostConfig,
    "nvme": NvmeConfig,
    "economics": EconomicsConfig,
    "limits": LimitsConfig,
    "leases": LeasesConfig,
    "metrics": MetricsConfig,
    "access": AccessConfig,
    "shutdown": ShutdownConfig,
}


@dataclass(frozen=True, slots=True)
class Derived:
    """What follows from several keys: computed here alone."""

    slabs: int
    capacity_bytes: int
    listen: Listen
    write_bytes_per_day: int
    drive_life_bytes: int


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs between two trees."""

    path: str
    old: object
    new: object


@dataclass(frozen=True, slots=True)
class Diff:
    """``safe`` may take effect while running (SIGHUP), ``unsafe`` needs a restart."""

    safe: tuple[Change, ...]
    unsafe: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Environment:
    """All that the daemon takes from its environment variables, read once."""

    config_home: str
    notify_socket: str | None
    watchdog_usec: int | None


def settings() -> Iterator[tuple[str, Setting]]:
    """Every key's path and declaration, in the order of the tree."""
    for section, kind in SECTIONS.items():
        for name, known in section_settings(kind):
            yield f"{section}.{name}", known


def section_settings(section: type[Any]) -> Iterator[tuple[str, Setting]]:
    for known in dataclasses.fields(section):
        yield known.name, known.metadata["setting"]


def reloadable() -> tuple[str, ...]:
    """Paths of the keys that SIGHUP may change."""
    return tuple(path for path, known in settings() if known.reloads)


def values(config: Config) -> dict[str, object]:
    """A tree as path -> value, in order."""
    return {path: _value(config, path) for path, _ in settings()}


def _value(config: Config, path: str) -> object:
    section, _, name = path.partition(".")
    return getattr(getattr(config, section), name)


def diff(old: Config, new: Config) -> Diff:
    """What differs, split by whether a running daemon may take it over."""
    safe: list[Change] = []
    unsafe: list[Change] = []
    for path, known in settings():
        change = Change(path, _value(old, path), _value(new, path))
        if change.old != change.new:
            (safe if known.reloads else unsafe).append(change)
    return Diff(tuple(safe), tuple(unsafe))


def keep_unsafe(old: Config, new: Config) -> Config:
    """``new`` with every key that needs a restart taken from ``old``: what a running daemon uses after SIGHUP."""
    kept = {change.path: change.old for change in diff(old, new).unsafe}
    sections = {}
    for section in SECTIONS:
        names = {path.partition(".")[2]: value for path, value in kept.items() if path.startswith(f"{section}.")}
        sections[section] = dataclasses.replace(getattr(new, section), **names)
    return Config(**sections)


def derive(config: Config) -> Derived:
    """Values that follow from several keys."""
    slabs = config.host.bytes // config.host.slab_bytes
    nvme = config.nvme
    rated_bytes_per_day = int(nvme.drive_bytes * nvme.dwpd)
    return Derived(
        slabs=slabs,
        capacity_bytes=slabs * config.host.slab_bytes,
        listen=read_listen(config.metrics.listen),
        write_bytes_per_day=nvme.write_bytes_per_day or rated_bytes_per_day,
        drive_life_bytes=int(rated_bytes_per_day * 365 * nvme.drive_years),
    )


def build(raw: Mapping[str, Any] | None = None, machine: Machine | None = None) -> Config:
    """A checked tree from TOML-like values (section -> key -> value); what is absent gets its default.

    Raises ConfigError with every problem found, not only the first.
    """
    raw = {} if raw is None else raw
    machine = measure_machine() if machine is None else machine
    problems = _unknown_keys(raw)
    sections: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        given = raw.get(section, {})
        read = _read_section(section, kind, given if isinstance(given, Mapping) else {}, machine, problems)
        if not problems:
            sections[section] = kind(**read)
    if problems:
        raise ConfigError(problems)
    config = Config(**sections)
    problems = _cross_checks(config, machine)
    if problems:
        raise ConfigError(problems)
    return config


def _read_section(
    section: str, kind: type[Any], given: Mapping[str, Any], machine: Machine, problems: list[str]
) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for name, known in section_settings(kind):
        try:
            read[name] = known.read(given.get(name, known.default), machine, read)
        except BadValue as error:
            problems.append(f"{section}.{name}: {error}")
            read[name] = known.read(known.default, machine, read)
    return read


def _unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for section, given in raw.items():
        if section not in SECTIONS:
            problems.append(unknown(str(section), "section" if isinstance(given, Mapping) else "key"))
        elif not isinstance(given, Mapping):
            problems.append(f"{section}: must be a section, [{section}]")
        else:
            known = {name for name, _ in section_settings(SECTIONS[section])}
            problems += [unknown(f"{section}.{name}", "key") for name in given if name not in known]
    return problems


def unknown(path: str, what: str) -> str:
    """The problem text for a key or section nobody knows, with the nearest one that exists."""
    from difflib import get_close_matches  # only a mistyped file pays for it

    shown = path if len(path) <= 100 else path[:100] + "..."
    known = list(SECTIONS) if what == "section" else [known_path for known_path, _ in settings()]
    by_name = [known_path for known_path in known if known_path.endswith("." + path)]
    close = by_name or get_close_matches(path[:100], known, n=1, cutoff=0.6)
    return f"{shown}: unknown {what}" + (f"; did you mean {close[0]}?" if close else "")


def _cross_checks(config: Config, machine: Machine) -> list[str]:
    problems = []
    host, limits = config.host, config.limits
    if host.bytes > machine.memory_bytes:
        problems.append(f"host.bytes: {host.bytes} bytes is more than this machine's memory, {machine.memory_bytes}")
    if host.slab_bytes % 4096:
        problems.append(f"host.slab_bytes: {host.slab_bytes} is not a multiple of 4096")
    if host.pages == "hugetlb" and host.slab_bytes % (2 * MIB):
        problems.append(f'host.slab_bytes: {host.slab_bytes} is not a multiple of 2MiB, as host.pages "hugetlb" needs')
    if host.slab_bytes > host.bytes:
        problems.append(f"host.slab_bytes: {host.slab_bytes} is more than host.bytes, {host.bytes}")
    if config.nvme.slab_bytes % 4096:
        problems.append(f"nvme.slab_bytes: {config.nvme.slab_bytes} is not a multiple of 4096")
    if config.nvme.slab_bytes + MIB > config.nvme.bytes:
        problems.append(f"nvme.slab_bytes: {config.nvme.slab_bytes} does not fit into nvme.bytes, {config.nvme.bytes}")
    if limits.hashes * HASH_BYTES_MAX + 4096 > limits.message_bytes:
        problems.append(f"limits.message_bytes: {limits.message_bytes} has no room for limits.hashes = {limits.hashes}")
    if config.leases.ttl_ms > config.leases.ttl_max_ms:
        problems.append(f"leases.ttl_ms: {config.leases.ttl_ms} is more than leases.ttl_max_ms")
    return problems


def environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read the environment; the only place of the daemon that does (the runtime folder's discovery aside)."""
    variables = os.environ if variables is None else variables
    home = variables.get("HOME", "")
    config_home = variables.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else "")
    usec = variables.get("WATCHDOG_USEC", "")
    meant_for_us = variables.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    watchdog = int(usec) if usec.isdigit() and int(usec) > 0 and meant_for_us else None
    return Environment(config_home, variables.get("NOTIFY_SOCKET") or None, watchdog)
