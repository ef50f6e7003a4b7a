"""A service whose blobs lie in an S3 bucket; TEST_S3_ENDPOINT is a server that lets us make one.

pip install 'moto[server,s3]' && moto_server -H 127.0.0.1 -p PORT
TEST_S3_ENDPOINT=http://127.0.0.1:PORT python -m pytest tests/store/test_s3.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.machines import small
from tests.running import running


@pytest.fixture
def bucket() -> dict[str, str]:
    """The settings of a service whose blobs lie in a new bucket."""
    endpoint = os.environ.get("TEST_S3_ENDPOINT")
    if not endpoint:
        pytest.skip("TEST_S3_ENDPOINT names no S3 server to test on")
    name = f"foldserve-{uuid.uuid4().hex}"
    httpx.put(f"{endpoint}/{name}").raise_for_status()
    return {
        "FOLDSERVE_BLOB_URL": f"s3://{name}/blobs",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }


def command(settings: dict[str, str], *arguments: str) -> tuple[int, Any]:
    """Exit status and JSON output of a `foldserve` command with these settings."""
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments, "--json"],
        env=os.environ | settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)


def test_it_serves_from_a_bucket_and_from_nothing_else(
    bucket: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    with running(data, bucket) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        for number in (1, 2):
            assert small.upload(http, "net", number, wait=True).status_code == 201
        assert small.answer(http, "net") == pytest.approx(3.0)
        train = http.get("/v1/models/net/versions/1/checkpoints/train")
        assert train.content == small.bundle(1)
        assert http.delete("/v1/models/net/versions/1").status_code == 204
        at = ("--data-dir", str(data))
        status, report = command(bucket, "verify", *at)
        assert (status, report["ok"], report["temporary_files"]) == (0, True, 0)
        status, done = command(bucket, "gc", "--older-than", "0", *at)
        assert (status, done["collected"] > 0) == (0, True)
        assert command(bucket, "verify", *at)[1]["blobs"] == report["blobs"] - done["collected"]
    for cached in data.rglob("cache/*"):
        cached.unlink()
    with running(data, bucket) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert small.answer(http, "net") == pytest.approx(3.0)
    # The control: without the bucket there is nothing to serve.
    elsewhere = bucket | {"FOLDSERVE_BLOB_URL": bucket["FOLDSERVE_BLOB_URL"] + "-empty"}
    assert command(elsewhere, "verify", *at)[0] == 1
