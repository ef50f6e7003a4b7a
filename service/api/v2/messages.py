"""An inference request and its answer, as neither REST nor gRPC knows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.api.v2 import datatypes
from service.errors import BadInput
from service.serving import RowSpec

Parameter: TypeAlias = "bool | int | float | str"

# Parameters that say how to answer; the others are the caller's own and come back with the answer.
_OWN: Final = frozenset(
    {"binary_data_output", "form", "timing", "priority", "timeout"}
    | {"sequence_id", "sequence_start", "sequence_end"}
)
_MAX_RANK = 16


@dataclass(frozen=True)
class InputTensor:
    """One input as sent: `flat` holds the elements of `shape` in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    flat: NDArray[Any]


@dataclass(frozen=True)
class Wish:
    """An output that is wanted: as bytes behind the JSON, and as its best `classes` if not 0."""

    name: str
    binary: bool = False
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """What a client asks; no `wishes` means every output, in binary if `binary` says so."""

    inputs: tuple[InputTensor, ...]
    wishes: tuple[Wish, ...] = ()
    id: str | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def binary(self) -> bool:
        """Whether outputs go out as bytes behind the JSON where no wish says otherwise."""
        return self.parameters.get("binary_data_output") is True

    @property
    def timing(self) -> bool:
        """Whether the answer says how long the request waited and computed."""
        return self.parameters.get("timing") is True


@dataclass(frozen=True)
class OutputTensor:
    """One output to send: numbers [N, ...], or UTF-8 texts for a classification (BYTES)."""

    name: str
    values: NDArray[Any] | list[list[bytes]]
    binary: bool

    @property
    def datatype(self) -> str:
        """The protocol's name of the elements' type, such as `FP32`; BYTES for texts."""
        values = self.values
        return datatypes.of_array(values) if isinstance(values, np.ndarray) else "BYTES"

    @property
    def shape(self) -> list[int]:
        """All sizes, rows first; of texts [N, classes], which takes at least one row."""
        if isinstance(self.values, np.ndarray):
            return list(self.values.shape)
        return [len(self.values), len(self.values[0])]

    def to_bytes(self) -> bytes | memoryview:
        """Elements in the protocol's binary form; a text follows its length in four bytes."""
        if isinstance(self.values, np.ndarray):
            return self.values.reshape(-1).view(np.uint8).data
        texts = [text for row in self.values for text in row]
        return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


@dataclass(frozen=True)
class InferAnswer:
    """What the model answered, and the caller's `id` and own parameters."""

    model: str
    version: int
    outputs: tuple[OutputTensor, ...]
    id: str | None
    parameters: Mapping[str, Parameter]


def checked_version(text: str | None) -> int | None:
    """A version as the protocol has it, a string; nothing means the default. Raises BadInput."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise BadInput(f"{text[:40]!r} is no version.", remedy="Use a whole number from 1 on.")
    return int(text)


def checked_shape(name: str, shape: Sequence[object]) -> tuple[int, ...]:
    """A tensor's shape as sent, if it can be one. Raises BadInput."""
    if len(shape) > _MAX_RANK or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise BadInput(f"The input {name!r} has a `shape` that is no list of sizes.")
    return tuple(n for n in shape if isinstance(n, int))


def check_parameters(place: str, given: Mapping[str, object]) -> dict[str, Parameter]:
    """Parameters of one object of a request. Raises BadInput."""
    checked: dict[str, Parameter] = {}
    for name, value in given.items():
        if name.startswith("shared_memory"):
            raise BadInput(
                f"{place} asks for shared memory, which is not offered.",
                remedy="Send the tensor's bytes in the body.",
            )
        if not isinstance(value, bool | int | float | str):
            raise BadInput(f"{place}: the parameter {name[:40]!r} is neither number nor string.")
        checked[name] = value
    return checked


def to_wish(name: str, parameters: Mapping[str, Parameter], binary: bool) -> Wish:
    """An output that is asked for with these parameters; `binary` is what holds without a word.

    Raises BadInput.
    """
    classes = parameters.get("classification", 0)
    if type(classes) is not int or classes < 0:
        raise BadInput(f"`classification` of the output {name[:40]!r} is no count.")
    return Wish(name, parameters.get("binary_data", binary) is True, classes)


