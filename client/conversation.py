"""Requests and replies of one control connection: numbering, matching, and noticing another daemon.

Pure bookkeeping that both kinds of link share; sockets are theirs.
"""

from __future__ import annotations

import itertools

from forebay.client import core
from forebay.kvstore.errors import ForebayError, PeerLost, UnknownSession
from forebay.transports.codec import decode_reply, encode_request
from forebay.transports.messages import REPLY_OF, Reply, Request
from forebay.transports.packets import Welcome


class Conversation:
    """For one thread at a time."""

    def __init__(self, welcome: Welcome) -> None:
        self._token = welcome.session_token
        self._boot_id = welcome.boot_id
        self._bytes_max = welcome.max_message_bytes
        self._numbers = itertools.count(1)
        self._expected: dict[int, type[Reply]] = {}
        self._abandoned: dict[int, type[Reply]] = {}

    def encode(self, request: Request, *, expected: bool = True) -> tuple[int, bytes]:
        """A request's number and payload. Raises BadRequest: the caller's bug, and nothing is to be sent."""
        number = next(self._numbers)
        payload = encode_request(number, self._token, request, self._bytes_max)
        if expected:
            self._expected[number] = REPLY_OF[type(request)]
        return number, payload

    def abandon(self, number: int) -> None:
        """Nobody waits for this reply any more; if it grants something, `undo` will say how to give it back."""
        reply_type = self._expected.pop(number, None)
        if reply_type is not None:
            self._abandoned[number] = reply_type

    def decode(self, payload: bytes) -> tuple[int, Reply | ForebayError] | None:
        """The number and content of a reply somebody waits for; None for others.

        Raises UnknownSession when the daemon is not the one of our session, PeerLost when it makes no sense.
        """
        try:
            answer = decode_reply(payload)
        except ForebayError as error:
            raise PeerLost(f"an unreadable reply: {error}") from error
        if answer.boot_id != self._boot_id:
            raise UnknownSession("the daemon was restarted")
        reply_type = self._expected.pop(answer.request_id, None)
        if reply_type is None:
            return None
        reply: Reply | ForebayError
        try:
            reply = answer.unwrap(reply_type)
        except UnknownSession:
            raise
        except ForebayError as error:
            reply = error
        return answer.request_id, reply

    def undo(self, payload: bytes) -> Request | None:
        """What gives back the grant of an abandoned request, if `payload` is the reply to one.

        Raises PeerLost when it makes no sense: what it grants can only end with the session.
        """
        if not self._abandoned:
            return None
        answer = decode_reply(payload)
        reply_type = self._abandoned.pop(answer.request_id, None)
        if reply_type is None or answer.code:
            return None
        try:
            return core.undo(answer.unwrap(reply_type))
        except ForebayError as error:
            raise PeerLost(f"an unreadable reply: {error}") from error
