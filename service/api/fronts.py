"""Several HTTP processes in front of this one: started, linked, replaced when they die, drained.

They accept from the one listening socket. Each has a link of its own, a pair of connected sockets,
and shared memory of its own: neither has a name, so there is nothing that others could open, and
with a process goes everything that it held.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any, Final

import structlog

from service.api.front_process import SETTINGS
from service.api.relayed import Relayed
from service.relay import memory
from service.relay.back import Back
from service.settings import PREFIX, Settings

log = structlog.get_logger("foldserve")

_START_SECONDS: Final = 60.0
_LEAST_LIFE_SECONDS: Final = 1.0
_KILL_SECONDS: Final = 5.0
_SECRET: Final = (PREFIX, "AWS_")


class Fronts:
    """The HTTP processes for `app`; the tasks of their requests are put into `tasks`."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        listening: socket.socket,
        tasks: set[asyncio.Task[None]],
    ) -> None:
        self._app = app
        self._settings = settings
        self._listening = listening
        self._tasks = tasks
        self._draining = False
        self._counted = memory.create(8 * settings.http_processes)
        self._tally = memory.Tally(self._counted)
        self._running: dict[int, _Process] = {}
        self._keeping: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start all and wait until they serve. Raises RuntimeError when they do not."""
        self._listening.setblocking(False)
        ready = [asyncio.Event() for _ in range(self._settings.http_processes)]
        self._keeping = [
            asyncio.ensure_future(self._keep(index, event)) for index, event in enumerate(ready)
        ]
        waiting = asyncio.ensure_future(_all(ready))
        await asyncio.wait(
            (waiting, *self._keeping),
            timeout=_START_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not waiting.done():
            waiting.cancel()
            self.kill()
            raise RuntimeError("the HTTP processes do not start")

    async def drain(self, seconds: float) -> None:
        """Let them answer whoever has connected, and end; kill what is left after `seconds`."""
        self._draining = True
        self._listening.close()
        for process in self._running.values():
            process.back.drain()
        _, left = await asyncio.wait(self._keeping, timeout=seconds)
        if left:
            self.kill()
            await asyncio.wait(left, timeout=_KILL_SECONDS)

    @property
    def pids(self) -> list[int]:
        """The running HTTP processes."""
        return list(self._running)

    def kill(self) -> None:
        """End them at once."""
        self._draining = True
        for process in list(self._running.values()):
            process.popen.kill()

    async def _keep(self, index: int, first: asyncio.Event) -> None:
        """One process after the other, until the end has begun."""
        while not self._draining:
            began = time.monotonic()
            process = await self._launch(index, first)
            self._running[process.popen.pid] = process
            if self._draining:  # meanwhile
                process.popen.kill()
            await process.lost.wait()
            process.popen.kill()  # it has closed its link: whatever it still does is of no use
            status = await asyncio.to_thread(process.popen.wait)
            del self._running[process.popen.pid]
            self._tally[index] = 0
            if self._draining:
                return
            log.warning("an HTTP process ended; another takes its place", status=status)
            if not first.is_set():
                return  # the start fails
            await asyncio.sleep(max(0.0, began + _LEAST_LIFE_SECONDS - time.monotonic()))

    async def _launch(self, index: int, ready: asyncio.Event) -> _Process:
        settings = self._settings
        shared = memory.create(settings.http_shared_bytes)
        here, there = socket.socketpair()
        given = {
            "listening": self._listening.fileno(),
            "link": there.fileno(),
            "memory": shared,
            "tally": self._counted,
            "index": index,
            "settings": {name: getattr(settings, name) for name in SETTINGS},
        }
        environment = {k: v for k, v in os.environ.items() if not k.upper().startswith(_SECRET)}
        # The modules are found where this process found them, and not in the working directory.
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            popen = await asyncio.to_thread(
                subprocess.Popen,
                [sys.executable, "-P", "-m", "service.api.front_process", json.dumps(given)],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=(self._listening.fileno(), there.fileno(), shared, self._counted),
                process_group=0,  # Ctrl-C in a terminal is for the device process
            )
            readable = memory.readable(shared)
        finally:
            there.close()
            os.close(shared)
        lost = asyncio.Event()
        answerer = Relayed(self._app)
        back = Back(self._app, readable, self._tasks, ready.set, lost.set, answerer)
        await asyncio.get_running_loop().create_unix_connection(lambda: back, sock=here)
        return _Process(popen, back, lost)


async def _all(events: list[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


class _Process:
    def __init__(self, popen: subprocess.Popen[bytes], back: Back, lost: asyncio.Event) -> None:
        self.popen, self.back, self.lost = popen, back, lost
