"""What Prometheus scrapes: requests by route and status, and the state of what is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from service import __version__
from service.api.families import add_tallied
from service.serving import Tally

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """One application's metrics, in a registry of their own so that applications do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Gauge("foldserve_build_info", "Version.", ["version"], registry=self.registry)
        build.labels(version=__version__).set(1)
        running = Gauge(
            "foldserve_http_requests_running", "Requests under way.", registry=self.registry
        )
        running.set_function(lambda: self._running)
        self._running = 0
        # Written on the event loop alone; a scrape reads them on a thread, and may miss the request
        # that is being counted.
        self._requests: dict[tuple[str, str, int], int] = {}
        self._seconds: dict[str, Tally] = {}
        self.watch(self._counted)
        self.uploaded_bytes = Counter(
            "foldserve_uploaded_bytes", "Bytes of accepted checkpoints.", registry=self.registry
        )

    def began(self) -> None:
        """Count a request in."""
        self._running += 1

    def ended(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request out; `status` 499 means that the client left first."""
        self._running -= 1
        key = route, method, status
        self._requests[key] = self._requests.get(key, 0) + 1
        tally = self._seconds.get(route)
        if tally is None:
            tally = self._seconds[route] = Tally(_SECONDS)
        tally.add(seconds)

    def _counted(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "foldserve_http_requests",
            "HTTP requests by route template, method and status.",
            labels=["route", "method", "status"],
        )
        for (route, method, status), count in list(self._requests.items()):
            requests.add_metric([route, method, str(status)], count)
        seconds = HistogramMetricFamily(
            "foldserve_http_request_seconds",
            "Time from the request's head until its answer was handed to its connection, in s.",
            labels=["route"],
        )
        for route, tally in list(self._seconds.items()):
            add_tallied(seconds, [route], tally.read())
        return requests, seconds

    def watch(self, read: Callable[[], Iterable[Metric]]) -> None:
        """Add families that are read from their source at every scrape."""
        self.registry.register(_Source(read))

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)


class _Source(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()

    def describe(self) -> Iterable[Metric]:
        return ()  # names are known at the first scrape; nothing is read at registration
