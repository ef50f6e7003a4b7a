"""The protocol's gRPC messages, made at run time from their public definition.

A table in place of generated code: nothing has to be compiled, and the classes live in a pool of
their own, so that a client's generated classes of the same names can be imported beside them. On
the wire only numbers and types count, which are those of the definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE: Final = "inference.GRPCInferenceService"
_PACKAGE: Final = "inference"

# A message, then its fields: name, number, how many (one, many, map from strings, any: the one of
# several that is set), and type.
_TABLE: Final = """
ServerLiveRequest
ServerLiveResponse
    live 1 one bool
ServerReadyRequest
ServerReadyResponse
    ready 1 one bool
ModelReadyRequest
    name 1 one string
    version 2 one string
ModelReadyResponse
    ready 1 one bool
ServerMetadataRequest
ServerMetadataResponse
    name 1 one string
    version 2 one string
    extensions 3 many string
ModelMetadataRequest
    name 1 one string
    version 2 one string
TensorMetadata
    name 1 one string
    datatype 2 one string
    shape 3 many int64
ModelMetadataResponse
    name 1 one string
    versions 2 many string
    platform 3 one string
    inputs 4 many TensorMetadata
    outputs 5 many TensorMetadata
InferParameter
    bool_param 1 any bool
    int64_param 2 any int64
    string_param 3 any string
    double_param 4 any double
    uint64_param 5 any uint64
InferTensorContents
    bool_contents 1 many bool
    int_contents 2 many int32
    int64_contents 3 many int64
    uint_contents 4 many uint32
    uint64_contents 5 many uint64
    fp32_contents 6 many float
    fp64_contents 7 many double
    bytes_contents 8 many bytes
InferInputTensor
    name 1 one string
    datatype 2 one string
    shape 3 many int64
    parameters 4 map InferParameter
    contents 5 one InferTensorContents
InferRequestedOutputTensor
    name 1 one string
    parameters 2 map InferParameter
ModelInferRequest
    model_name 1 one string
    model_version 2 one string
    id 3 one string
    parameters 4 map InferParameter
    inputs 5 many InferInputTensor
    outputs 6 many InferRequestedOutputTensor
    raw_input_contents 7 many bytes
InferOutputTensor
    name 1 one string
    datatype 2 one string
    shape 3 many int64
    parameters 4 map InferParameter
    contents 5 one InferTensorContents
ModelInferResponse
    model_name 1 one string
    model_version 2 one string
    id 3 one string
    parameters 4 map InferParameter
    outputs 5 many InferOutputTensor
    raw_output_contents 6 many bytes
ModelStreamInferResponse
    error_message 1 one string
    infer_response 2 one ModelInferResponse
ModelStatisticsRequest
    name 1 one string
    version 2 one string
StatisticDuration
    count 1 one uint64
    ns 2 one uint64
InferStatistics
    success 1 one StatisticDuration
    fail 2 one StatisticDuration
    queue 3 one StatisticDuration
    compute_input 4 one StatisticDuration
    compute_infer 5 one StatisticDuration
    compute_output 6 one StatisticDuration
InferBatchStatistics
    batch_size 1 one uint64
    compute_input 2 one StatisticDuration
    compute_infer 3 one StatisticDuration
    compute_output 4 one StatisticDuration
ModelStatistics
    name 1 one string
    version 2 one string
    last_inference 3 one uint64
    inference_count 4 one uint64
    execution_count 5 one uint64
    inference_stats 6 one InferStatistics
    batch_stats 7 many InferBatchStatistics
ModelStatisticsResponse
    model_stats 1 many ModelStatistics
ModelInput
    name 1 one string
    data_type 2 one DataType
    dims 4 many int64
ModelOutput
    name 1 one string
    data_type 2 one DataType
    dims 3 many int64
ModelDynamicBatching
ModelConfig
    name 1 one string
    platform 2 one string
    max_batch_size 4 one int32
    input 5 many ModelInput
    output 6 many ModelOutput
    dynamic_batching 11 one ModelDynamicBatching
    backend 17 one string
ModelConfigRequest
    name 1 one string
    version 2 one string
ModelConfigResponse
    config 1 one ModelConfig
ModelRepositoryParameter
    bool_param 1 any bool
    int64_param 2 any int64
    string_param 3 any string
    bytes_param 4 any bytes
RepositoryIndexRequest
    repository_name 1 one string
    ready 2 one bool
ModelIndex
    name 1 one string
    version 2 one string
    state 3 one string
    reason 4 one string
RepositoryIndexResponse
    models 1 many ModelIndex
RepositoryModelLoadRequest
    repository_name 1 one string
    model_name 2 one string
    parameters 3 map ModelRepositoryParameter
RepositoryModelLoadResponse
RepositoryModelUnloadRequest
    repository_name 1 one string
    model_name 2 one string
    parameters 3 map ModelRepositoryParameter
RepositoryModelUnloadResponse
"""


_DATA_TYPES: Final = (
    "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16"
)
"""The values of the definition's one enumeration, DataType, from 0 on."""


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="open_inference.proto", package=_PACKAGE, syntax="proto3"
    )
    for line in _TABLE.strip().splitlines():
        if not line.startswith(" "):
            file.message_type.add(name=line)
        else:
            _add_field(file.message_type[-1], *line.split())
    enumeration = file.enum_type.add(name="DataType")
    for number, name in enumerate(_DATA_TYPES.split()):
        enumeration.value.add(name=f"TYPE_{name}", number=number)
    return file


def _add_field(message: Any, name: str, number: str, many: str, kind: str) -> None:
    field = message.field.add(name=name, number=int(number))
    field.label = field.LABEL_OPTIONAL if many in ("one", "any") else field.LABEL_REPEATED
    if many == "map":
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, "key", "1", "one", "string")
        _add_field(entry, "value", "2", "one", kind)
        field.type = field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{message.name}.{entry.name}"
        return
    if many == "any":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if kind[0].isupper():
        field.type = field.TYPE_ENUM if kind == "DataType" else field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")


def _classes() -> Mapping[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    file = pool.AddSerializedFile(_file().SerializeToString())
    return {
        name: message_factory.GetMessageClass(message)
        for name, message in file.message_types_by_name.items()
    }


MESSAGES: Final[Mapping[str, Any]] = _classes()
"""The message classes by name."""
