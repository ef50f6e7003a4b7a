"""schemathesis over the whole OpenAPI document: no 5xx, and no answer that it does not mention."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from tests.api.conftest import put_tiny
from tests.promises import Budget, Tell
from tests.running import RunningServer, running

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
BOUNDS = {
    "FOLDSERVE_BENCHMARK_SECONDS": "0.5",
    "FOLDSERVE_BENCHMARK_BATCH_SIZES": "1",
    "FOLDSERVE_MAX_WAIT_SECONDS": "0.2",
    "FOLDSERVE_MAX_BATCH": "4",
}
NO_DATABASE = ("--generation-database", "none")  # which a deterministic run has anyway
_RUN = "from schemathesis.cli import schemathesis; schemathesis()"


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A service of its own, whose slow routes are short, with two versions to find."""
    with running(tmp_path_factory.mktemp("fuzzed") / "data", BOUNDS) as server:
        offer_two_versions(server)
        yield server


def offer_two_versions(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as http:
        for seed in (0, 1):
            put_tiny(http, "tiny", seed, ready=False)
        deadline = time.monotonic() + 200
        while http.get("/v1/models/tiny/versions/2").json()["state"] != "ready":
            assert time.monotonic() < deadline
            time.sleep(0.1)


def aimed(openapi: dict[str, Any]) -> dict[str, Any]:
    """The document with names and numbers that exist, so that routes are not all left by 404.

    Deletions keep theirs: what the others aim at must stay.
    """
    for methods in openapi["paths"].values():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", []):
                if method != "delete" and parameter["in"] == "path":
                    known = {"name": ["tiny"], "version": [1, 2]}.get(parameter["name"])
                    if known:
                        parameter["schema"] = {"enum": known}
    openapi["paths"] = {
        path: {method: op for method, op in methods.items() if "/unload" not in path}
        for path, methods in openapi["paths"].items()
    }
    return openapi


def fuzz(url: str, openapi: dict[str, Any], folder: Path, *options: str) -> str:
    """What schemathesis printed; its exit status is its first line."""
    document = folder / "openapi.json"
    document.write_text(json.dumps(openapi))
    done = subprocess.run(
        [
            sys.executable, "-W", "ignore", "-c", _RUN, "run", str(document), "--url", url,
            "--phases", "fuzzing", "--mode", "positive", "--checks", CHECKS,
            "--continue-on-failure", "--no-color", "--request-timeout", "60", *options,
        ],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def test_the_documented_requests_get_documented_answers(
    fuzzed: RunningServer, tmp_path: Path
) -> None:
    openapi = httpx.get(f"{fuzzed.url}/openapi.json").json()
    found = fuzz(
        fuzzed.url, aimed(openapi), tmp_path,
        "--max-examples", "8", "--max-time", "18", "--no-shrink", "--generation-deterministic",
    )  # fmt: skip
    assert found.startswith("0\n"), found


@pytest.mark.soak(share=0.04)
@pytest.mark.parametrize("pinned", [True, False])
def test_thousands_of_requests_get_documented_answers(
    fuzzed: RunningServer, tmp_path: Path, pinned: bool, budget: Budget, tell: Tell
) -> None:
    openapi = httpx.get(f"{fuzzed.url}/openapi.json").json()
    document = aimed(openapi) if pinned else openapi
    seconds = str(round(budget.seconds * 0.8))
    found = fuzz(
        fuzzed.url, document, tmp_path, *NO_DATABASE,
        "--max-examples", "300", "--max-time", seconds,
    )  # fmt: skip
    cases = re.search(r"(\d+) generated", found)
    tell(
        f"schemathesis over the OpenAPI, names {'known' if pinned else 'made up'}",
        "no 5xx, nothing undocumented",
        f"{cases[1] if cases else '?'} requests, exit status {found.partition(chr(10))[0]}",
        "a planted fault is found",
    )
    assert found.startswith("0\n"), found


def test_a_planted_fault_is_found(tmp_path: Path) -> None:
    """The control: a route that fails for one kind of name, and one that answers otherwise."""
    app = FastAPI()

    @app.get("/planted/{name}")
    async def planted(name: str) -> str:
        return str(1 / (len(name) - 2))

    folder = tmp_path / "app"
    folder.mkdir()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    found = fuzz(
        f"http://127.0.0.1:{port}", app.openapi(), folder, *NO_DATABASE, "--max-examples", "100"
    )
    server.should_exit = True
    thread.join()
    assert not found.startswith("0\n")
    assert "Server error" in found
