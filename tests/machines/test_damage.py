"""Bytes that change on the disk of a running service."""

from __future__ import annotations

import random

import httpx
import pytest

from tests.api.problem import problem
from tests.machines import small
from tests.machines.machine import Machine

FLIPS = 20


def damaged(http: httpx.Client) -> list[str]:
    """What health lists."""
    return [blob["sha256"] for blob in http.get("/health").json()["damaged_blobs"]]


def test_every_flipped_byte_is_refused_and_reported_by_the_running_service(box: Machine) -> None:
    box.faults.off()
    service, chance = box.boot(box.disk / "damage"), random.Random(9)
    with service.client() as http:
        version = small.upload(http, "net", 4, wait=True).json()
        train, sha256 = version["links"]["train"], version["checkpoint"]["sha256"]
        blob = service.data_dir / "blobs" / "objects" / sha256[:2] / sha256
        whole = blob.read_bytes()
        reported = 0
        for position in chance.sample(range(len(whole)), FLIPS):
            data = bytearray(whole)
            data[position] ^= chance.randrange(1, 256)
            blob.write_bytes(data)
            problem(http.get(train), 500, "blob_corrupt")
            reported += damaged(http) == [sha256]
        assert reported == FLIPS
        assert http.get("/health").json()["status"] != "ok"
        assert small.answer(http, "net") == pytest.approx(5.0)  # what serves was read before
        # The control: the same file, whole again, is handed out and is in no list.
        blob.write_bytes(whole)
        assert http.get(train).content == whole
        assert damaged(http) == []
    service.kill()


def test_a_version_whose_deploy_form_was_damaged_does_not_serve(box: Machine) -> None:
    box.faults.off()
    data_dir = box.disk / "damaged-deploy"
    service = box.boot(data_dir)
    with service.client() as http:
        for number in (1, 2):
            assert small.upload(http, f"net-{number}", number, wait=True).status_code == 201
        deploy = http.get("/v1/models/net-1/versions/1/checkpoints/deploy?format=bundle")
        sha256 = deploy.headers["etag"].strip('"')
    service.kill()
    blob = data_dir / "blobs" / "objects" / sha256[:2] / sha256
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    service = box.boot(data_dir)
    with service.client() as http:
        assert small.answer(http, "net-2") == pytest.approx(3.0)  # the control: others serve
        answer = small.predict(http, "net-1")
        assert answer.status_code >= 500, answer.text
        assert sha256 in damaged(http)
    service.kill()
