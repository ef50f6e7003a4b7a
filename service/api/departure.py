"""A client that leaves before its answer is there, and who waits for what nobody wants any more."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect


class Departure:
    """Entered as a context by whoever waits for a request's answer; told when its client leaves.

    What waits inside is cancelled then, and the context raises ClientDisconnect instead. Another
    cancelling of the same task stays what it is.
    """

    __slots__ = ("_waiting", "told")

    def __init__(self) -> None:
        self.told = False
        """Whether the client has left."""
        self._waiting: asyncio.Task[object] | None = None

    def tell(self) -> None:
        """The client left."""
        self.told = True
        if self._waiting is not None:
            self._waiting.cancel()

    def __enter__(self) -> None:
        if self.told:
            raise ClientDisconnect
        self._waiting = asyncio.current_task()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        waiting, self._waiting = self._waiting, None
        if kind is asyncio.CancelledError and self.told:
            assert waiting is not None
            if waiting.uncancel() == 0:
                raise ClientDisconnect from None
