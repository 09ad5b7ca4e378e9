"""Every verb of the wire is answered by the store, whatever the session holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from forebay.daemon.verbs import Verbs
from forebay.kvstore import removal
from forebay.kvstore.errors import BadRequest, ForebayError, LayoutError, NotLeased, UnknownNamespace
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Outcome
from forebay.kvstore.store import Store, StoreConfig
from forebay.transports import messages as m

SPEC = NamespaceSpec("m", "r", "uint8", 16, (4096,))
HASHES = [bytes([number]) * 32 for number in range(1, 9)]
BLOB = b"".join(HASHES)


@pytest.fixture
def store() -> Store:
    counter = itertools.count(1)
    made = Store(StoreConfig(1 << 20, 1 << 16), lambda: next(counter))
    made.open_session(1, 0, operator=True)
    return made


@pytest.fixture
def verbs(store: Store) -> Verbs:
    return Verbs(store, lease_ttl_s=30.0, status=lambda: "{}", hashes_max=64, hand_over=lambda: None)


def ask(verbs: Verbs, request: m.Request, now: float = 0.0) -> m.Reply:
    """The reply, checked as a client would check it."""
    reply = verbs.answer(1, request, now)
    assert type(reply) is m.REPLIES[request.verb]
    reply.check()
    return reply


def open_namespace(verbs: Verbs) -> m.OpenNamespaceReply:
    reply = ask(verbs, m.OpenNamespaceRequest(SPEC))
    assert isinstance(reply, m.OpenNamespaceReply)
    return reply


def stored(verbs: Verbs) -> int:
    """A namespace that holds HASHES."""
    ns = open_namespace(verbs).ns
    reserved = ask(verbs, m.ReserveRequest(ns, b"", BLOB))
    assert isinstance(reserved, m.ReserveReply)
    assert reserved.outcomes == bytes([Outcome.WRITE]) * len(HASHES)
    ask(verbs, m.CommitRequest(reserved.reservation))
    return ns


def test_every_verb_has_an_answer(verbs: Verbs) -> None:
    ns = stored(verbs)
    lease = ask(verbs, m.AcquireRequest(ns, BLOB, 0))
    assert isinstance(lease, m.AcquireReply)
    again = ask(verbs, m.ReserveRequest(ns, HASHES[-1], b"\x55" * 32))
    assert isinstance(again, m.ReserveReply)
    requests = [
        m.PingRequest(),
        m.OpenNamespaceRequest(SPEC),
        m.FindNamespaceRequest(SPEC.group_fingerprint()[:4], 0),
        m.LookupRequest(ns, BLOB),
        m.AcquireRequest(ns, BLOB, 100),
        m.ResolveRequest(ns, lease.lease),
        m.ReleaseRequest(lease.lease),
        m.ReserveRequest(ns, b"", BLOB),
        m.CommitRequest(again.reservation, m.join_u32([0])),
        m.PinRequest(ns, BLOB[:32]),
        m.UnpinRequest(ns, BLOB[:32]),
        m.TouchRequest(ns, BLOB),
        m.DoneRequest(ns, BLOB, 0),
        m.PrefetchRequest(ns, BLOB),
        m.EvictRequest(ns, 1, BLOB[-32:], False),
        m.StatusRequest(),
        m.CheckRequest(),
        m.PersistRequest(ns, BLOB),
        m.ReportRequest(100, 0, 1000, 4096, 10, 3),
        m.RecordRequest(ns, 1000, 10),
        m.RecordedRequest(),
        m.ExpectRequest(ns, BLOB, 1000),
        m.StoppedRequest(ns, BLOB, 2),
        m.PinnedRequest(4096, "memlock"),
        m.ExplainRequest(ns, HASHES[0]),
        m.ClearRequest(True),
    ]
    for request in requests:
        ask(verbs, request)
    last = ask(verbs, m.ReserveRequest(ns, b"", b"\x66" * 32))
    assert isinstance(last, m.ReserveReply)
    ask(verbs, m.AbortRequest(last.reservation))
    assert {request.verb for request in requests} | {m.Verb.ABORT} == set(m.Verb)
    assert verbs.store.physics.plans.late == 3


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    "begin", [lambda ns, dry: m.EvictRequest(ns, 1, BLOB[:32], dry), lambda ns, dry: m.ClearRequest(dry)]
)
def test_long_removal_is_answered_part_by_part(
    verbs: Verbs, begin: Callable[[int, bool], Any], dry_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others ask for in between is answered by what is left."""
    monkeypatch.setattr(removal, "PART_COST", 12)
    ns = stored(verbs)
    ask(verbs, m.PinRequest(ns, BLOB[:32]))
    request = begin(ns, dry_run)
    reply: Any = ask(verbs, request)
    assert reply.more
    while reply.more:
        found = ask(verbs, m.LookupRequest(ns, BLOB))
        assert isinstance(found, m.LookupReply)
        assert found.blocks == len(HASHES) - (0 if dry_run else reply.removed)
        reply = ask(verbs, replace(request, resume=reply.more))
    assert (reply.removed, reply.kept) == (len(HASHES) - 1, 1)
    with pytest.raises(NotLeased):
        ask(verbs, replace(request, resume=99))


