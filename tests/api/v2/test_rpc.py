"""The protocol over gRPC through its reference client, on a service that asks for keys."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient import grpc as triton
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from service.api import server
from service.api.v2 import rpc
from service.api.v2.schema import MESSAGES
from tests.api import tiny
from tests.api.conftest import put_tiny
from tests.api.v2.test_infer import is_right
from tests.running import RunningServer

Keyed = dict[str, httpx.Client]
Guarded = tuple[RunningServer, dict[str, str]]
MODEL = "called"


def given(array: NDArray[Any], name: str = "input_0") -> triton.InferInput:
    sent = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    sent.set_data_from_numpy(array)
    return sent


@pytest.fixture(scope="module")
def address(guarded: Guarded) -> str:
    (line,) = [line for line in guarded[0].log() if line["event"] == "grpc ready"]
    return line["address"]


@pytest.fixture(scope="module")
def headers(guarded: Guarded) -> dict[str, dict[str, str]]:
    """Metadata with each key."""
    return {name: {"authorization": f"Bearer {key}"} for name, key in guarded[1].items()}


@pytest.fixture
def model(keyed: Keyed) -> str:
    """The name of the model, uploaded by the first who wants it."""
    if keyed["reader"].get(f"/v1/models/{MODEL}").status_code == 404:
        put_tiny(keyed["admin"], MODEL)
    return MODEL


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as client:
        yield client


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_inference(
    client: triton.InferenceServerClient, model: str, headers: Any, dtype: Any
) -> None:
    rows = tiny.rows(3).astype(dtype)
    answer = client.infer(
        model,
        [given(rows)],
        request_id="no. 7",
        parameters={"timing": True, "mine": "kept"},
        headers=headers["caller"],
    )
    found, wide = answer.as_numpy("output_0"), rows.astype(np.float32)
    assert is_right(found, wide)
    assert not is_right(found, wide, seed=1)  # the control
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == (model, "1", "no. 7")
    assert response.parameters["mine"].string_param == "kept"
    assert response.parameters["batch_rows"].int64_param == 3
    assert response.parameters["compute_ms"].double_param > 0


def test_typed_contents_classes_and_compression(
    address: str, client: triton.InferenceServerClient, model: str, headers: Any
) -> None:
    rows = tiny.rows(2)
    request = MESSAGES["ModelInferRequest"](model_name=model, model_version="1")
    sent = request.inputs.add(name="input_0", datatype="FP32", shape=rows.shape)
    sent.contents.fp32_contents.extend(rows.reshape(-1))
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )
        answer = infer(request, metadata=tuple(headers["caller"].items()))
    found = np.frombuffer(answer.raw_output_contents[0], np.float32)
    assert is_right(found.reshape(answer.outputs[0].shape), rows)

    wish = triton.InferRequestedOutput("output_0", class_count=1)
    result = client.infer(
        model,
        [given(rows)],
        outputs=[wish],
        headers=headers["caller"],
        compression_algorithm="gzip",
    )
    for (text,), truth in zip(result.as_numpy("output_0"), tiny.expected(rows), strict=True):
        _, index, label = text.decode().split(":")
        assert (int(index), label) == (truth.argmax(), tiny.CONFIG["labels"][truth.argmax()])


def test_a_stream_answers_in_order_and_goes_on_after_an_error(
    client: triton.InferenceServerClient, model: str, headers: Any
) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(
        lambda result, error: answers.put((result, error)), headers=headers["caller"]
    )
    batches = [tiny.rows(count, count) for count in (1, 2, 3)]
    client.async_stream_infer(model, [given(batches[0])])
    client.async_stream_infer("nobody", [given(batches[0])])
    for rows in batches[1:]:
        client.async_stream_infer(model, [given(rows)])
    found = [answers.get(timeout=60) for _ in range(4)]
    client.stop_stream()
    assert "no model 'nobody'" in str(found.pop(1)[1])
    for rows, (result, error) in zip(batches, found, strict=True):
        assert error is None
        assert is_right(result.as_numpy("output_0"), rows)


def test_metadata_and_repository(
    client: triton.InferenceServerClient, model: str, headers: Any
) -> None:
    reads = {"headers": headers["caller"]}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata(**reads).name == "foldserve"
    metadata = client.get_model_metadata(model, **reads)
    assert list(metadata.inputs[0].shape) == [-1, *tiny.SHAPE]
    assert (metadata.outputs[0].name, metadata.outputs[0].datatype) == ("output_0", "FP32")
    (stats,) = client.get_inference_statistics(model, **reads).model_stats
    assert (stats.name, stats.version) == (model, "1")
    config = client.get_model_config(model, **reads).config
    assert (config.name, config.platform, config.backend) == (model, "foldserve", "foldserve")
    assert config.max_batch_size >= 1
    assert config.HasField("dynamic_batching")
    assert (config.input[0].name, list(config.input[0].dims)) == ("input_0", list(tiny.SHAPE))
    assert (config.output[0].name, list(config.output[0].dims)) == ("output_0", [tiny.CLASSES])
    (kind,) = {config.input[0].data_type, config.output[0].data_type}
    values = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    assert values[kind].name == "TYPE_FP32"

    admin = {"headers": headers["admin"]}
    client.unload_model(model, **admin)
    assert not client.is_model_ready(model, **reads)
    (entry,) = [e for e in client.get_model_repository_index(**reads).models if e.name == model]
    assert (entry.version, entry.state, entry.reason) == ("1", "UNAVAILABLE", "unloaded")
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [given(tiny.rows(1))], **reads)
    assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"
    client.load_model(model, **admin)
    assert client.is_model_ready(model, **reads)


@pytest.mark.parametrize(
    ("model_name", "version", "sent", "status", "words"),
    [
        ("nobody", "", given(tiny.rows(1)), "NOT_FOUND", "no model 'nobody'"),
        (MODEL, "9", given(tiny.rows(1)), "NOT_FOUND", "no version 9"),
        (MODEL, "one", given(tiny.rows(1)), "INVALID_ARGUMENT", "'one' is no version"),
        (MODEL, "", given(tiny.rows(1), "x"), "INVALID_ARGUMENT", "takes ['input_0']"),
        (
            MODEL,
            "",
            given(np.zeros((1, 3), np.float32)),
            "INVALID_ARGUMENT",
            "takes [N, 3, 16, 16]",
        ),
        (MODEL, "", given(tiny.rows(1).astype(np.int8)), "INVALID_ARGUMENT", "takes FP32"),
    ],
)
def test_wrong_requests(
    client: triton.InferenceServerClient,
    model: str,
    headers: Any,
    model_name: str,
    version: str,
    sent: Any,
    status: str,
    words: str,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model_name, [sent], model_version=version, headers=headers["caller"])
    assert caught.value.status() == f"StatusCode.{status}"
    assert words in caught.value.message()


def test_contents_that_lie(address: str, model: str, headers: Any) -> None:
    """Raw bytes of another length, more of them than inputs, and what has no typed contents."""
    shape = (1, *tiny.SHAPE)
    wrong = []
    for raw in ([b"123"], [bytes(8)], [bytes(3072), bytes(4)]):
        request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=raw)
        request.inputs.add(name="input_0", datatype="FP32", shape=shape)
        wrong.append(request)
    for datatype, extents in (("FP16", shape), ("BYTES", shape), ("FP32", (-1,)), ("FP32", shape)):
        request = service_pb2.ModelInferRequest(model_name=model)
        request.inputs.add(name="input_0", datatype=datatype, shape=extents)
        wrong.append(request)
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )
        for request in wrong:
            with pytest.raises(grpc.RpcError) as caught:
                infer(request, metadata=tuple(headers["caller"].items()))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, request


def test_a_bomb_is_refused_and_the_server_goes_on(
    client: triton.InferenceServerClient, model: str, headers: Any
) -> None:
    bomb = np.zeros((10_000, *tiny.SHAPE), np.float32)  # 30 MB, compressed to 30 KB
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [given(bomb)], headers=headers["caller"], compression_algorithm="gzip")
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    rows = tiny.rows(1)
    answer = client.infer(model, [given(rows)], headers=headers["caller"])
    assert is_right(answer.as_numpy("output_0"), rows)


def test_keys_open_what_they_open_over_http(
    client: triton.InferenceServerClient, model: str, headers: Any
) -> None:
    sent = [given(tiny.rows(1))]
    refusals = [
        (None, "UNAUTHENTICATED"),
        ({"authorization": "Bearer fsk_aaaaaaaaaa_wrong"}, "UNAUTHENTICATED"),
        (headers["reader"], "PERMISSION_DENIED"),
    ]
    for metadata, status in refusals:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(model, sent, headers=metadata)
        assert caught.value.status() == f"StatusCode.{status}"
    with pytest.raises(InferenceServerException) as caught:
        client.unload_model(model, headers=headers["caller"])
    assert caught.value.status() == "StatusCode.PERMISSION_DENIED"


def test_the_table_is_the_public_definition() -> None:
    """Numbers, types and repetition of every field, against the reference client's own classes."""
    theirs = {
        each.name: each
        for definition in (service_pb2, model_config_pb2)
        for each in definition.DESCRIPTOR.message_types_by_name.values()
    }
    for each in list(theirs.values()):
        theirs |= {nested.name: nested for nested in each.nested_types}
    for name, message in MESSAGES.items():
        for field in message.DESCRIPTOR.fields:
            other = theirs[name].fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (
                other.number,
                other.type,
                other.is_repeated,
            ), (name, field.name)
            if field.enum_type is not None:
                numbers = other.enum_type.values_by_name
                assert {v.name: v.number for v in field.enum_type.values} == {
                    name: value.number for name, value in numbers.items()
                }
    wire = MESSAGES["ModelInferRequest"](model_name="m", raw_input_contents=[b"1"])
    wire.parameters["a"].int64_param = 3
    read = service_pb2.ModelInferRequest.FromString(wire.SerializeToString())
    assert (read.model_name, read.parameters["a"].int64_param) == ("m", 3)


def test_a_start_without_the_extra_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server._has_grpc()
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert not server._has_grpc()


def test_a_peer_is_counted_by_its_address() -> None:
    assert rpc._host_of("ipv4:127.0.0.1:5001") == "127.0.0.1"
    assert rpc._host_of("ipv6:%5B::1%5D:5001") == "::1"
    assert rpc._host_of("unix:") == ""
