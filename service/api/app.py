"""The application: its parts opened and closed in order, its routes, its answers to errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from service import __version__
from service.api import (
    benchmark,
    changes,
    downloads,
    events,
    health,
    login,
    models,
    pages,
    predict,
    problems,
    tracing,
    uploads,
)
from service.api.access import describe
from service.api.direct import DirectDispatch
from service.api.guard import Guard, cors
from service.api.keyring import Keyring
from service.api.layers import Application
from service.api.metrics import Metrics
from service.api.middleware import AroundEveryRequest
from service.api.ratelimit import RateLimit
from service.api.state import Service
from service.api.v2 import routes as v2
from service.hosting import Host, worker_limits
from service.provision import Provision, provision
from service.serving import BatchLimits, Choices, ModelSet, ModelSetLimits
from service.settings import Settings
from service.store import BlobStore, Catalog
from service.store.files import make_folder
from service.worker import Worker

DESCRIPTION = """
Upload the multi-branch checkpoint that training produced. Foldserve recognises the network, folds
every linear multi-branch region into one convolution, proves the folded network equal to the
uploaded one, and serves it.

Every refusal is an RFC 9457 problem document (`application/problem+json`) with a stable `code` and
a `remedy`; [/problems](/problems) lists them.
"""


_WORKER_SECONDS = 3.0
"""How long the end waits for the worker, which was told when the drain began."""


def create_app(settings: Settings) -> FastAPI:
    """The application for `settings`. Nothing is opened before its lifespan begins."""
    metrics = Metrics()
    limit = settings.rate_limit
    rate = RateLimit(limit, settings.rate_limit_burst) if limit else None
    keyring = Keyring(settings.key_refresh_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _opened(settings, metrics, keyring, rate) as service:
            app.state.service = service
            yield
        if end_tracing is not None:
            await run_in_threadpool(end_tracing)

    app = Application(
        title="Foldserve",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        # `tracing` sees to it; FastAPI would ask at every request whether somebody else does.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    problems.install(app)
    # First, hence the innermost: whatever is added after it is around direct routes too.
    app.add_middleware(DirectDispatch, routers=[("", predict.router), ("/v2", v2.hot)])
    # The last one added is the outermost.
    app.add_middleware(Guard, settings=settings, keyring=keyring, rate=rate)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, **cors(settings))
    app.add_middleware(AroundEveryRequest, metrics=metrics, access_log=settings.access_log)
    endpoint = settings.otlp_endpoint
    end_tracing = tracing.install(app, endpoint) if endpoint else None
    routes = (
        models,
        changes,
        uploads,
        events,
        downloads,
        predict,
        v2,
        benchmark,
        health,
        pages,
        login,
    )
    for module in routes:
        app.include_router(module.router)
    pages.mount_static(app)
    describe(app)
    return app


@asynccontextmanager
async def _opened(
    settings: Settings, metrics: Metrics, keyring: Keyring, rate: RateLimit | None
) -> AsyncIterator[Service]:
    """Open store, catalog, models and worker; close them in the opposite order."""
    async with AsyncExitStack() as stack:
        await run_in_threadpool(make_folder, settings.data_dir.absolute())
        blobs = await run_in_threadpool(
            BlobStore, settings.effective_blob_url, local_dir=settings.blob_cache_dir
        )
        await run_in_threadpool(blobs.sweep_temporary)
        catalog = await run_in_threadpool(Catalog, settings.effective_database_url)
        stack.callback(catalog.close)
        if settings.keys_required:
            await keyring.start(catalog.keys.all)
            stack.push_async_callback(keyring.close)
        limits = ModelSetLimits(
            batch=BatchLimits(
                settings.queue_rows, settings.request_seconds, settings.inline_seconds
            ),
            threads=settings.torch_threads,
            train_idle_seconds=settings.idle_unload_seconds,
        )
        choices = Choices(settings.data_dir / "choices.json")
        host = Host(settings, catalog, blobs, ModelSet(limits, choices))
        await host.start()
        stack.push_async_callback(host.close)
        decoders = ThreadPoolExecutor(settings.decode_threads, "foldserve-decode")
        stack.callback(decoders.shutdown, wait=False, cancel_futures=True)
        scratch = settings.scratch_dir / "conversions"
        named = await run_in_threadpool(_provisioned, settings, catalog, blobs)
        worker = Worker(catalog, blobs, scratch, worker_limits(settings), host)
        await run_in_threadpool(worker.start)
        # In a thread: the worker may be waiting for this very loop to load a model.
        stack.push_async_callback(run_in_threadpool, worker.stop, _WORKER_SECONDS)
        service = Service(settings, metrics, blobs, catalog, host, worker, decoders, keyring, named)
        metrics.watch(lambda: health.watched(service))
        if settings.grpc_port:
            from service.api.v2 import rpc  # optional: the server has looked whether it is here

            calls = await rpc.start(service, rate)
            stack.push_async_callback(calls.stop, settings.drain_seconds)
        yield service


def _provisioned(settings: Settings, catalog: Catalog, blobs: BlobStore) -> set[tuple[str, int]]:
    """Queue the checkpoints that the settings name; returns the versions they became."""
    versions = [provision(Provision.parse(text), catalog, blobs) for text in settings.models]
    return {(version.model, version.version) for version in versions}
