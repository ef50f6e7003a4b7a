"""Inference through the protocol's reference client, against the training form in float64."""

from __future__ import annotations

import asyncio
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient import http as triton
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.api import tiny
from tests.api.v2.conftest import address
from tests.running import RunningServer

CLOSE = 1e-4


def given(array: NDArray[Any], *, binary: bool = True) -> triton.InferInput:
    sent = triton.InferInput("input_0", list(array.shape), np_to_triton_dtype(array.dtype))
    sent.set_data_from_numpy(array, binary_data=binary)
    return sent


def is_right(found: NDArray[Any] | None, rows: NDArray[Any], seed: int = 0) -> bool:
    truth = tiny.expected(rows, seed)
    assert found is not None
    assert found.dtype == np.float32
    assert found.shape == truth.shape
    return bool(np.abs(found - truth).max() < CLOSE * np.abs(truth).max())


@pytest.mark.parametrize("binary_out", [None, True, False])
@pytest.mark.parametrize("binary_in", [True, False])
def test_binary_and_json_both_ways(
    client: triton.InferenceServerClient, model: str, binary_in: bool, binary_out: bool | None
) -> None:
    rows = tiny.rows(3)
    outputs = (
        None
        if binary_out is None  # then the client asks for everything in binary
        else [triton.InferRequestedOutput("output_0", binary_data=binary_out)]
    )
    result = client.infer(model, [given(rows, binary=binary_in)], outputs=outputs)
    found = result.as_numpy("output_0")
    assert is_right(found, rows)
    assert not is_right(found, rows, seed=1)  # the control: other weights are told apart
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"]) == (model, "1")
    assert ("data" in answer["outputs"][0]) is (binary_out is False)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_computed_as_float32(
    client: triton.InferenceServerClient, model: str, dtype: Any
) -> None:
    rows = tiny.rows(2).astype(dtype)
    found = client.infer(model, [given(rows)]).as_numpy("output_0")
    assert is_right(found, rows.astype(np.float32))


def test_numbers_in_json_may_be_fp16_or_whole(
    client: triton.InferenceServerClient, model: str
) -> None:
    rows = tiny.rows(1).astype(np.float16)
    assert is_right(client.infer(model, [given(rows, binary=False)]).as_numpy("output_0"), rows)
    whole = np.ones((1, *tiny.SHAPE), np.float32)
    sent = triton.InferInput("input_0", list(whole.shape), "FP32")
    sent._data = [1] * whole.size
    assert is_right(client.infer(model, [sent]).as_numpy("output_0"), whole)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_compression_both_ways(
    client: triton.InferenceServerClient, model: str, coding: str, binary: bool
) -> None:
    rows = tiny.rows(40)
    result = client.infer(
        model,
        [given(rows, binary=binary)],
        outputs=[triton.InferRequestedOutput("output_0", binary_data=binary)],
        request_compression_algorithm=coding,
        response_compression_algorithm=coding,
    )
    assert is_right(result.as_numpy("output_0"), rows)


def test_id_version_form_and_parameters(client: triton.InferenceServerClient, model: str) -> None:
    rows = tiny.rows(2)
    result = client.infer(
        model,
        [given(rows)],
        model_version="1",
        request_id="no. 7",
        parameters={"form": "train", "timing": True, "mine": "kept"},
    )
    assert is_right(result.as_numpy("output_0"), rows)
    answer = result.get_response()
    assert answer["id"] == "no. 7"
    assert answer["parameters"].pop("mine") == "kept"
    assert answer["parameters"].pop("batch_rows") == 2
    assert answer["parameters"].pop("queue_ms") >= 0
    assert answer["parameters"].pop("compute_ms") > 0
    assert answer["parameters"] == {}


@pytest.mark.parametrize("binary", [True, False])
def test_classification(client: triton.InferenceServerClient, model: str, binary: bool) -> None:
    rows = tiny.rows(2)
    wish = triton.InferRequestedOutput("output_0", binary_data=binary, class_count=2)
    found = client.infer(model, [given(rows)], outputs=[wish]).as_numpy("output_0")
    assert found is not None
    for row, truth in zip(found, tiny.expected(rows), strict=True):
        for text, index in zip(row, np.argsort(-truth)[:2], strict=True):
            value, number, label = (text.decode() if binary else text).split(":")
            assert int(number) == index
            assert label == tiny.CONFIG["labels"][index]
            assert float(value) == pytest.approx(truth[index], rel=1e-3, abs=1e-5)


def test_several_requests_in_flight(client: triton.InferenceServerClient, model: str) -> None:
    batches = [tiny.rows(1 + seed % 3, seed) for seed in range(24)]
    waiting = [client.async_infer(model, [given(rows)]) for rows in batches]
    for rows, request in zip(batches, waiting, strict=True):
        assert is_right(request.get_result().as_numpy("output_0"), rows)


def test_the_asyncio_client(server: RunningServer, model: str) -> None:
    async def run() -> None:
        async with aio.InferenceServerClient(address(server)) as client:
            assert await client.is_server_live()
            batches = [tiny.rows(2, seed) for seed in range(8)]
            answers = await asyncio.gather(
                *(client.infer(model, [given(rows)]) for rows in batches)
            )
            for rows, answer in zip(batches, answers, strict=True):
                assert is_right(answer.as_numpy("output_0"), rows)
            answer = await client.infer(
                model,
                [given(batches[0])],
                request_compression_algorithm="gzip",
                response_compression_algorithm="deflate",
            )
            assert is_right(answer.as_numpy("output_0"), batches[0])
            with pytest.raises(InferenceServerException, match="no model 'nobody'"):
                await client.infer("nobody", [given(batches[0])])

    asyncio.run(run())
