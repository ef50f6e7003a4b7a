"""Commands that start in a moment: one process imports everything once, each command is its fork.

It reads one order a line from its standard input, forks, and answers the process id. An order holds
`arguments` (of `foldserve`), the whole `environment`, the files `out`, `log` (standard error) and
`status` (the exit status), and `change`, a `module:function` that is called first, for the
controls. A fork lives as the command does, with a fork server of its own that is a fork too.
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
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

from sqlalchemy.orm import configure_mappers

import service.api.server
import service.checkpoint.preload
import service.worker  # noqa: F401
from service.cli import main as command

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
            _live(json.loads(line))
        print(pid, flush=True)


def _live(order: dict[str, Any]) -> NoReturn:
    status: object = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor, name in ((0, os.devnull), (1, order["out"]), (2, order["log"])):
            opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.environ.clear()
        os.environ.update(order["environment"])
        if "FAULTS_CONTROL" in os.environ:
            ctypes.CDLL(None).watch()  # of the shim
        _fork_a_fork_server()
        if order["change"]:
            module, _, name = order["change"].partition(":")
            getattr(importlib.import_module(module), name)()
        sys.argv = ["foldserve", *order["arguments"]]
        command()
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        Path(order["status"]).write_text(str(status))
        os._exit(0)


def _fork_a_fork_server() -> None:
    """What `forkserver.ensure_running` does, but by a fork that has the imports already."""
    mine: Any = vars(forkserver)["_forkserver"]
    address = f"\0foldserve-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        alive_reader, alive_writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(alive_writer)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                forkserver.main(listener.fileno(), alive_reader, [])
            finally:
                os._exit(0)  # it ends by an exception when the service has ended
        os.close(alive_reader)
    mine._forkserver_address, mine._forkserver_alive_fd = address, alive_writer
    mine._forkserver_pid = pid


if __name__ == "__main__":
    main()