def to_rows(request: InferRequest, specs: Sequence[RowSpec]) -> dict[str, NDArray[Any]]:
    """The model's inputs by name, each [N, *spec.shape] in the type that the model takes.

    Raises BadInput for a missing, unknown or repeated input, a shape or type that does not fit,
    and data that does not fill its shape.
    """
    given = {tensor.name: tensor for tensor in request.inputs}
    known = {spec.name: spec for spec in specs}
    if len(given) != len(request.inputs) or given.keys() != known.keys():
        raise BadInput(
            f"The request has the inputs {[t.name[:40] for t in request.inputs[:16]]}; "
            f"the model takes {list(known)[:16]}.",
            remedy="Send every input of the model's metadata once, by its name.",
        )
    return {name: _to_rows(tensor, known[name]) for name, tensor in given.items()}


def _to_rows(tensor: InputTensor, spec: RowSpec) -> NDArray[Any]:
    shape = tensor.shape
    if len(shape) != 1 + len(spec.shape) or shape[1:] != spec.shape or shape[0] < 1:
        raise BadInput(
            f"The input {spec.name!r} has the shape {list(shape)}; the model takes "
            f"[{', '.join(['N', *map(str, spec.shape)])}] with N >= 1.",
            expected=["N", *spec.shape],
            got=list(shape),
        )
    if tensor.flat.size != math.prod(shape):
        raise BadInput(
            f"The input {spec.name!r} has {tensor.flat.size} elements; "
            f"its shape {list(shape)} has {math.prod(shape)}."
        )
    wanted = datatypes.of_torch(spec.dtype)
    return datatypes.convert(tensor.flat, tensor.datatype, wanted, spec.name).reshape(shape)


def to_answer(
    request: InferRequest,
    model: str,
    version: int,
    specs: Sequence[RowSpec],
    arrays: Sequence[NDArray[Any]],
    labels: Sequence[str] | None,
    timing: Mapping[str, Parameter] | None = None,
) -> InferAnswer:
    """The outputs that the request wants, in its order. Raises BadInput for one unknown."""
    named = {spec.name: array for spec, array in zip(specs, arrays, strict=True)}
    wishes = request.wishes or tuple(Wish(name, request.binary) for name in named)
    own = {name: value for name, value in request.parameters.items() if name not in _OWN}
    return InferAnswer(
        model=model,
        version=version,
        outputs=tuple(_wished(wish, named[wish.name], labels) for wish in wishes),
        id=request.id,
        parameters={**own, **(timing or {})},
    )


def check_wishes(request: InferRequest, specs: Sequence[RowSpec]) -> None:
    """Refuse, before anything is computed, outputs that the model does not have. BadInput."""
    known = {spec.name: spec for spec in specs}
    names = [wish.name for wish in request.wishes]
    wrong = [name for name in names if name not in known or names.count(name) > 1]
    if wrong:
        raise BadInput(
            f"The output {wrong[0][:40]!r} is unknown or asked for twice; "
            f"the model has {list(known)[:16]}.",
            remedy="Ask for outputs of the model's metadata, each once.",
        )
    for wish in request.wishes:
        if wish.classes and len(known[wish.name].shape) != 1:
            raise BadInput(
                f"The output {wish.name!r} is no list of class scores.",
                remedy="Ask for it without `classification`.",
            )


def _wished(wish: Wish, array: NDArray[Any], labels: Sequence[str] | None) -> OutputTensor:
    if wish.classes:
        return OutputTensor(wish.name, _classes(array, wish.classes, labels), wish.binary)
    return OutputTensor(wish.name, np.ascontiguousarray(array), wish.binary)


def _classes(scores: NDArray[Any], count: int, labels: Sequence[str] | None) -> list[list[bytes]]:
    """Per row of [N, classes] the `count` largest values, as `value:index` or with `:label`."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]

    def text(row: NDArray[Any], index: int) -> bytes:
        label = f":{labels[index]}" if labels else ""
        return f"{row[index]:f}:{index}{label}".encode()

    return [
        [text(row, int(index)) for index in of_row]
        for row, of_row in zip(scores, best, strict=True)
    ]
