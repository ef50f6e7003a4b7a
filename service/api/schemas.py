"""What the routes answer, as pydantic models with examples: the source of the OpenAPI page."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")
_SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


class Answer(BaseModel):
    """Base of every response; further facts that a stage reports pass through."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")


class Problem(Answer):
    """An RFC 9457 problem document."""

    type: str = Field(examples=["/problems/missing_keys"])
    title: str = Field(examples=["Keys of the architecture are missing"])
    status: int = Field(examples=[422])
    detail: str
    instance: str | None = None
    code: str = Field(examples=["missing_keys"], description="Stable, for programs.")
    remedy: str = Field(description="What can be done about it.")


class CheckpointAnswer(Answer):
    """The uploaded file."""

    sha256: str = Field(examples=[_SHA])
    bytes: int = Field(examples=[36_578_304])
    form: Literal["train", "deploy"] | None = Field(description="Known once the file was read.")
    filename: str | None = Field(examples=["RepVGG-A0-train.pth"])


class ArchitectureAnswer(Answer):
    """The recognised network."""

    family: str = Field(examples=["RepVGG"])
    name: str = Field(examples=["RepVGG-A0"])
    num_classes: int | None = Field(examples=[1000])
    input_shape: tuple[int, ...] | None = Field(
        examples=[(3, 224, 224)], description="Of one row; null where nothing can be served."
    )


class FusionAnswer(Answer):
    """The certificate in short; the report route has all of it."""

    blocks: int = Field(examples=[22], description="Re-parameterizable blocks found.")
    fused: int = Field(examples=[22])
    kept: int = Field(examples=[0], description="Left as they are because fusing would cost more.")
    refused: int = Field(examples=[0], description="Left as they are because they are not linear.")
    convolutions_before: int = Field(examples=[44])
    convolutions_after: int = Field(examples=[22])
    macs_before: int = Field(examples=[1_520_000_000], description="Multiply-accumulates a row.")
    macs_after: int = Field(examples=[1_360_000_000])
    error_float64: float | None = Field(
        examples=[3e-15], description="Largest error of a fused region, relative to its rms."
    )
    error_end_to_end: float | None = Field(
        examples=[2e-6],
        description="Error of the served precision, relative to the output's variation.",
    )


class VersionAnswer(Answer):
    """One version of a model."""

    model: str = Field(examples=["repvgg-a0"])
    version: int = Field(examples=[1])
    state: Literal["queued", "converting", "ready", "rejected"]
    default: bool = Field(description="Whether predictions go to this version by default.")
    checkpoint: CheckpointAnswer
    config: dict[str, Any]
    architecture: ArchitectureAnswer | None
    preprocessing: dict[str, Any] | None = Field(
        description="How posted images become inputs; null when the input is no image."
    )
    fusion: FusionAnswer | None
    execution: dict[str, Any] | None = Field(
        description="How it ran where it was published: backend, precision, threads, the engines "
        "measured with their latency relative to the first, and its accuracy against float32."
    )
    progress: dict[str, Any] | None
    error: Problem | None
    created_at: datetime
    updated_at: datetime
    links: dict[str, str]


class ModelAnswer(Answer):
    """One model."""

    name: str = Field(examples=["repvgg-a0"])
    default_version: int | None = Field(examples=[1])
    pinned: bool = Field(description="Whether the default was chosen by hand (PUT default).")
    created_at: datetime
    links: dict[str, str]


class ModelWithVersions(ModelAnswer):
    """One model and its newest versions."""

    versions: list[VersionAnswer]
    next: str | None = Field(description="Address of the older versions, or null.")


class PageAnswer(Answer, Generic[T]):
    """Part of a list; `next` is the address of the part after it, null at the end."""

    items: list[T]
    next: str | None = Field(examples=["/v1/models?limit=50&cursor=repvgg-a0"])


class DefaultRequest(BaseModel):
    """Which version serves; null gives the choice back to the service (the newest ready one)."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    version: int | None = Field(ge=1, examples=[1])


class ClassScore(Answer):
    """One class with its softmax probability."""

    label: str = Field(examples=["tabby"])
    index: int = Field(examples=[281])
    score: float = Field(examples=[0.83])


class RowAnswer(Answer):
    """The best classes of one row, best first."""

    top: list[ClassScore]


class PredictionAnswer(Answer):
    """Labels and scores, one entry a row."""

    model: str
    version: int
    form: Literal["train", "deploy"]
    predictions: list[RowAnswer]


class ArrayAnswer(Answer):
    """One output array, as nested lists."""

    shape: list[int] = Field(examples=[[1, 1000]])
    data: list[Any]


class ArraysAnswer(Answer):
    """The network's raw outputs."""

    model: str
    version: int
    form: Literal["train", "deploy"]
    outputs: list[ArrayAnswer]


class LatencyAnswer(Answer):
    """Quantiles of the latency of one batch, in milliseconds."""

    median_ms: float = Field(examples=[31.2])
    p5_ms: float
    p25_ms: float
    p75_ms: float
    p95_ms: float
    samples: int


class IntervalAnswer(Answer):
    """A confidence interval."""

    low: float
    high: float


class ControlAnswer(Answer):
    """The deploy form against itself: how far from 1 is the machine's noise."""

    ratio: float = Field(examples=[1.003])
    interval: IntervalAnswer


class BatchAnswer(Answer):
    """Training form against deploy form at one batch size."""

    batch_size: int = Field(examples=[8])
    rounds: int
    train: LatencyAnswer
    deploy: LatencyAnswer
    speedup: float = Field(examples=[1.52], description="Median of train over median of deploy.")
    speedup_interval: IntervalAnswer
    control: ControlAnswer
    saving_percent: float | None = Field(
        examples=[34.2], description="Null when the machine was too noisy to claim one."
    )
    saving_interval: IntervalAnswer | None
    verdict: Literal["faster", "slower", "no difference shown", "noisy", "too few rounds"]
    statement: str


class BenchmarkAnswer(Answer):
    """A measurement of a version: training form against deploy form, interleaved."""

    model: str
    version: int
    measured_at: datetime
    seconds: float = Field(description="How long the measurement took.")
    device: str | None
    backend: str | None
    precision: str | None
    threads: int | None
    batches: list[BatchAnswer]
    descriptions: dict[str, Any]
    environment: dict[str, Any]
    plan: dict[str, Any]


class HealthAnswer(Answer):
    """The state of everything."""

    status: Literal["ok", "degraded", "draining"]
    version: str
    uptime_seconds: float
    loading: bool = Field(description="Whether models of an earlier run are still being loaded.")
    versions: dict[str, int] = Field(description="How many versions are in each state.")
    models: list[dict[str, Any]] = Field(
        description="Per served model: its version, how it runs, and the latency saving measured."
    )
    failures: list[dict[str, Any]] = Field(description="Versions that could not be loaded.")
    faults: list[dict[str, Any]] = Field(
        description="Loaded versions that are out of order and are being loaded again."
    )
    lost_devices: list[dict[str, Any]] = Field(
        description="Devices that compute nothing any more; the service starts itself anew."
    )
    damaged_blobs: list[dict[str, Any]] = Field(
        description="Blobs that versions need and that were found missing or altered."
    )
    weight_bytes: int = Field(description="Bytes of the weights of everything loaded.")
    checks: dict[str, bool]
    sandbox: dict[str, bool] | None = Field(
        description="Which measures confine conversions on this machine; null until known.",
        examples=[{"no_new_privileges": True, "system_calls_filtered": True}],
    )


class Alive(Answer):
    """The process answers."""

    status: Literal["ok"]
