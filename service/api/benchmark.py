"""Measuring what fusion saved on this machine, and the last result."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from service import errors
from service.api.documented import refusals
from service.api.schemas import BenchmarkAnswer
from service.api.state import Here, in_thread
from service.api.uploads import ModelName
from service.errors import BadInput
from service.store import BenchmarkRecord

router = APIRouter(tags=["benchmark"])

_MISSING = (
    errors.ModelNotFound,
    errors.VersionNotFound,
    errors.VersionNotReady,
    errors.NameInvalid,
)
_Version = Annotated[int | None, Query(ge=1, description="Default: the one that serves.")]


class BenchmarkRequest(BaseModel):
    """What to measure; everything may be left out."""

    model_config = ConfigDict(extra="forbid")

    batch_sizes: list[Annotated[int, Field(ge=1)]] | None = Field(
        default=None, min_length=1, max_length=16, examples=[[1, 8]], description="Rows at once."
    )
    seconds: float | None = Field(
        default=None, gt=0, examples=[20], description="Budget in seconds, all sizes together."
    )


@router.post(
    "/v1/models/{name}/benchmark",
    summary="Measure training form against deploy form",
    response_model=BenchmarkAnswer,
    responses=refusals(
        *_MISSING,
        errors.FormNotAvailable,
        errors.NotServable,
        errors.BadInput,
        errors.BackendFailed,
        errors.NotLoaded,
    ),
)
async def measure(
    name: ModelName,
    service: Here,
    version: _Version = None,
    asked: BenchmarkRequest | None = None,
) -> dict[str, Any]:
    """Run both forms in turn, with the deploy form once more as a control, and keep the result.

    Per batch size: medians and quantiles in seconds, the ratio with its interval, the control, and
    a saving in per cent unless the machine was too noisy to claim one. Serving goes on in between.
    """
    settings = service.settings
    asked = asked or BenchmarkRequest()
    sizes = tuple(sorted(set(asked.batch_sizes or settings.benchmark_batch_sizes)))
    if sizes[-1] > settings.max_batch:
        raise BadInput(
            f"A batch of {sizes[-1]} rows was asked for; {settings.max_batch} are prepared.",
            remedy="Ask for smaller ones, or raise FOLDSERVE_MAX_BATCH.",
        )
    seconds = asked.seconds or settings.benchmark_seconds
    if seconds > settings.benchmark_seconds:
        raise BadInput(
            f"{seconds:g} s were asked for; at most {settings.benchmark_seconds:g} s are spent.",
            remedy="Ask for less, or raise FOLDSERVE_BENCHMARK_SECONDS.",
        )
    number, comparison = await service.host.benchmark(name, version, sizes, seconds)
    record = await in_thread(service.catalog.save_benchmark, name, number, comparison.to_dict())
    return answer(record)


@router.get(
    "/v1/models/{name}/benchmark",
    summary="The last measurement",
    response_model=BenchmarkAnswer,
    responses=refusals(*_MISSING),
)
async def last(name: ModelName, service: Here, version: _Version = None) -> dict[str, Any]:
    """The last measurement of a version, or of the model's serving version."""
    if version is None:
        model = await in_thread(service.catalog.get_model, name)
        version = model.default_version
    record = await in_thread(service.catalog.get_benchmark, name, version)
    if record is None:
        raise errors.VersionNotReady(
            f"Model {name!r} was not measured yet.",
            remedy=f"Measure it with POST /v1/models/{name}/benchmark.",
        )
    return answer(record)


def answer(record: BenchmarkRecord) -> dict[str, Any]:
    """A stored measurement as the routes show it; latencies in milliseconds per batch."""
    result = record.result
    deploy = result["descriptions"].get(result["candidate"], {})
    return {
        "model": record.model,
        "version": record.version,
        "measured_at": record.created_at,
        "seconds": result["seconds"],
        **{fact: deploy.get(fact) for fact in ("device", "backend", "precision", "threads")},
        "batches": [_batch(batch) for batch in result["batches"]],
        "descriptions": result["descriptions"],
        "environment": result["environment"],
        "plan": result["plan"],
    }


def saving(record: BenchmarkRecord | None) -> dict[str, Any] | None:
    """A measurement in short, for `/health`; None before there is one."""
    if record is None:
        return None
    whole = answer(record)
    return {
        "measured_at": whole["measured_at"],
        "batches": [
            {
                "batch_size": batch["batch_size"],
                "train_ms": batch["train"]["median_ms"],
                "deploy_ms": batch["deploy"]["median_ms"],
                "saved_ms": batch["train"]["median_ms"] - batch["deploy"]["median_ms"],
                "speedup": batch["speedup"],
                "saving_percent": batch["saving_percent"],
                "verdict": batch["verdict"],
            }
            for batch in whole["batches"]
        ],
    }


def _batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        "batch_size": batch["batch_size"],
        "rounds": batch["rounds"],
        "train": _milliseconds(batch["baseline"]),
        "deploy": _milliseconds(batch["candidate"]),
        "speedup": batch["ratio"],
        "speedup_interval": batch["ratio_interval"],
        "control": {"ratio": batch["control_ratio"], "interval": batch["control_interval"]},
        "saving_percent": batch["saving_percent"],
        "saving_interval": batch["saving_interval"],
        "verdict": batch["verdict"],
        "statement": batch["statement"],
    }


def _milliseconds(quantiles: dict[str, Any]) -> dict[str, Any]:
    return {
        "median_ms": quantiles["p50"] * 1e3,
        **{f"{q}_ms": quantiles[q] * 1e3 for q in ("p5", "p25", "p75", "p95")},
        "samples": quantiles["count"],
    }
