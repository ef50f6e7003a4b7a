"""One of several HTTP processes: serves connections, passes their requests to the device process.

    python -m service.api.front_process '{"listening": 3, "link": 4, "memory": 5, …}'

Started by `fronts`, with the listening socket, its end of the link, its shared memory and the tally
of all connections inherited.
It ends when the device process tells it to, and at once when that is gone. Signals are for the
device process alone. It loads neither torch nor the application.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn

from service.api.connection import ConnectionLimits, limited
from service.api.draining import DrainingServer
from service.api.logs import configure
from service.api.relayed import Passing
from service.relay import memory, wire
from service.relay.front import Aborted, Front
from service.settings import Settings

SETTINGS: Final = (
    "log_format",
    "log_level",
    "max_connections",
    "max_head_bytes",
    "max_headers",
    "head_seconds",
    "response_idle_seconds",
    "min_bytes_per_second",
    "keep_alive_seconds",
    "drain_seconds",
)
"""The settings that an HTTP process is given; it is to know no secret."""
_OTHERS_FIRST_SECONDS: Final = 0.005
_NOTHING_LEFT_SECONDS: Final = 0.5


def uvicorn_config(
    app: object, settings: Settings, count: Callable[[int], int] = int
) -> uvicorn.Config:
    """How HTTP is spoken, whichever process does it; `count` as in `limited`."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="uvloop",
        http=limited(ConnectionLimits.of(settings), count),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=int(settings.keep_alive_seconds),
        timeout_graceful_shutdown=int(settings.drain_seconds),
    )


class _FrontServer(DrainingServer):
    """Accepts from a socket that others accept from too, and leaves them their share.

    A process that holds more connections than the mean lets the others go first, for a moment:
    whoever the machine happens to run would otherwise take all that wait.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        front: Front,
        link: socket.socket,
        is_ahead: Callable[[], bool],
    ) -> None:
        super().__init__(config)
        self._front, self._link = front, link
        self._is_ahead = is_ahead
        self._has_waited = False
        self._connecting: set[asyncio.Task[None]] = set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._front, sock=self._link)
        for sock in sockets or []:
            self._listen(sock)
        self._front.write(wire.HELLO, 0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for sock in sockets or []:
            asyncio.get_running_loop().remove_reader(sock)
        await super().shutdown(sockets)

    def _listen(self, sock: socket.socket) -> None:
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        if self._is_ahead() and not self._has_waited:
            self._has_waited = True
            self._pause(sock, _OTHERS_FIRST_SECONDS)
            return
        self._has_waited = False
        try:
            accepted, _ = sock.accept()
        except BlockingIOError:
            return  # another process was faster
        except OSError:  # no descriptor is left: asking again at once would be all that it does
            self._pause(sock, _NOTHING_LEFT_SECONDS)
            return
        accepted.setblocking(False)
        task = asyncio.ensure_future(self.connect(accepted))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def _pause(self, sock: socket.socket, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(sock)
        loop.call_later(seconds, self._listen, sock)


def _said_already(record: logging.LogRecord) -> bool:
    """Not for what the application has logged itself."""
    return not (record.exc_info and isinstance(record.exc_info[1], Aborted))


def _end_at_once() -> None:
    os._exit(1)  # whatever is under way can get no answer any more


def main(text: str) -> None:
    """Serve until told to end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    given = json.loads(text)
    settings = Settings(**given["settings"])
    configure(settings)
    logging.getLogger("uvicorn.error").addFilter(_said_already)
    shared = memory.writable(given["memory"])
    os.close(given["memory"])
    listening, link = socket.socket(fileno=given["listening"]), socket.socket(fileno=given["link"])

    tally, own = memory.Tally(given["tally"]), given["index"]
    os.close(given["tally"])

    def count(connections: int) -> int:
        tally[own] = connections
        return tally.total

    def is_ahead() -> bool:
        return tally.is_above_mean(own)

    def drain() -> None:
        server.should_exit = True

    front = Front(shared, drain, _end_at_once)
    config = uvicorn_config(Passing(front), settings, count)
    config.lifespan = "off"
    server = _FrontServer(config, front, link, is_ahead)
    server.run(sockets=[listening])


if __name__ == "__main__":
    main(sys.argv[1])
