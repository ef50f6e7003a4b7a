"""Several inputs and outputs of different types, by name, through the protocol's client."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from service.graph import save_program
from tests.running import RunningServer
from tests.serving import pair


@pytest.fixture(scope="module")
def several(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a model with two inputs and three outputs."""
    path: Path = tmp_path_factory.mktemp("several") / "pair.bundle"
    save_program(pair.program(), path)
    answer = httpx.post(
        f"{server.url}/v1/models/several/versions",
        files={"checkpoint": ("pair.bundle", path.read_bytes())},
        headers={"Prefer": "wait=100"},
        timeout=120,
    )
    assert answer.status_code == 201, answer.text
    return "several"


def sent(name: str, array: np.ndarray, *, binary: bool) -> triton.InferInput:
    given = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array, binary_data=binary)
    return given


@pytest.mark.parametrize("binary", [(True, True), (True, False), (False, True), (False, False)])
def test_inputs_and_outputs_go_by_name(
    client: triton.InferenceServerClient, several: str, binary: tuple[bool, bool]
) -> None:
    x, y = (each.numpy() for each in pair.rows(1, 5, 2))
    inputs = [sent("input_1", y, binary=binary[0]), sent("input_0", x, binary=binary[1])]
    names = ["output_2", "output_0", "output_1"]
    wishes = [
        triton.InferRequestedOutput(name, binary_data=way)
        for name, way in zip(names, (*binary, True), strict=True)
    ]
    result = client.infer(several, inputs, outputs=wishes)
    assert [each["name"] for each in result.get_response()["outputs"]] == names
    outputs = [np.array(result.as_numpy(f"output_{index}")) for index in range(3)]
    assert pair.is_answer(outputs, 1, 5, 2)
    assert not pair.is_answer(outputs, 1, 5, 3)  # the control


def test_types_are_declared_and_kept(client: triton.InferenceServerClient, several: str) -> None:
    metadata = client.get_model_metadata(several)
    kinds = [(each["datatype"], each["shape"]) for each in metadata["inputs"]]
    assert kinds == [("FP32", [-1, 2, 4, 4]), ("INT64", [-1])]
    assert [each["datatype"] for each in metadata["outputs"]] == ["FP32", "INT64", "BOOL"]
    x, y = (each.numpy() for each in pair.rows(1, 2))
    wrong = [
        ([sent("input_0", x, binary=True)], "the model takes"),
        ([sent("input_0", x, binary=True), sent("input_1", y.astype("i4"), binary=True)], "INT64"),
        ([sent("input_0", x, binary=True), sent("input_1", y[:1], binary=True)], "differ in rows"),
    ]
    for inputs, words in wrong:
        with pytest.raises(InferenceServerException, match=words) as caught:
            client.infer(several, inputs)
        assert caught.value.status() == "400"
