"""The daemon put together: the order in which its parts must come and go.

The lock comes first (a second daemon must not disturb the first), then what may fail, then the endpoints, then READY.
Memory is populated in the background, so the first answer does not wait for it.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType

from forebay.daemon.config import Config, ConfigError, derive, diff, keep_unsafe
from forebay.daemon.http import HttpServer
from forebay.daemon.live_slabs import LiveSlabs
from forebay.daemon.logging import fields, setup
from forebay.daemon.mailbox import Mailbox
from forebay.daemon.mover import Mover
from forebay.daemon.owner import Owner
from forebay.daemon.sdnotify import Notifier
from forebay.daemon.sessions import Greeting, Sessions
from forebay.daemon.status import DaemonSnapshot, Prices, to_json
from forebay.daemon.verbs import Verbs
from forebay.kvstore.admission import WriteTerms
from forebay.kvstore.errors import BadRequest
from forebay.kvstore.eviction.policies import served
from forebay.kvstore.movement import NvmeConfig
from forebay.kvstore.physics import NVME_GB_S, PhysicsConfig
from forebay.kvstore.planner import Mode, Origin
from forebay.kvstore.store import Store, StoreConfig
from forebay.tiers.host import HostTier
from forebay.tiers.nvme import NvmeTier
from forebay.tiers.nvme_io import buffer_bytes_max
from forebay.tiers.nvme_io_process import IO_PROCESS_BYTES
from forebay.tiers.nvme_jobs import NvmeOptions
from forebay.transports import paths
from forebay.transports.messages import BOOT_ID_BYTES
from forebay.transports.session import SessionListener
from forebay.transports.zmq_sockets import ControlServer, connections_within, raise_descriptor_limit

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 1e-4
"""A thread that computes (metrics) must not make the owner wait for the interpreter's default 5 ms."""
_GC_THRESHOLDS = (100_000, 20, 100)
"""The columns of the index hold no cycles; frequent collections only walk them."""
_DESCRIPTORS_KEPT = 160
"""For HTTP connections (64), epoll sets, pipes, the lock, and what is opened for a moment."""
_CLOSE_S = 5.0


