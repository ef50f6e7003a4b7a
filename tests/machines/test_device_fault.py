"""A device that is lost under a running service, over HTTP."""

from __future__ import annotations

import time

import httpx

from tests.machines import small
from tests.machines.machine import Machine


def status(http: httpx.Client, path: str) -> int:
    return http.get(path).status_code


def test_a_lost_device_turns_readiness_off_and_comes_back(box: Machine) -> None:
    flag = box.folder / "device-is-lost"
    flag.unlink(missing_ok=True)  # of an earlier try
    service = box.boot(
        box.disk / "device",
        {
            "LOST_DEVICE": str(flag),
            "FOLDSERVE_FAULT_CHECK_SECONDS": "0.1",
            "FOLDSERVE_BACKEND": "torch",
        },
        change="tests.machines.broken:device",
    )
    try:
        service.wait_ready()
        with service.client() as http:
            for model, number in (("sick", 3), ("well", 5)):
                assert small.upload(http, model, number, wait=True).status_code == 201
            flag.write_text("4.0")  # the fused weight of number 3
            lost = time.monotonic()
            assert small.predict(http, "sick").status_code == 500
            while status(http, "/health/ready") == 200:
                assert time.monotonic() - lost < 2, "readiness must be off within 2 s"
            assert status(http, "/health/live") == 200
            health = http.get("/health").json()
            assert health["status"] == "degraded"
            assert health["faults"][0]["model"] == "sick"
            assert "illegal memory access" in health["faults"][0]["detail"]
            answer = small.predict(http, "sick")
            assert (answer.status_code, answer.json()["code"]) == (503, "model_faulty")
            assert int(answer.headers["Retry-After"]) >= 1
            assert small.answer(http, "well") == 6.0
            assert "foldserve_faulty_models 1.0" in http.get("/metrics").text
            flag.unlink()
            while status(http, "/health/ready") != 200:
                assert time.monotonic() - lost < 30, "it must come back by itself"
                time.sleep(0.02)
            assert small.answer(http, "sick") == 4.0
            assert small.answer(http, "well") == 6.0
            assert http.get("/health").json()["faults"] == []
    finally:
        service.kill()
