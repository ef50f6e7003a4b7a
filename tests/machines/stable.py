"""Services that start in a moment: one process imports everything once, each service is its fork.

It reads one order a line from its standard input (`data_dir`, `log`, `environment`, and `change`, a
`module:function` that is called before the service starts, for the controls), forks, and answers
the process id. A fork lives as `foldserve serve` does, with a fork server of its own.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

from sqlalchemy.orm import configure_mappers

import service.checkpoint.preload
import service.worker  # noqa: F401
from service.api.server import run
from service.settings import Settings

_LATER = (
    *("anyio._backends._asyncio", "uvloop", "uvicorn.loops.uvloop", "uvicorn.lifespan.on"),
    *("uvicorn.protocols.http.httptools_impl", "sqlalchemy.dialects.sqlite"),
)
"""What a service imports once it runs."""


def main() -> None:
    # A fork of a process with threads would not be a fresh process.
    assert len(os.listdir("/proc/self/task")) == 1
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name in _LATER:
        importlib.import_module(name)
    configure_mappers()
    # What a service collects at its start is then its own: looking at all that it inherited would
    # copy the pages of it.
    gc.collect()
    gc.freeze()
    print("warm", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _serve(json.loads(line))
        print(pid, flush=True)


def _serve(order: dict[str, Any]) -> NoReturn:
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor, name in ((0, os.devnull), (1, os.devnull), (2, order["log"])):
            opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.environ.update(order["environment"])
        ctypes.CDLL(None).watch()  # of the shim
        _fork_a_fork_server()
        if order["change"]:
            module, _, name = order["change"].partition(":")
            getattr(importlib.import_module(module), name)()
        status = run(Settings(port=0, data_dir=Path(order["data_dir"])))
    finally:
        os._exit(status)


def _fork_a_fork_server() -> None:
    """What `forkserver.ensure_running` does, but by a fork that has the imports already."""
    mine: Any = forkserver._forkserver  # type: ignore[attr-defined]
    address = tempfile.mktemp(prefix="stable-")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        alive_reader, alive_writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(alive_writer)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            forkserver.main(listener.fileno(), alive_reader, [])
            os._exit(0)
        os.close(alive_reader)
    mine._forkserver_address, mine._forkserver_alive_fd = address, alive_writer
    mine._forkserver_pid = pid


if __name__ == "__main__":
    main()
