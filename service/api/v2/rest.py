"""The protocol's HTTP bodies: a JSON object, and behind it the tensors sent in binary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from service.api.encoding import json_bytes
from service.api.v2 import datatypes
from service.api.v2.messages import (
    InferAnswer,
    InferRequest,
    InputTensor,
    OutputTensor,
    Wish,
    check_parameters,
    checked_shape,
    to_wish,
)
from service.errors import BadInput

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_REMEDY: Final = "Send an inference request as the Open Inference Protocol describes it."
_KINDS: Final = {"BOOL": "b", "FP16": "fiu", "FP32": "fiu", "FP64": "fiu"}  # the others: "iu"


def head_length(value: str | None, size: int) -> int:
    """How many bytes of a body of `size` are its JSON; `value` is the header, if there was one.

    Raises BadInput.
    """
    if value is None:
        return size
    if value.isascii() and value.isdigit() and len(value) < 16 and int(value) <= size:
        return int(value)
    raise BadInput(
        f"{HEADER_LENGTH} is {value[:40]!r}; the body has {size} bytes.",
        remedy="Give the length in bytes of the JSON at the body's beginning.",
    )


def parse(body: bytearray | bytes | memoryview, head: int) -> InferRequest:
    """The request in `body`, whose first `head` bytes are JSON; tensors are views of the rest.

    Raises BadInput.
    """
    view = memoryview(body)
    try:
        data = orjson.loads(view[:head])
    except orjson.JSONDecodeError as error:
        raise BadInput(f"The request's JSON cannot be read: {error}.", remedy=_REMEDY) from None
    if not isinstance(data, dict):
        raise _wrong("the request is no object")
    identity = data.get("id")
    if identity is not None and not isinstance(identity, str):
        raise _wrong("`id` is no string")
    given = _objects(data.get("inputs"), "inputs")
    if not given:
        raise _wrong("`inputs` is empty")
    inputs, rest = [], view[head:]
    for item in given:
        tensor, rest = _input(item, rest)
        inputs.append(tensor)
    if len(rest):
        raise BadInput(
            f"The body has {len(rest)} bytes more than its JSON and its inputs' "
            "`binary_data_size` account for."
        )
    parameters = _parameters(data, "the request")
    binary = parameters.get("binary_data_output") is True
    return InferRequest(
        inputs=tuple(inputs),
        wishes=tuple(_wish(item, binary) for item in _objects(data.get("outputs", []), "outputs")),
        id=identity,
        parameters=parameters,
    )


def _wrong(what: str) -> BadInput:
    return BadInput(f"The request is malformed: {what}.", remedy=_REMEDY)


def _objects(value: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _wrong(f"`{name}` is no list of objects")
    return value


def _parameters(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    value = item.get("parameters")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(f"`parameters` of {place} is no object")
    return check_parameters(place, value)


def _name(item: Mapping[str, Any]) -> str:
    name = item.get("name")
    if not isinstance(name, str):
        raise _wrong("a tensor has no `name`")
    return name


def _input(item: Mapping[str, Any], rest: memoryview) -> tuple[InputTensor, memoryview]:
    """One input, and what is left of the binary part behind it."""
    name = _name(item)
    shape = item.get("shape")
    if not isinstance(shape, list):
        raise _wrong(f"the input {name[:40]!r} has no `shape`")
    datatype = datatypes.known(item.get("datatype"))
    size = _parameters(item, f"the input {name[:40]!r}").get("binary_data_size")
    if (size is None) == ("data" not in item):
        raise _wrong(f"the input {name[:40]!r} needs either `data` or `binary_data_size`")
    if size is None:
        flat = _from_json(item["data"], datatype, name)
    else:
        flat, rest = _from_binary(size, datatype, name, rest)
    return InputTensor(name, datatype, checked_shape(name, shape), flat), rest


def _from_binary(
    size: object, datatype: str, name: str, rest: memoryview
) -> tuple[NDArray[Any], memoryview]:
    width = datatypes.NUMPY[datatype].itemsize
    if type(size) is not int or size < 0 or size % width:
        raise BadInput(f"The input {name[:40]!r}: {size!r} is no size in bytes of {datatype} data.")
    if size > len(rest):
        raise BadInput(
            f"The input {name[:40]!r} has a `binary_data_size` of {size} bytes; "
            f"{len(rest)} are left of the body.",
            remedy=f"Send the whole tensor behind the JSON, and {HEADER_LENGTH} with its length.",
        )
    return datatypes.from_bytes(rest[:size], datatype), rest[size:]


def _from_json(data: object, datatype: str, name: str) -> NDArray[Any]:
    """Numbers, flat or nested, as a flat array of `datatype`, where none is changed by that."""
    if datatype == "BF16":
        raise BadInput(f"The input {name[:40]!r}: BF16 has no JSON form; send it in binary.")
    if not isinstance(data, list):
        raise _wrong(f"`data` of the input {name[:40]!r} is no list")
    try:
        array = np.asarray(data).reshape(-1)
    except ValueError:
        raise _wrong(f"`data` of the input {name[:40]!r} is ragged") from None
    wanted = datatypes.NUMPY[datatype]
    if array.size and array.dtype.kind not in _KINDS.get(datatype, "iu"):
        raise _wrong(f"`data` of the input {name[:40]!r} holds something that is not {datatype}")
    try:
        with np.errstate(over="raise", invalid="raise"):
            typed = array.astype(wanted)
    except FloatingPointError:
        raise _wrong(f"`data` of the input {name[:40]!r} goes beyond {datatype}") from None
    if wanted.kind in "iu" and not np.array_equal(typed, array):
        raise _wrong(f"`data` of the input {name[:40]!r} goes beyond {datatype}")
    return typed


def _wish(item: Mapping[str, Any], binary: bool) -> Wish:
    name = _name(item)
    return to_wish(name, _parameters(item, f"the output {name[:40]!r}"), binary)


def encode(answer: InferAnswer) -> tuple[list[bytes | memoryview], int | None]:
    """The body in pieces, and the length of its JSON where tensors follow it in binary."""
    tensors: list[bytes | memoryview] = []
    outputs = []
    for output in answer.outputs:
        described: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": output.shape,
        }
        if output.binary:
            data = output.to_bytes()
            tensors.append(data)
            described["parameters"] = {"binary_data_size": len(data)}
        else:
            described["data"] = _plain(output)
        outputs.append(described)
    document: dict[str, Any] = {
        "model_name": answer.model,
        "model_version": str(answer.version),
    }
    if answer.id is not None:
        document["id"] = answer.id
    if answer.parameters:
        document["parameters"] = dict(answer.parameters)
    head = json_bytes(document | {"outputs": outputs})
    return [head, *tensors], len(head) if tensors else None


def _plain(output: OutputTensor) -> NDArray[Any] | list[str]:
    if isinstance(output.values, np.ndarray):
        return output.values.reshape(-1)
    return [text.decode() for row in output.values for text in row]
