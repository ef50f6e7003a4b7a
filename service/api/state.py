"""The parts of a running service, opened together and handed to the routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Annotated, ParamSpec, TypeVar

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from service.api.keyring import Keyring
from service.api.metrics import Metrics
from service.hosting import Host
from service.settings import Settings
from service.store import BlobStore, Catalog
from service.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """What every route may use.

    `decoders` are the threads on which images are decoded; `provisioning` the versions that were
    named at the start and whose conversion has not ended.
    """

    settings: Settings
    metrics: Metrics
    blobs: BlobStore
    catalog: Catalog
    host: Host
    worker: Worker
    decoders: ThreadPoolExecutor
    keyring: Keyring
    provisioning: set[tuple[str, int]] = field(default_factory=set)
    started: float = field(default_factory=time.time)
    stopping: Event = field(default_factory=Event)
    exporting: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def draining(self) -> bool:
        """Whether the service takes no new traffic because it is about to end."""
        return self.stopping.is_set()

    def begin_end(self) -> None:
        """Take no new traffic; streams, waits and the conversion under way end by themselves."""
        self.stopping.set()
        self.worker.give_up()


def of(request: Request) -> Service:
    """The service that this request reached."""
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(of)]


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run something that waits for disk or database beside the event loop."""
    return await run_in_threadpool(function, *args, **kwargs)
