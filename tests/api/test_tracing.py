"""Traces reach a collector, and without one nothing of OpenTelemetry is loaded."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.api import tiny
from tests.api.conftest import put_tiny
from tests.running import ROOT, running

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def collector() -> Iterator[tuple[str, list[Span]]]:
    """A collector on loopback, and the spans that it got."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_prediction_is_traced_below_the_callers_span(tmp_path: Path) -> None:
    with collector() as (endpoint, spans):
        with (
            running(tmp_path / "data", {"FOLDSERVE_OTLP_ENDPOINT": endpoint}) as server,
            httpx.Client(base_url=server.url, timeout=120) as http,
        ):
            assert put_tiny(http, "traced").status_code == 201
            answer = http.post(
                "/v1/models/traced/predict",
                content=tiny.npy(tiny.rows(2)),
                headers={"Content-Type": tiny.NPY, "traceparent": PARENT},
            )
            assert answer.status_code == 200
            assert server.stop() == 0  # what is left is sent at the end
        mine = [span for span in spans if span.trace_id.hex() == PARENT.split("-")[1]]
        (request,) = [span for span in mine if span.parent_span_id.hex() == PARENT.split("-")[2]]
        below = {span.name: span for span in mine if span.parent_span_id == request.span_id}
        assert below.keys() == {"queue", "compute"}
        rows = {each.key: each.value.int_value for each in below["compute"].attributes}
        assert rows["foldserve.batch_rows"] == 2
        for span in below.values():
            assert request.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= request.end_time_unix_nano
        assert not any("health" in span.name for span in spans)


def test_without_a_collector_nothing_of_it_is_loaded() -> None:
    code = (
        "import sys\n"
        "from service.api.app import create_app\n"
        "from service.settings import Settings\n"
        "create_app(Settings())\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
