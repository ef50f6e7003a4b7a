"""What is served, as the protocol describes it; neither transport is known here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from service import __version__
from service.api import health
from service.api.inference import find_hosted
from service.api.state import Service, in_thread
from service.api.v2 import datatypes
from service.hosting import Hosted
from service.serving import LoadedModel, RowSpec
from service.store import State

EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "statistics",
)
PLATFORM: Final = "foldserve"
_MAX_VERSIONS: Final = 1000


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of this server."""
    return {"name": "foldserve", "version": __version__, "extensions": list(EXTENSIONS)}


async def server_ready(service: Service) -> bool:
    """Whether the service may get traffic, as `/health/ready` says it."""
    return health.is_usable(service, await health.overview(service))


def model_ready(service: Service, name: str, version: int | None) -> bool:
    """Whether the version (None: the default) is loaded and answers at once."""
    return service.host.hosted(name, version) is not None


async def model_metadata(service: Service, name: str, version: int | None) -> dict[str, Any]:
    """Inputs and outputs of a version, which is loaded if need be; -1 stands for any rows."""
    on = await find_hosted(service, name, version)
    page = await in_thread(
        service.catalog.list_versions, name, None, _MAX_VERSIONS, state=State.READY
    )
    return {
        "name": name,
        "versions": [str(each.version) for each in reversed(page.items) if each.servable],
        "platform": PLATFORM,
        "inputs": _tensors(on.inputs),
        "outputs": _tensors(on.outputs),
    }


def _tensors(specs: Iterable[RowSpec]) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "datatype": datatypes.of_torch(spec.dtype),
            "shape": [-1, *spec.shape],
        }
        for spec in specs
    ]


async def model_configuration(service: Service, name: str, version: int | None) -> dict[str, Any]:
    """The same as measuring tools read it: types, sizes of one row, and the largest batch."""
    on = await find_hosted(service, name, version)
    return {
        "name": name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": service.settings.max_batch,
        "input": _fields(on.inputs),
        "output": _fields(on.outputs),
        "dynamic_batching": {},
    }


def _fields(specs: Iterable[RowSpec]) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "data_type": f"TYPE_{datatypes.of_torch(spec.dtype)}",
            "dims": list(spec.shape),
        }
        for spec in specs
    ]


async def statistics(service: Service, name: str | None, version: int | None) -> dict[str, Any]:
    """What the loaded versions have done since they were loaded; of all models without a name."""
    wanted: Hosted | None = None
    if name is not None:
        wanted = await find_hosted(service, name, version)
    return {
        "model_stats": [
            _statistics(each)
            for each in service.host.models.loaded()
            if each.key.form == "deploy"
            and (name is None or each.key.model == name)
            and (version is None or wanted is None or each.key.version == wanted.version)
        ]
    }


def _statistics(loaded: LoadedModel) -> dict[str, Any]:
    stats = loaded.stats
    computing = _duration(stats.batches, stats.busy_seconds)
    return {
        "name": loaded.key.model,
        "version": str(loaded.key.version),
        "inference_count": stats.rows,
        "execution_count": stats.batches,
        "inference_stats": {
            "success": {"count": stats.answered},
            "fail": {"count": stats.failed + stats.rejected + stats.expired},
            "queue": _duration(stats.queue_seconds.count, stats.queue_seconds.total),
            "compute_infer": computing,
        },
        "batch_stats": [
            {"batch_size": size, "compute_infer": {"count": count}}
            for size, count in sorted(stats.batch_rows.items())
        ],
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}
