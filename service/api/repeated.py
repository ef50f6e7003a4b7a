"""Requests that begin, byte for byte, as the one before on their connection did.

A client that asks for one prediction after the other sends the same head each time; only the body
differs. What a parser makes of a head depends on nothing but its bytes, and where a body ends is
said there, so neither has to be found out again. HTTP/2 saves heads in the same way (RFC 7541), but
there the client has to do something for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from service.api.complete import Complete, Head

_LONGEST_HEAD = 1 << 12  # bytes; every connection remembers one
_END = b"\r\n\r\n"


class Repeated(NamedTuple):
    """The request before: its `head_bytes` up to the body, its `size` in bytes, what they say."""

    head_bytes: bytes
    size: int
    scope: dict[str, Any]
    head: Head

    @classmethod
    def of(cls, data: bytes, request: Complete) -> Self | None:
        """What to remember of a request that was all of `data`; None if that says too little.

        To be called before the application has seen the request, which changes its scope.
        """
        length = len(request.content)
        begin = len(data) - length
        fields = request.head.fields
        if (
            begin > _LONGEST_HEAD
            or b"transfer-encoding" in fields
            or fields.get(b"content-length") != b"%d" % length
            or data.find(_END) + len(_END) != begin  # empty lines stood before or behind it
        ):
            return None
        return cls(data[:begin], len(data), dict(request.scope), request.head)

    def body_of(self, data: bytes) -> bytearray | None:
        """The body, in a buffer of its own, if `data` is one request with the same head."""
        if len(data) != self.size or not data.startswith(self.head_bytes):
            return None
        return bytearray(memoryview(data)[len(self.head_bytes) :])

    def scope_in(self, state: dict[str, Any]) -> dict[str, Any]:
        """The scope of a request that repeats the head, with a state of its own."""
        return {**self.scope, "state": state}
