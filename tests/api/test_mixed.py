"""Many callers at once, each with another kind of request: everybody gets the answer to his own."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.api import images
from tests.api import tiny
from tests.running import RunningServer

CLOSE = 1e-4
Ask = Callable[[httpx.AsyncClient, str, int], Awaitable[tuple[NDArray[np.float32], NDArray]]]


async def _npy(http: httpx.AsyncClient, model: str, seed: int) -> tuple[NDArray, NDArray]:
    rows = tiny.rows(1 + seed % 3, seed)
    headers = {"Content-Type": tiny.NPY, "Accept": tiny.NPY}
    url = f"/v1/models/{model}/predict"
    answer = await http.post(url, content=tiny.npy(rows), headers=headers)
    return tiny.from_npy(answer.raise_for_status().content), rows


async def _json(http: httpx.AsyncClient, model: str, seed: int) -> tuple[NDArray, NDArray]:
    rows = tiny.rows(2, seed)
    headers = {"Accept": "application/vnd.foldserve.arrays+json"}
    url = f"/v1/models/{model}/predict"
    answer = await http.post(url, json={"inputs": rows.tolist()}, headers=headers)
    (output,) = answer.raise_for_status().json()["outputs"]
    return np.asarray(output["data"], np.float32), rows


async def _image(http: httpx.AsyncClient, model: str, seed: int) -> tuple[NDArray, NDArray]:
    noise = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    headers = {"Content-Type": "image/png", "Accept": tiny.NPY}
    url = f"/v1/models/{model}/predict"
    answer = await http.post(url, content=buffer.getvalue(), headers=headers)
    how = images.recipe(tiny.SHAPE, None)
    assert how is not None
    row = images.decode(buffer.getvalue(), how, 10**6)
    return tiny.from_npy(answer.raise_for_status().content), row[None]


async def _protocol(http: httpx.AsyncClient, model: str, seed: int) -> tuple[NDArray, NDArray]:
    rows = tiny.rows(1, seed)
    tensor = {"name": "input", "datatype": "FP32", "shape": list(rows.shape)}
    url = f"/v2/models/{model}"
    tensor["name"] = (await http.get(url)).raise_for_status().json()["inputs"][0]["name"]
    tensor["parameters"] = {"binary_data_size": rows.nbytes}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = await http.post(f"{url}/infer", content=head + rows.tobytes(), headers=headers)
    (output,) = answer.raise_for_status().json()["outputs"]
    return np.asarray(output["data"], np.float32).reshape(output["shape"]), rows


def test_mixed_requests_at_once_get_their_own_rows(server: RunningServer, model: str) -> None:
    kinds: list[Ask] = [_npy, _json, _image, _protocol]

    async def everybody() -> list[tuple[NDArray, NDArray]]:
        limits = httpx.Limits(max_connections=24)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
            asked = (kinds[seed % len(kinds)](http, model, seed) for seed in range(48))
            return list(await asyncio.gather(*asked))

    answers = asyncio.run(everybody())
    truths = [tiny.expected(rows) for _, rows in answers]
    for (found, _), truth in zip(answers, truths, strict=True):
        assert found.shape == truth.shape
        assert np.abs(found - truth).max() < CLOSE * max(1.0, np.abs(truth).max())
    # The control: the answers of two callers differ by more than that.
    assert np.abs(answers[0][0][0] - truths[4][0]).max() > 10 * CLOSE
