"""The protocol over gRPC: each call takes the way of its REST route, in other bytes.

A call may do what the key's scopes allow for the route, and counts against the same rate. The key
comes in the metadata `authorization` (Bearer) or `x-api-key`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote

import grpc
import numpy as np
import structlog
from google.protobuf.json_format import ParseDict

from service.api import access, problems
from service.api.guard import admit
from service.api.inference import find_hosted
from service.api.ratelimit import RateLimit
from service.api.state import Service
from service.api.v2 import datatypes, models, repository
from service.api.v2.infer import infer
from service.api.v2.messages import (
    InferAnswer,
    InferRequest,
    InputTensor,
    Parameter,
    Wish,
    check_parameters,
    checked_shape,
    checked_version,
    to_wish,
)
from service.api.v2.schema import MESSAGES, SERVICE
from service.errors import BadInput, FoldserveError

log = structlog.get_logger("foldserve.grpc")

Call = Callable[[Service, Any], Awaitable[Any]]

_ENVELOPE_BYTES: Final = 1 << 20  # names and shapes around the tensors of the largest body
_CONTENTS: Final = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_STATUS: Final = {
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    HTTPStatus.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    HTTPStatus.INSUFFICIENT_STORAGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@dataclass(frozen=True)
class Method:
    """A call: what answers it, and the REST route whose scopes it needs."""

    call: Call
    method: str
    path: str


# ---- calls ------------------------------------------------------------------------------------


async def _live(service: Service, request: Any) -> Any:
    return MESSAGES["ServerLiveResponse"](live=True)


async def _ready(service: Service, request: Any) -> Any:
    return MESSAGES["ServerReadyResponse"](ready=await models.server_ready(service))


async def _model_ready(service: Service, request: Any) -> Any:
    ready = models.model_ready(service, request.name, checked_version(request.version))
    return MESSAGES["ModelReadyResponse"](ready=ready)


async def _server_metadata(service: Service, request: Any) -> Any:
    return ParseDict(models.server_metadata(), MESSAGES["ServerMetadataResponse"]())


async def _model_metadata(service: Service, request: Any) -> Any:
    version = checked_version(request.version)
    found = await models.model_metadata(service, request.name, version)
    return ParseDict(found, MESSAGES["ModelMetadataResponse"]())


async def _model_config(service: Service, request: Any) -> Any:
    version = checked_version(request.version)
    found = await models.model_configuration(service, request.name, version)
    return ParseDict({"config": found}, MESSAGES["ModelConfigResponse"]())


async def _statistics(service: Service, request: Any) -> Any:
    version = checked_version(request.version)
    found = await models.statistics(service, request.name or None, version)
    return ParseDict(found, MESSAGES["ModelStatisticsResponse"]())


async def _index(service: Service, request: Any) -> Any:
    found = await repository.index(service, ready_only=request.ready)
    return ParseDict({"models": found}, MESSAGES["RepositoryIndexResponse"]())


async def _load(service: Service, request: Any) -> Any:
    await repository.load(service, request.model_name, request.parameters)
    return MESSAGES["RepositoryModelLoadResponse"]()


async def _unload(service: Service, request: Any) -> Any:
    await repository.unload(service, request.model_name)
    return MESSAGES["RepositoryModelUnloadResponse"]()


async def _infer(service: Service, request: Any) -> Any:
    version = checked_version(request.model_version)
    on = await find_hosted(service, request.model_name, version)
    return encode(await infer(service, on, version, parse(request)))


UNARY: Final = {
    "ServerLive": Method(_live, "GET", "/v2/health/live"),
    "ServerReady": Method(_ready, "GET", "/v2/health/ready"),
    "ModelReady": Method(_model_ready, "GET", "/v2/models/{name}/ready"),
    "ServerMetadata": Method(_server_metadata, "GET", "/v2"),
    "ModelMetadata": Method(_model_metadata, "GET", "/v2/models/{name}"),
    "ModelConfig": Method(_model_config, "GET", "/v2/models/{name}/config"),
    "ModelStatistics": Method(_statistics, "GET", "/v2/models/{name}/stats"),
    "ModelInfer": Method(_infer, "POST", "/v2/models/{name}/infer"),
    "RepositoryIndex": Method(_index, "POST", "/v2/repository/index"),
    "RepositoryModelLoad": Method(_load, "POST", "/v2/repository/models/{name}/load"),
    "RepositoryModelUnload": Method(_unload, "POST", "/v2/repository/models/{name}/unload"),
}
STREAM: Final = "ModelStreamInfer"


# ---- messages ---------------------------------------------------------------------------------


def parse(message: Any) -> InferRequest:
    """The request in a ModelInferRequest; tensors are views of its bytes. Raises BadInput."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise BadInput(
            f"The request has {len(message.inputs)} inputs and {len(raw)} raw contents.",
            remedy="Send all inputs raw, in their order, or none.",
        )
    return InferRequest(
        inputs=tuple(
            _input(item, raw[index] if raw else None) for index, item in enumerate(message.inputs)
        ),
        wishes=tuple(_wish(item) for item in message.outputs),
        id=message.id or None,
        parameters=_parameters(message.parameters, "the request"),
    )


