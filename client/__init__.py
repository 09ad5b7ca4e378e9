"""The client: what an inference engine imports to find, fetch and store KV blocks.

`Client` blocks, `AsyncClient` is for asyncio; both do the same. Importing this costs numpy, pyzmq and msgpack.
"""

from forebay.client.aio import AsyncClient, AsyncLease, AsyncReservation
from forebay.client.hints import Hints
from forebay.client.namespaces import Namespace
from forebay.client.options import ClientOptions
from forebay.client.results import (
    BlockOutcome,
    ClientStats,
    FetchResult,
    LookupResult,
    PersistResult,
    PrefetchResult,
    RemovalResult,
    StoreResult,
)
from forebay.client.segments import SegmentTable
from forebay.client.sync import Client, Lease, Reservation
from forebay.kvstore.hashing import PrefixHasher
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import StopReason
from forebay.kvstore.planner import Backlog
from forebay.transports.messages import EvictScope

__all__ = [
    "AsyncClient",
    "AsyncLease",
    "AsyncReservation",
    "Backlog",
    "BlockOutcome",
    "Client",
    "ClientOptions",
    "ClientStats",
    "EvictScope",
    "FetchResult",
    "Hints",
    "Lease",
    "LookupResult",
    "Namespace",
    "NamespaceSpec",
    "PersistResult",
    "PrefetchResult",
    "PrefixHasher",
    "RemovalResult",
    "Reservation",
    "SegmentTable",
    "StopReason",
    "StoreResult",
]