class Service:
    """One daemon in this process. `run` is for the main thread; it returns when the daemon has stopped.

    Args:
        config: the checked tree.
        notifier: tells the service manager.
        reload: reads the configuration again (SIGHUP); raises ConfigError.
    """

    def __init__(self, config: Config, notifier: Notifier, reload: Callable[[], Config]) -> None:
        self._config = config
        self._notifier = notifier
        self._reload = reload

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises Busy (a daemon runs here), OSError and ForebayError at start-up."""
        config = self._config
        limit = raise_descriptor_limit()
        with ExitStack() as parts:
            places = paths.prepare(config.runtime.dir or None)
            parts.enter_context(closing(paths.DaemonLock(places.lock)))
            boot_id = secrets.token_bytes(BOOT_ID_BYTES)
            mailbox: Mailbox[DaemonSnapshot] = parts.enter_context(closing(Mailbox()))
            tier = self._start_tier(parts)
            memory = parts.enter_context(closing(LiveSlabs(tier)))
            nvme = self._start_nvme(parts, memory, mailbox.wake)
            store = Store(_store_config(config, nvme), _new_id)
            sessions = parts.enter_context(closing(self._sessions(places, boot_id, store, memory)))
            server = parts.enter_context(closing(self._control_server(places, limit)))
            self._owner = owner = Owner(
                mailbox=mailbox,
                store=store,
                verbs=self._verbs(store),
                server=server,
                sessions=sessions,
                memory=memory,
                tiers=[tier] if nvme is None else [tier, nvme],
                mover=None if nvme is None else Mover(store, nvme, memory),
                boot_id=boot_id,
                runtime_dir=str(places.directory),
                message_bytes_max=config.limits.message_bytes,
                tick=self._tick,
                prices=_prices(config),
            )
            parts.enter_context(closing(self._start_http()))
            with self._signals():
                self._settle()
                self._announce(places)
                owner.run()
            log.info("stopping", extra=fields(leases_and_reservations_cut=store.in_use))

    def stop(self) -> None:
        """Drain and stop; from a signal handler or another thread."""
        self._notifier.stopping("draining")
        self._owner.stop(self._config.shutdown.drain_s, self._config.shutdown.flush_s)
        self._owner.mailbox.wake()

    def reload(self) -> None:
        """Take over what may change while running; what may not is logged and kept."""
        self._notifier.reloading(time.monotonic())
        try:
            self._apply(self._reload())
        except ConfigError as error:
            log.error("configuration not reloaded", extra=fields(error=error))
        except Exception:
            # A signal handler runs in the midst of the owner's loop, which must not end for this.
            log.exception("configuration not reloaded")
        if not self._store.draining:
            self._notifier.ready("serving")

    def _apply(self, fresh: Config) -> None:
        changes = diff(self._config, fresh)
        for change in changes.unsafe:
            log.warning("needs a restart, kept", extra=fields(key=change.path, old=change.old, new=change.new))
        self._config = config = keep_unsafe(self._config, fresh)
        setup(config.runtime.log_level, config.runtime.log_format)
        self._store.reconfigure(_store_config(config, self._nvme))
        self._verb_table.lease_ttl_s = config.leases.ttl_ms / 1000
        self._http.stalled_s = config.metrics.stalled_s
        self._owner.prices = _prices(config)
        for change in changes.safe:
            log.info("reloaded", extra=fields(key=change.path, old=change.old, new=change.new))

    def _start_tier(self, parts: ExitStack) -> HostTier:
        host = self._config.host
        try:
            tier = HostTier(
                derive(self._config).capacity_bytes,
                host.slab_bytes,
                pages=host.pages,
                populate=host.populate == "background",
                populate_threads=host.populate_threads,
                lock=host.lock,
                numa_node=host.numa_node,
                beside_bytes=_io_bytes_max(self._config),
            )
        except ValueError as error:
            raise BadRequest(f"[host] does not fit this machine: {error}") from error
        parts.callback(tier.close, _CLOSE_S)
        tier.start()
        return tier

    def _start_nvme(self, parts: ExitStack, memory: LiveSlabs, wake: Callable[[], None]) -> NvmeTier | None:
        """The nvme tier, where one is configured. One that cannot work is down and says why; the daemon serves on."""
        self._nvme: NvmeTier | None = None
        nvme = self._config.nvme
        if not nvme.paths:
            return None
        options = NvmeOptions(
            paths=tuple(map(Path, nvme.paths)),
            bytes_per_path=nvme.bytes,
            slab_bytes=nvme.slab_bytes,
            queue_depth=nvme.queue_depth,
            staging=nvme.staging,
            io_nice=nvme.io_nice,
            life_bytes=derive(self._config).drive_life_bytes,
        )
        try:
            self._nvme = tier = NvmeTier(options, memory=memory.memory_handle, wake=wake)
        except ValueError as error:
            raise BadRequest(f"[nvme] does not fit: {error}") from error
        parts.callback(lambda: tier.close(_CLOSE_S))
        tier.start()
        for warning in tier.describe().warnings:
            log.warning("nvme tier", extra=fields(warning=warning))
        return tier

    def _control_server(self, places: paths.RuntimePaths, descriptor_limit: int) -> ControlServer:
        reserved = _DESCRIPTORS_KEPT + 2 * self._config.limits.sessions + 4 * derive(self._config).slabs
        return ControlServer(
            places.control,
            message_bytes_max=self._config.limits.message_bytes,
            connections_max=connections_within(descriptor_limit, reserved),
            mode=self._socket_mode(),
        )

    def _sessions(self, places: paths.RuntimePaths, boot_id: bytes, store: Store, memory: LiveSlabs) -> Sessions:
        limits = self._config.limits
        self._store = store
        self._listener = SessionListener(
            places.session,
            sessions_max=limits.sessions,
            allowed_uids=_uids(self._config),
            mode=self._socket_mode(),
        )
        greeting = Greeting(boot_id, limits.message_bytes, limits.hashes)
        operators = {0, os.geteuid()}
        return Sessions(self._listener, store, memory, greeting, operators, self._carry_out)

    def _carry_out(self) -> None:
        self._owner.carry_out()

    def _hand_over(self) -> None:
        self._owner.hand_over()

    def _socket_mode(self) -> int:
        """Other users, where the configuration lets them in, come through the folder's group."""
        return 0o660 if self._config.access.allowed_uids else paths.SOCKET_MODE

    def _verbs(self, store: Store) -> Verbs:
        leases, limits = self._config.leases, self._config.limits
        self._verb_table = Verbs(
            store,
            leases.ttl_ms / 1000,
            lambda: to_json(self._owner.snapshot()),
            limits.hashes,
            self._hand_over,
        )
        return self._verb_table

    def _start_http(self) -> HttpServer:
        self._http = HttpServer(
            derive(self._config).listen,
            self._owner.mailbox.ask,
            self._owner.heartbeat_age_s,
            self._config.metrics.stalled_s,
        )
        self._http.start()
        return self._http

    def _settle(self) -> None:
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)

    def _announce(self, places: paths.RuntimePaths) -> None:
        host = self._config.host
        named = fields(dir=places.directory, host_bytes=host.bytes, slab_bytes=host.slab_bytes, http=self._http.address)
        log.info("serving", extra=named)
        self._notifier.ready("serving")

    def _tick(self, now: float) -> None:
        self._notifier.watchdog(now)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop, SIGHUP reloads; each also ends the owner's wait."""
        handlers = {signal.SIGTERM: self.stop, signal.SIGINT: self.stop, signal.SIGHUP: self.reload}
        before = {number: signal.signal(number, _calls(handler)) for number, handler in handlers.items()}
        wakeup = signal.set_wakeup_fd(self._owner.mailbox.write_fd, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)