def _input(item: Any, raw: bytes | None) -> InputTensor:
    datatype = datatypes.known(item.datatype)
    _parameters(item.parameters, f"the input {item.name[:40]!r}")
    dtype = datatypes.NUMPY[datatype]
    if raw is not None:
        if len(raw) % dtype.itemsize:
            raise BadInput(f"{len(raw)} is no size in bytes of {datatype} data.")
        flat = datatypes.from_bytes(raw, datatype)
    elif datatype not in _CONTENTS:
        raise BadInput(f"The input {item.name[:40]!r}: {datatype} is taken in raw contents alone.")
    else:
        try:
            flat = np.array(getattr(item.contents, _CONTENTS[datatype]), dtype=dtype)
        except OverflowError:
            raise BadInput(f"The input {item.name[:40]!r} goes beyond {datatype}.") from None
    return InputTensor(item.name, datatype, checked_shape(item.name, list(item.shape)), flat)


def _wish(item: Any) -> Wish:
    return to_wish(item.name, _parameters(item.parameters, f"the output {item.name[:40]!r}"), True)


def _parameters(given: Any, place: str) -> dict[str, Parameter]:
    values = {}
    for name, parameter in given.items():
        choice = parameter.WhichOneof("parameter_choice")
        values[name] = None if choice is None else getattr(parameter, choice)
    return check_parameters(place, values)


def encode(answer: InferAnswer) -> Any:
    """A ModelInferResponse with raw contents."""
    message = MESSAGES["ModelInferResponse"](
        model_name=answer.model, model_version=str(answer.version), id=answer.id or ""
    )
    for name, value in answer.parameters.items():
        kinds = {bool: "bool_param", int: "int64_param", float: "double_param"}
        setattr(message.parameters[name], kinds.get(type(value), "string_param"), value)
    for output in answer.outputs:
        message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        message.raw_output_contents.append(bytes(output.to_bytes()))
    return message


# ---- the server -------------------------------------------------------------------------------


class Calls:
    """Lets calls in, and turns errors into statuses."""

    def __init__(self, service: Service, rate: RateLimit | None) -> None:
        self._service, self._rate = service, rate

    def unary(self, name: str) -> Any:
        """The handler of one call."""
        method = UNARY[name]

        async def handle(request: Any, context: Any) -> Any:
            try:
                self._admit(method, context)
                return await method.call(self._service, request)
            except FoldserveError as error:
                await context.abort(*_refusal(error))
            except Exception:
                log.exception("unexpected error", call=name)
                await context.abort(*_UNEXPECTED)

        return grpc.unary_unary_rpc_method_handler(
            handle,
            request_deserializer=MESSAGES[f"{name}Request"].FromString,
            response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
        )

    def stream(self) -> Any:
        """The handler of a stream of inferences, answered one by one in their order."""
        method = UNARY["ModelInfer"]

        async def handle(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            answer = MESSAGES["ModelStreamInferResponse"]
            async for request in requests:
                try:
                    self._admit(method, context)
                    yield answer(infer_response=await method.call(self._service, request))
                except FoldserveError as error:
                    _, text = _refusal(error)
                    yield answer(error_message=text, infer_response=_named(request))
                except Exception:
                    log.exception("unexpected error", call=STREAM)
                    yield answer(error_message=_UNEXPECTED[1], infer_response=_named(request))

        return grpc.stream_stream_rpc_method_handler(
            handle,
            request_deserializer=MESSAGES["ModelInferRequest"].FromString,
            response_serializer=MESSAGES["ModelStreamInferResponse"].SerializeToString,
        )

    def _admit(self, method: Method, context: Any) -> None:
        """Raises what a request to the call's route would be refused with."""
        service, wanted = self._service, access.needed(method.method, method.path)
        head = {
            name.encode(): value.encode() if isinstance(value, str) else value
            for name, value in context.invocation_metadata() or ()
        }
        keyring = service.keyring if service.settings.keys_required else None
        what = f"{method.method} {method.path}"
        admit(head, wanted, what, _host_of(context.peer()), keyring, self._rate)


def _host_of(peer: str) -> str:
    """The address in what gRPC says of a peer: `ipv4:127.0.0.1:5001`, `ipv6:[::1]:5001`."""
    return unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]")


_UNEXPECTED: Final = (grpc.StatusCode.INTERNAL, "An unexpected error was logged.")


def _named(request: Any) -> Any:
    return MESSAGES["ModelInferResponse"](model_name=request.model_name, id=request.id)


def _refusal(error: FoldserveError) -> tuple[Any, str]:
    status = problems.status_of(type(error))
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("call failed", code=error.code(), detail=error.detail)
    fallback = (
        grpc.StatusCode.INTERNAL
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR
        else grpc.StatusCode.INVALID_ARGUMENT
    )
    return _STATUS.get(status, fallback), f"{error.detail} {error.remedy}"


async def start(service: Service, rate: RateLimit | None) -> Any:
    """A gRPC server for `service` on its `grpc_port`, started on the running loop.

    Its `stop(grace)` ends it. Raises RuntimeError when the port cannot be had.
    """
    settings = service.settings
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_body_bytes + _ENVELOPE_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=settings.max_connections,
    )
    calls = Calls(service, rate)
    handlers = {name: calls.unary(name) for name in UNARY} | {STREAM: calls.stream()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    port = server.add_insecure_port(f"{host}:{settings.grpc_port}")
    await server.start()
    log.info("grpc ready", address=f"{host}:{port}")
    return server
