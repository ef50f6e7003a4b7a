"""What Prometheus reads at every scrape from where it is counted: queues, conversions, devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from service.recovery import Recovery
from service.serving import BatcherStats, LoadedModel, Tallied
from service.worker import RESULTS

OUTCOMES = ("answered", "failed", "rejected", "expired", "departed")
"""How a request to a model ends; their sum is the requests less those that still wait or run."""

_MODEL = ("model", "version", "form")
_BATCH_ROWS = tuple(1 << power for power in range(11))
_Stat = Callable[[BatcherStats], float]
_COUNTERS: tuple[tuple[str, str, _Stat], ...] = (
    (
        "foldserve_prediction_requests",
        "Requests that came to a queue.",
        lambda s: s.requests,
    ),
    ("foldserve_rows", "Rows computed.", lambda s: s.rows),
    ("foldserve_batches", "Batches computed.", lambda s: s.batches),
    (
        "foldserve_retried_requests",
        "Requests run again, alone.",
        lambda s: s.retried,
    ),
    ("foldserve_compute_seconds", "Time that the device computed.", lambda s: s.busy_seconds),
)


def of_models(loaded: Sequence[LoadedModel]) -> Iterator[Metric]:
    """Queues, batches, outcomes and weights of everything that is loaded."""
    waiting = GaugeMetricFamily("foldserve_queue_rows", "Rows that wait.", labels=_MODEL)
    running = GaugeMetricFamily("foldserve_running_rows", "Rows that compute.", labels=_MODEL)
    weights = GaugeMetricFamily("foldserve_weight_bytes", "Bytes of weights.", labels=_MODEL)
    outcomes = CounterMetricFamily(
        "foldserve_predictions", "Requests to a model by outcome.", labels=(*_MODEL, "outcome")
    )
    waits = HistogramMetricFamily(
        "foldserve_queue_seconds", "Wait for the start of the first batch.", labels=_MODEL
    )
    sizes = HistogramMetricFamily("foldserve_batch_rows", "Rows of a batch.", labels=_MODEL)
    counters = [CounterMetricFamily(name, text, labels=_MODEL) for name, text, _ in _COUNTERS]
    for each in loaded:
        key, stats = _key(each), each.stats
        waiting.add_metric(key, stats.waiting_rows)
        running.add_metric(key, stats.running_rows)
        weights.add_metric(key, each.description.weight_bytes)
        for outcome in OUTCOMES:
            outcomes.add_metric([*key, outcome], getattr(stats, outcome))
        add_tallied(waits, key, stats.queue_seconds)
        add_tallied(sizes, key, _sizes(stats))
        for counter, (_, _, read) in zip(counters, _COUNTERS, strict=True):
            counter.add_metric(key, read(stats))
    yield from (waiting, running, weights, outcomes, waits, sizes, *counters)
    yield GaugeMetricFamily("foldserve_loaded_programs", "Programs loaded.", len(loaded))


def of_conversions(seconds: dict[str, Tallied]) -> Iterator[Metric]:
    """Conversions by result with their durations; every result is there from the start."""
    family = HistogramMetricFamily(
        "foldserve_conversion_seconds", "Duration of conversions by result.", labels=["result"]
    )
    for result in RESULTS:
        add_tallied(family, [result], seconds[result])
    yield family


def of_versions(counts: dict[str, int]) -> Iterator[Metric]:
    """How many versions the catalog has in each state."""
    versions = GaugeMetricFamily("foldserve_versions", "Versions by state.", labels=["state"])
    for state, count in counts.items():
        versions.add_metric([state], count)
    yield versions


def of_store(damaged: Mapping[str, str]) -> Iterator[Metric]:
    """How many blobs were found damaged."""
    found = GaugeMetricFamily("foldserve_damaged_blobs", "Blobs found damaged since the start.")
    found.add_metric([], len(damaged))
    yield found


def of_faults(recovery: Recovery) -> Iterator[Metric]:
    """Models out of order now, and how often that was found and mended."""
    now = GaugeMetricFamily("foldserve_faulty_models", "Versions that are out of order.")
    now.add_metric([], len(recovery.faults))
    changes = CounterMetricFamily(
        "foldserve_model_faults", "Faults of loaded models by event.", labels=["event"]
    )
    changes.add_metric(["found"], recovery.seen)
    changes.add_metric(["recovered"], recovery.recovered)
    yield from (now, changes)


def of_devices() -> Iterator[Metric]:
    """Memory of every CUDA device: what PyTorch holds, and what is in use by anybody."""
    memory = GaugeMetricFamily(
        "foldserve_device_memory_bytes", "Memory of a device.", labels=["device", "kind"]
    )
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError:  # it is lost
            continue
        for kind, value in (
            ("allocated", torch.cuda.memory_allocated(index)),
            ("reserved", torch.cuda.memory_reserved(index)),
            ("used", total - free),
            ("total", total),
        ):
            memory.add_metric([f"cuda:{index}", kind], value)
    yield memory


def _key(each: LoadedModel) -> list[str]:
    return [each.key.model, str(each.key.version), each.key.form]


def _sizes(stats: BatcherStats) -> Tallied:
    sizes = sorted(stats.batch_rows.items())
    cumulative = tuple(sum(n for rows, n in sizes if rows <= bound) for bound in _BATCH_ROWS)
    total = sum(rows * count for rows, count in sizes)
    return Tallied(_BATCH_ROWS, cumulative, sum(count for _, count in sizes), total)


def add_tallied(family: HistogramMetricFamily, labels: list[str], tallied: Tallied) -> None:
    """Add a histogram that was counted elsewhere."""
    pairs = [(str(float(b)), c) for b, c in zip(tallied.bounds, tallied.cumulative, strict=True)]
    family.add_metric(labels, [*pairs, ("+Inf", tallied.count)], sum_value=tallied.total)