def run(config: Config, *, notify_socket: str | None, watchdog_usec: int | None, reload: Callable[[], Config]) -> None:
    """Serve in this process until told to stop; see `Service`."""
    with closing(Notifier(notify_socket, watchdog_usec)) as notifier:
        Service(config, notifier, reload).run()


def _io_bytes_max(config: Config) -> int:
    """Memory that the I/O of all drives may take beside the host's slabs, with staging wherever it is not forbidden."""
    nvme = config.nvme
    each = IO_PROCESS_BYTES + buffer_bytes_max(nvme.queue_depth, is_staged=nvme.staging != "never")
    return len(nvme.paths) * each


def _uids(config: Config) -> tuple[int, ...]:
    """Root may attach anyway: it could become any user, and operators run tools with it."""
    return (0, *config.access.allowed_uids)


def _calls(handler: Callable[[], None]) -> Callable[[int, FrameType | None], None]:
    return lambda number, frame: handler()


def _new_id() -> int:
    return secrets.randbits(63)


def _store_config(config: Config, nvme: NvmeTier | None) -> StoreConfig:
    leases, limits = config.leases, config.limits
    return StoreConfig(
        capacity_bytes=derive(config).capacity_bytes,
        slab_bytes=config.host.slab_bytes,
        ttl_max_s=leases.ttl_max_ms / 1000,
        reservation_ttl_s=leases.reservation_ttl_ms / 1000,
        pin_quota=leases.pin_quota,
        slab_idle_s=leases.slab_idle_s,
        sessions_max=limits.sessions,
        namespaces_max=limits.namespaces,
        leases_max=limits.leases,
        reservations_max=limits.reservations,
        nvme=None if nvme is None else _movement_config(config, nvme),
        host_policy=served(config.host.eviction, config.host.equal_cost_tokens),
        physics=_physics_config(config, nvme),
    )


def _physics_config(config: Config, nvme: NvmeTier | None) -> PhysicsConfig:
    economics = config.economics
    benched = 0.0 if nvme is None or economics.nvme_gb_s else nvme.benched_read_bytes_per_s / 1e9
    return PhysicsConfig(
        mode=Mode(economics.plan),
        prefill_tokens_per_s=economics.prefill_tokens_per_s,
        prefill_double_tokens=economics.prefill_double_tokens,
        token_flops=economics.prefill_gflops_per_token * 1e9,
        gpus=economics.gpus,
        host_gb_s=economics.host_gb_s,
        nvme_gb_s=economics.nvme_gb_s or benched or NVME_GB_S,
        nvme_origin=Origin.BENCHED if benched else Origin.ASSUMED,
    )


def _prices(config: Config) -> Prices:
    economics = config.economics
    return Prices(
        gpu_hour=economics.gpu_dollars_per_hour,
        host_gib_month=economics.host_dollars_per_gib_month,
        nvme_gib_month=economics.nvme_dollars_per_gib_month,
        nvme_tb_written=economics.nvme_dollars_per_tb_written,
    )


def _movement_config(config: Config, tier: NvmeTier) -> NvmeConfig:
    return NvmeConfig(
        capacity_bytes=tier.slabs * tier.slab_bytes,
        slab_bytes=tier.slab_bytes,
        window_bytes=config.nvme.window_bytes,
        clean_share=config.nvme.clean_share,
        idle_s=config.nvme.idle_s,
        budget_bytes_per_day=derive(config).write_bytes_per_day,
        drives=max(1, sum(drive.up for drive in tier.detail().drives)),
        terms=_write_terms(config) if config.nvme.admission == "worth" else None,
    )


def _write_terms(config: Config) -> WriteTerms:
    economics = config.economics
    return WriteTerms(
        least_chance=config.nvme.least_chance,
        dollars_per_byte=economics.nvme_dollars_per_tb_written / 1e12,
        gpu_dollars_per_s=economics.gpu_dollars_per_hour * economics.gpus / 3600,
    )
