"""The HTTP server around the application: uvicorn, its start line, its orderly end."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from importlib.util import find_spec
from types import FrameType

import structlog
import torch
import uvicorn

from service.api.app import create_app
from service.api.draining import DrainingServer
from service.api.front_process import uvicorn_config
from service.api.fronts import Fronts
from service.api.logs import configure
from service.api.restart import leave, restart
from service.api.state import Service
from service.errors import FoldserveError, StoreError
from service.provision import Provision
from service.serving.garbage import settle
from service.settings import Settings
from service.store import Catalog

log = structlog.get_logger("foldserve")

_BACKLOG = 2048
_FRONT_SECONDS = 2.0
"""What an HTTP process may take to end beside the waiting for its requests."""
_OTHER_DESCRIPTORS = 512
_SWITCH_SECONDS = 0.0005
"""How long the event loop may keep the interpreter from the device thread, which takes it again
after every operator. Python's own 5 ms let refusals eat up the throughput of what was accepted."""


class _Server(DrainingServer):
    """Tells the application that the end has begun, so that streams and waits finish by themselves.

    The first signal drains; a second one ends at once, as uvicorn does. A device that is lost
    drains as well: `lost` tells it, and `signalled` whether somebody wants the end all the same.
    """

    lost = False
    signalled = False

    @property
    def service(self) -> Service | None:
        """The application's parts, once they were opened."""
        return getattr(getattr(self.config.app, "state", None), "service", None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signalled = True
        if (service := self.service) is not None:
            service.begin_end()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if not self.lost and (service := self.service) is not None:
            for device in service.host.models.lost:
                log.error("device_lost", device=device.extra["device"], reason=device.detail)
                service.begin_end()
                self.lost = self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self._serve_from(sockets or [])
        settle()
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            log.info("ready", address=f"http://{shown}:{port}")

    async def _serve_from(self, sockets: list[socket.socket]) -> None:
        await super().startup(sockets)


class _FrontedServer(_Server):
    """Serves no connection itself: the HTTP processes do, and have their requests answered here."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings
        self._fronts: Fronts | None = None

    async def _serve_from(self, sockets: list[socket.socket]) -> None:
        await uvicorn.Server.startup(self, [])
        if self.should_exit:  # the application could not start
            return
        app, tasks = self.config.app, self.server_state.tasks
        self._fronts = Fronts(app, self._settings, sockets[0], tasks)
        try:
            await self._fronts.start()
        except RuntimeError as error:
            log.error("cannot start", reason=str(error))
            self.started, self.should_exit = False, True
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit and self._fronts is not None:
            self._fronts.kill()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        assert self._fronts is not None
        await self._fronts.drain(self._settings.drain_seconds + _FRONT_SECONDS)
        self.config.timeout_graceful_shutdown = 1  # nobody waits for what is left
        await uvicorn.Server.shutdown(self, [])


def run(settings: Settings) -> int:
    """Serve until a signal comes; returns the exit status (0 after an orderly end).

    Does not return once a device was lost: the process is replaced, or ends.
    """
    configure(settings)
    if settings.keys_required and not _has_key(settings):
        return 1
    try:
        for text in settings.models:
            Provision.parse(text)
    except FoldserveError as error:
        log.error("cannot provision", model=text, detail=error.detail, remedy=error.remedy)
        return 2
    if settings.device == "cuda" and not _has_cuda():
        return 2
    if settings.grpc_port and not _has_grpc():
        return 2
    if settings.otlp_endpoint and not _is_installed("opentelemetry.exporter.otlp"):
        log.error("cannot trace", remedy="pip install 'foldserve[otel]'")
        return 2
    if settings.http_processes > 1 and not _has_memory_to_share():
        return 2
    try:
        listening = _listen(settings)
    except OSError as error:
        log.error("cannot listen", host=settings.host, port=settings.port, reason=str(error))
        return 1
    _allow_descriptors(settings.max_connections)
    sys.setswitchinterval(_SWITCH_SECONDS)
    config = uvicorn_config(create_app(settings), settings)
    several = settings.http_processes > 1
    server = _FrontedServer(config, settings) if several else _Server(config)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        server.should_exit = server.signalled = True

    # Signals before uvicorn's handlers end the start; uvicorn raises the one that ended it once
    # more afterwards, which must not turn an orderly end into a death by signal.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with listening:
        server.run(sockets=[listening])
    if (service := server.service) is not None and service.host.models.lost:
        if server.signalled:
            leave(0)
        restart(settings, service.worker.end_helpers, lambda: server.signalled)
    return 0 if server.started else 1


def _has_cuda() -> bool:
    """Whether there is a CUDA device; says what to do if not."""
    available = torch.cuda.is_available()
    if not available:
        log.error(
            "cannot serve on CUDA",
            reason=f"FOLDSERVE_DEVICE is cuda; PyTorch {torch.__version__} sees no such device.",
            remedy="Give the process a GPU and its driver (`docker run --gpus all`), or set "
            "FOLDSERVE_DEVICE=auto.",
        )
    return available


def _has_memory_to_share() -> bool:
    """Whether processes here can share sealed memory; says what to do if not."""
    available = sys.platform == "linux" and hasattr(os, "memfd_create")
    if not available:
        log.error(
            "cannot serve with several HTTP processes",
            reason=f"They share memory in a way that {sys.platform} does not have; Linux has it.",
            remedy="Unset FOLDSERVE_HTTP_PROCESSES: one process serves HTTP and the device.",
        )
    return available


def _has_grpc() -> bool:
    """Whether what serves gRPC is installed; says what to do if not."""
    missing = [package for package in ("grpc", "google.protobuf") if not _is_installed(package)]
    if missing:
        log.error(
            "cannot serve gRPC",
            reason=f"FOLDSERVE_GRPC_PORT is set, but {' and '.join(missing)} cannot be imported.",
            remedy="Install the extra: pip install 'foldserve[grpc]'. Or unset the variable.",
        )
    return not missing


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


def _allow_descriptors(connections: int) -> None:
    """Raise the soft limit of open files to what the connections need, as far as the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_DESCRIPTORS
    if soft < wanted and soft != resource.RLIM_INFINITY:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _has_key(settings: Settings) -> bool:
    """Whether somebody could be let in; says what to do if not."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    try:
        catalog = Catalog(settings.effective_database_url)
    except StoreError as error:
        log.error("cannot start", reason=error.detail)
        return False
    try:
        if catalog.keys.usable():
            return True
    finally:
        catalog.close()
    log.error(
        "cannot start",
        reason=f"On {settings.host} every request needs an API key, and there is none.",
        remedy="Make one: foldserve keys create --name admin --scope read --scope predict "
        "--scope write. To let in everybody who can reach the address, set "
        "FOLDSERVE_AUTH=insecure-off; a service on 127.0.0.1 asks for no key by default.",
    )
    return False


def _listen(settings: Settings) -> socket.socket:
    """A listening socket; with port 0 the kernel chooses, and the start line tells."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening
