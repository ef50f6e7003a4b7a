"""A uvicorn server that loses nobody when it ends."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

import uvicorn

LAST_REQUESTS_SECONDS: Final = 0.5


class DrainingServer(uvicorn.Server):
    """See `shutdown`."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer whoever has connected, tell everyone that the connection closes, then end.

        Connections that wait to be accepted would be reset with the listening socket, and idle ones
        with a request on its way: they get a moment, in which every answer says `close`.
        """
        for sock in sockets or []:
            sock.setblocking(False)
            while (accepted := _accept(sock)) is not None:
                await self.connect(accepted)
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_REQUESTS_SECONDS)
        await super().shutdown(sockets)

    async def connect(self, accepted: socket.socket) -> None:
        """Serve a connection that was accepted elsewhere."""
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(self._protocol, accepted)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


def _accept(sock: socket.socket) -> socket.socket | None:
    """The next connection that waits, if any."""
    try:
        return sock.accept()[0]
    except OSError:
        return None
