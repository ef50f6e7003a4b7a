"""How the service is: for people, for orchestrators, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client.core import Metric

from service import __version__
from service.api import families
from service.api.benchmark import saving
from service.api.encoding import json_bytes
from service.api.schemas import Alive, HealthAnswer
from service.api.state import Here, Service, in_thread
from service.errors import FoldserveError, StoreError
from service.serving import LoadedModel

router = APIRouter(tags=["health"])


@router.get("/health/live", summary="Is the process alive?", response_model=Alive)
async def live() -> dict[str, str]:
    """200 as long as the event loop turns."""
    return {"status": "ok"}


@router.get(
    "/health/ready",
    summary="May it get traffic?",
    response_model=HealthAnswer,
    responses={503: {"description": "Still loading, failing, or draining.", "model": HealthAnswer}},
)
async def ready(request: Request, service: Here) -> Response:
    """200 once every model's default is loaded or known to fail, and until the drain begins.

    Models that were named at the start are converted first. It needs no key; without one that may
    read, the answer holds the status alone.
    """
    body = await overview(service)
    usable = is_usable(service, body)
    if not request.state.caller.may_read:
        body = {"status": body["status"]}
    return Response(json_bytes(body), 200 if usable else 503, media_type="application/json")


def is_usable(service: Service, body: dict[str, Any]) -> bool:
    """Whether a service of which `overview` said this may get traffic."""
    host = service.host
    mended = not host.recovery.under_way and not host.all_faulty
    working = not body["loading"] and not body["lost_devices"] and all(body["checks"].values())
    return working and mended and not service.draining


@router.get("/health", summary="State of everything", response_model=HealthAnswer)
async def health(service: Here) -> dict[str, Any]:
    """What is served, how it runs, and per model the latency that fusion was measured to save."""
    return await overview(service)


async def overview(service: Service) -> dict[str, Any]:
    """The body of `/health`."""
    loaded = service.host.models.loaded()
    checks, counts = await in_thread(_checks, service)
    loading = not service.host.started or await in_thread(_provisioning, service)
    models = await in_thread(_models, service, loaded)
    damaged = await in_thread(_damaged, service)
    failures = service.host.failures
    service.host.recovery.note()
    faults = service.host.recovery.to_list()
    lost = [
        {"device": each.extra["device"], "detail": each.detail} for each in service.host.models.lost
    ]
    healthy = all(checks.values()) and not (failures or damaged or loading or faults or lost)
    return {
        "status": "draining" if service.draining else "ok" if healthy else "degraded",
        "version": __version__,
        "uptime_seconds": round(time.time() - service.started, 3),
        "loading": loading,
        "versions": counts,
        "models": models,
        "failures": [
            {"model": model, "version": version, "code": error.code(), "detail": error.detail}
            for (model, version), error in sorted(failures.items())
        ],
        "faults": faults,
        "lost_devices": lost,
        "damaged_blobs": damaged,
        "weight_bytes": service.host.models.weight_bytes,
        "checks": checks,
        "sandbox": service.worker.sandbox,
    }


def _checks(service: Service) -> tuple[dict[str, bool], dict[str, int]]:
    """Whether catalog and worker do their work, and how many versions are in each state."""
    try:
        counts = {state.value: n for state, n in service.catalog.count_states().items()}
        reachable = True
    except Exception:
        counts, reachable = {}, False
    return {"catalog": reachable, "worker": service.worker.alive}, counts


def _provisioning(service: Service) -> bool:
    """Whether a version that was named at the start is still on its way."""
    for model, version in tuple(service.provisioning):
        try:
            final = service.catalog.get_version(model, version).state.final
        except StoreError:  # deleted, or the catalog is away: `checks` says which
            final = True
        if final:
            service.provisioning.discard((model, version))
    return bool(service.provisioning)


def _damaged(service: Service) -> list[dict[str, Any]]:
    """Blobs that were found missing or altered, as far as some version needs them."""
    damaged = service.blobs.damaged
    if not damaged:
        return []
    try:
        needed = service.catalog.references()
    except FoldserveError:  # `checks` says so
        needed = {}
    return [
        {"sha256": sha256, "detail": sentence, "needed_by": list(needed[sha256])}
        for sha256, sentence in sorted(damaged.items())
        if sha256 in needed
    ]


def _models(service: Service, loaded: tuple[LoadedModel, ...]) -> list[dict[str, Any]]:
    forms: dict[tuple[str, int], dict[str, LoadedModel]] = {}
    for each in loaded:
        forms.setdefault((each.key.model, each.key.version), {})[each.key.form] = each
    return [_model(service, *key, of_key) for key, of_key in sorted(forms.items())]


def _model(
    service: Service, model: str, version: int, forms: dict[str, LoadedModel]
) -> dict[str, Any]:
    try:
        measured = saving(service.catalog.get_benchmark(model, version))
    except Exception:  # deleted meanwhile, or the catalog is away: `checks` says which
        measured = None
    return {
        "model": model,
        "version": version,
        "default": service.host.default(model) == version,
        "latency_saving": measured,
        "measure": f"/v1/models/{model}/benchmark",
        "forms": {
            form: {
                **each.description.to_dict(),
                "load_seconds": round(each.load_seconds, 3),
                "idle_seconds": round(each.idle_seconds, 3),
                "requests": each.stats.answered,
                "rows": each.stats.rows,
                "waiting_rows": each.stats.waiting_rows,
            }
            for form, each in forms.items()
        },
    }


def watched(service: Service) -> Iterator[Metric]:
    """What is read from the service at every scrape."""
    yield from families.of_models(service.host.models.loaded())
    yield from families.of_conversions(service.worker.conversions())
    yield from families.of_versions(_checks(service)[1])
    yield from families.of_devices()
    yield from families.of_store(service.blobs.damaged)
    yield from families.of_faults(service.host.recovery)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"description": "The exposition text.", "content": {"text/plain": {}}}},
)
async def metrics(service: Here) -> Response:
    """Requests, queues, batches, compute time, conversions, devices, process figures."""
    body = await in_thread(service.metrics.render)
    return Response(body, media_type=service.metrics.content_type)
