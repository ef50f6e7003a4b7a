"""What Prometheus scrapes: requests by route and status, and the state of what is served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from service import __version__

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

_COUNTED_TOGETHER = 16


class Metrics:
    """One application's metrics, in a registry of their own so that applications do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Gauge("foldserve_build_info", "Version.", ["version"], registry=self.registry)
        build.labels(version=__version__).set(1)
        self._requests = Counter(
            "foldserve_http_requests",
            "HTTP requests by route template, method and status.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "foldserve_http_request_seconds",
            "Time from the request's head to the end of its response, in seconds.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        running = Gauge(
            "foldserve_http_requests_running", "Requests under way.", registry=self.registry
        )
        running.set_function(lambda: self._running)
        self._running = 0
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._uncounted: deque[tuple[str, str, int, float]] = deque()
        self._counting = threading.Lock()
        self.uploaded_bytes = Counter(
            "foldserve_uploaded_bytes", "Bytes of accepted checkpoints.", registry=self.registry
        )

    def began(self) -> None:
        """Count a request in."""
        self._running += 1

    def ended(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request out; `status` 499 means that the client left first.

        The series hear of it together with others: one alone costs ten times as much as remembering
        it, for by the next request nothing of that code is left in a cache.
        """
        self._running -= 1
        self._uncounted.append((route, method, status, seconds))
        if len(self._uncounted) >= _COUNTED_TOGETHER:
            self._count()

    def _count(self) -> None:
        with self._counting:  # a scrape counts too, in a thread of its own
            while self._uncounted:
                route, method, status, seconds = self._uncounted.popleft()
                key = route, method, status
                series = self._series.get(key)
                if series is None:  # looking a series up by its labels costs more than counting
                    requests = self._requests.labels(route, method, str(status))
                    series = self._series[key] = requests, self._seconds.labels(route)
                series[0].inc()
                series[1].observe(seconds)

    def watch(self, read: Callable[[], Iterable[Metric]]) -> None:
        """Add families that are read from their source at every scrape."""
        self.registry.register(_Source(read))

    def render(self) -> bytes:
        """The exposition text."""
        self._count()
        return generate_latest(self.registry)


class _Source(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()

    def describe(self) -> Iterable[Metric]:
        return ()  # names are known at the first scrape; nothing is read at registration
