"""HTTP by hand, for what no client would send."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

SECONDS = 30.0


@contextmanager
def connected(url: str, receive_buffer: int = 0) -> Iterator[socket.socket]:
    """A connection to the service at `url`, perhaps with a small receive buffer in bytes."""
    where = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(SECONDS)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((where.hostname, where.port))
        yield connection


def head(method: str, path: str, **headers: str) -> bytes:
    """A request's head; `content_length` becomes Content-Length."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON body of the next answer; status 0 for a connection that ended."""
    received = b""
    try:
        while b"\r\n\r\n" not in received and (more := connection.recv(65536)):
            received += more
        top, _, body = received.partition(b"\r\n\r\n")
        lines = top.decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
        while len(body) < int(headers.get("content-length", 0)):
            body += connection.recv(65536)
    except ConnectionError:
        return 0, {}, None
    if not received:
        return 0, {}, None
    return int(lines[0].split()[1]), headers, json.loads(body) if body else None


def ended(connection: socket.socket, within: float = SECONDS) -> bool:
    """Whether the other side ends the connection in time; what it still sends is thrown away."""
    deadline = time.monotonic() + within
    connection.settimeout(0.2)
    while time.monotonic() < deadline:
        try:
            if not connection.recv(1 << 20):
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False