def test_what_is_leased_is_ready_and_nothing_is_durable(verbs: Verbs) -> None:
    """Memory is the only tier."""
    ns = stored(verbs)
    lease = ask(verbs, m.AcquireRequest(ns, BLOB + b"\x77" * 32, 0))
    assert isinstance(lease, m.AcquireReply)
    resolved = ask(verbs, m.ResolveRequest(ns, lease.lease))
    assert isinstance(resolved, m.ResolveReply)
    assert (lease.ready, lease.checksums) == (resolved.ready, resolved.checksums) == (len(HASHES), b"")
    assert ask(verbs, m.AcquireRequest(ns, b"\x77" * 32, 0)) == m.AcquireReply(0, b"", b"", 0, b"")
    assert ask(verbs, m.PersistRequest(ns, BLOB)) == m.PersistReply(0, 0)


def test_lookup_names_the_tier(verbs: Verbs) -> None:
    reply = ask(verbs, m.LookupRequest(stored(verbs), BLOB + b"\x77" * 32))
    assert isinstance(reply, m.LookupReply)
    assert (reply.blocks, reply.by_tier) == (len(HASHES), (("host", len(HASHES)),))


def test_lease_without_a_time_gets_the_configured_one(verbs: Verbs, store: Store) -> None:
    ask(verbs, m.AcquireRequest(stored(verbs), BLOB, 0), now=100.0)
    assert store.next_deadline() == 130.0


@pytest.mark.parametrize(
    ("request_of", "error"),
    [
        (lambda ns: m.LookupRequest(ns + 1, BLOB), UnknownNamespace),
        (lambda ns: m.LookupRequest(ns, BLOB[:-1]), BadRequest),
        (lambda ns: m.LookupRequest(ns, BLOB * 9), BadRequest),
        (lambda ns: m.ReserveRequest(ns, b"x" * 16, BLOB), BadRequest),
        (lambda ns: m.OpenNamespaceRequest(NamespaceSpec("m", "r", "u8", 16, (1 << 17,))), LayoutError),
    ],
)
def test_bad_requests_are_refused_and_change_nothing(verbs: Verbs, store: Store, request_of, error) -> None:
    ns = stored(verbs)
    before = store.stats()
    with pytest.raises(error):
        ask(verbs, request_of(ns))
    after = store.stats()
    assert (after.tiers, after.leases, after.reservations) == (before.tiers, before.leases, before.reservations)
    assert issubclass(error, ForebayError)


def test_a_lookup_says_what_is_worth_loading_and_follows_what_is_reported(verbs: Verbs) -> None:
    ns = stored(verbs)
    found = ask(verbs, m.LookupRequest(ns, BLOB))
    assert isinstance(found, m.LookupReply)
    assert (found.blocks, found.advice, found.load_blocks) == (8, "load", 8)
    for _ in range(50):
        ask(verbs, m.ReportRequest(1000, 0, 1000, 4096, 1_000_000))
    slow = ask(verbs, m.LookupRequest(ns, BLOB))
    assert isinstance(slow, m.LookupReply)
    assert (slow.blocks, slow.advice, slow.load_blocks, slow.load_us) == (8, "recompute", 0, 0)
    busy = ask(verbs, m.LookupRequest(ns, BLOB, 2, 1_000_000_000))
    assert isinstance(busy, m.LookupReply)
    assert (busy.advice, busy.load_blocks) == ("load", 8), "the engine is busy for longer than loading takes"
    nothing = ask(verbs, m.LookupRequest(ns, b"\x77" * 32))
    assert isinstance(nothing, m.LookupReply)
    assert (nothing.blocks, nothing.advice, nothing.load_blocks) == (0, "", 0)
