"""Every error forebay raises, with the stable code that names it on the wire.

ForebayError
|- CallerError            the caller's fault: do not retry unchanged
|  |- BadRequest          malformed or out of bounds
|  |- UnknownVerb         this daemon does not know the verb
|  |- VersionMismatch     the peer speaks another protocol version
|  |- UnknownSession      the session ended or was never opened (a restarted daemon, too): attach again
|  |- UnknownNamespace    no such namespace for this session
|  |- LayoutError         sizes or strides differ from the registered layout, or a block fits no slab
|  |- NotLeased           the lease or reservation is not the session's, or was released
|  |- Expired             the lease or reservation ran out by the clock
|  |- QuotaExceeded       pins or namespaces beyond the configured share
|  `- Forbidden           another user id, or an operator's verb from an engine
|- OursForNow             the daemon's state: retry later
|  |- Busy                a bounded queue is full
|  |- TierFull            every slot is leased, pinned or being written
|  |- Draining            the daemon is shutting down
|  `- Internal            a bug in the daemon; logged there with the request id
|- PeerError              the other side of a socket
|  |- PeerLost            the connection is gone
|  `- Timeout             no answer within the deadline
`- Corrupt                bytes that do not match their checksum or generation

A miss is a result, never an exception.
"""

from __future__ import annotations

from typing import ClassVar


class ForebayError(Exception):
    """Base of all errors; ``code`` is stable and travels on the wire."""

    code: ClassVar[int] = 0


class CallerError(ForebayError):
    code = 100


class BadRequest(CallerError):
    code = 101


class UnknownVerb(CallerError):
    code = 102


class VersionMismatch(CallerError):
    code = 103


class UnknownSession(CallerError):
    code = 104


class UnknownNamespace(CallerError):
    code = 105


class LayoutError(CallerError):
    code = 106


class NotLeased(CallerError):
    code = 107


class Expired(CallerError):
    code = 108


class QuotaExceeded(CallerError):
    code = 109


class Forbidden(CallerError):
    code = 110


class OursForNow(ForebayError):
    code = 200


class Busy(OursForNow):
    code = 201


class TierFull(OursForNow):
    code = 202


class Draining(OursForNow):
    code = 203


class Internal(OursForNow):
    code = 204


class PeerError(ForebayError):
    code = 300


class PeerLost(PeerError):
    code = 301


class Timeout(PeerError):
    code = 302


class Corrupt(ForebayError):
    code = 401


def _tree(root: type[ForebayError]) -> list[type[ForebayError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


BY_CODE: dict[int, type[ForebayError]] = {error.code: error for error in _tree(ForebayError)}


def from_code(code: int, text: str) -> ForebayError:
    """The error a wire code stands for; a code of a newer daemon becomes a plain ForebayError."""
    return BY_CODE.get(code, ForebayError)(text)
