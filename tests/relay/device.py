"""A device process without a device: an application that tells what reached it, behind real fronts.

python -m tests.relay.device PROCESSES SHARED_BYTES     prints its port and the fronts' pids
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import sys
from typing import Any
from urllib.parse import parse_qsl

import uvloop

from service.api.fronts import Fronts
from service.relay.back import BODY_VIEWS
from service.settings import Settings

PIECE = b"0123456789abcdef" * 4096
CONNECTIONS = 60
departed = 0
"""Requests whose client was seen to leave."""
sent = 0
"""Bytes of `/many` that were sent."""


async def app(scope: Any, receive: Any, send: Any) -> None:
    """`/echo`, `/refuse`, `/early`, `/hold`, `/many`, `/ticks`, `/fail`, `/cut`, `/seen`."""
    query = dict(parse_qsl(scope["query_string"].decode()))
    await globals()[f"_{scope['path'].strip('/')}"](scope, query, receive, send)


async def _answer(send: Any, value: Any, status: int = 200) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-length", b"%d" % len(body)), (b"x-test", b"caf\xe9")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _echo(scope: Any, query: dict[str, str], receive: Any, send: Any) -> None:
    """What arrived: its length, hash, number and kind of pieces. `?pause=` waits before each."""
    if "views" in query:
        scope["extensions"][BODY_VIEWS]()
    digest, size, kinds, more = hashlib.sha256(), 0, [], True
    while more:
        await asyncio.sleep(float(query.get("pause", 0)))
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = message["body"], message["more_body"]
        digest.update(body)
        size += len(body)
        kinds.append(type(body).__name__)
    head = [[n.decode("latin-1"), v.decode("latin-1")] for n, v in scope["headers"]]
    told = {key: scope[key] for key in ("method", "path", "scheme", "http_version", "client")}
    told |= {"raw_path": scope["raw_path"].decode(), "query": scope["query_string"].decode()}
    await _answer(
        send, told | {"sha256": digest.hexdigest(), "size": size, "kinds": kinds, "head": head}
    )


async def _refuse(scope: Any, query: dict[str, str], receive: Any, send: Any) -> None:
    """413 without a look at the body."""
    await _answer(send, "too large", 413)


async def _hold(scope: Any, query: dict[str, str], receive: Any, send: Any) -> None:
    """Waits for the client to leave."""
    global departed
    while (await receive())["type"] != "http.disconnect":
        pass
    departed += 1


async def _many(scope: Any, query: dict[str, str], receive: Any, send: Any) -> None:
    """`?pieces=` of them, or one body of that length with `?whole`."""
    global sent
    pieces = int(query["pieces"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if "whole" in query:
        await send({"type": "http.response.body", "body": PIECE * pieces})
        return
    for _ in range(pieces):
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        sent += len(PIECE)
    await send({"type": "http.response.body", "body": b""})


async def _ticks(scope: Any, query: dict[str, str], receive: Any, send: Any) -> None:
    """One event, and the next when another request asks for it."""
    global tick
    tick = asyncio.Event()
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
    await tick.wait()
    await send({"type": "http.response.body", "body": b"data: 2\n\n"})


tick = asyncio.Event()


async def _tick(scope: Any, query: dict[str, str], receive: Any, send: Any) -> None:
    tick.set()
    await _answer(send, None)


async def _fail(scope: Any, query: dict[str, str], receive: Any, send: Any) -> None:
    raise RuntimeError("on purpose")


async def _cut(scope: Any, query: dict[str, str], receive: Any, send: Any) -> None:
    """Fails in the middle of its answer."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    raise RuntimeError("on purpose")


async def _seen(scope: Any, query: dict[str, str], receive: Any, send: Any) -> None:
    processes = sorted(fronts.pids)
    await _answer(send, {"departed": departed, "sent": sent, "fronts": processes})


async def main(processes: int, shared: int) -> None:
    """Serve until stdin ends, then drain."""
    global fronts
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    settings = Settings(
        http_processes=processes,
        http_shared_bytes=shared,
        max_connections=CONNECTIONS,
        log_format="json",
    )
    fronts = Fronts(app, settings, listening, set())
    port = listening.getsockname()[1]
    await fronts.start()
    print(json.dumps({"port": port, "fronts": sorted(fronts.pids)}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await fronts.drain(20)


fronts: Fronts

if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
