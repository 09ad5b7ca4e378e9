"""Errors of the GPU's side. They never travel on the wire."""

from __future__ import annotations

from forebay.kvstore.errors import ForebayError


class DmaError(ForebayError):
    """The GPU or its driver refused; nothing was begun."""


class DmaTimeout(DmaError):
    """A transfer has not ended in time and may still be moving bytes: neither side's memory may be given away."""
