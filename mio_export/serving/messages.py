"""The protobuf messages of the Open Inference Protocol over gRPC, and the part of Triton's ``ModelConfig`` used here.

Names and numbers are those of Triton's ``grpc_service.proto`` and ``model_config.proto``; a test compares them with the
stock client's, which pins protobuf below what exporting needs and is therefore no dependency.
"""

import functools
from typing import Any

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
_ENUMS = {
    "DataType": {"TYPE_INVALID": 0, "TYPE_UINT8": 2, "TYPE_FP32": 11, "TYPE_STRING": 13},
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
}
_NAMED = "name=1:string version=2:string"
_TENSOR = "name=1:string datatype=2:string shape=3:*int64"
_CONTENTS = "parameters=4:*InferParameterEntry contents=5:InferTensorContents"
_ANSWERED = "model_name=1:string model_version=2:string id=3:string parameters=4:*InferParameterEntry"
# a map is on the wire and in text a repeated message of key and value, and is declared so
_ENTRY = "key=1:string value=2:"
_MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live=1:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready=1:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name=1:string version=2:string extensions=3:*string",
    "ModelReadyRequest": _NAMED,
    "ModelReadyResponse": "ready=1:bool",
    "ModelMetadataRequest": _NAMED,
    "ModelMetadataResponse": (
        "name=1:string versions=2:*string platform=3:string inputs=4:*TensorMetadata outputs=5:*TensorMetadata"
    ),
    "TensorMetadata": _TENSOR,
    "ModelConfigRequest": _NAMED,
    "ModelConfigResponse": "config=1:ModelConfig",
    "ModelInferRequest": (
        f"{_ANSWERED} inputs=5:*InferInputTensor outputs=6:*InferRequestedOutputTensor raw_input_contents=7:*bytes"
    ),
    "InferInputTensor": f"{_TENSOR} {_CONTENTS}",
    "InferRequestedOutputTensor": "name=1:string parameters=2:*InferParameterEntry",
    "ModelInferResponse": f"{_ANSWERED} outputs=5:*InferOutputTensor raw_output_contents=6:*bytes",
    "InferOutputTensor": f"{_TENSOR} {_CONTENTS}",
    "ModelStreamInferResponse": "error_message=1:string infer_response=2:ModelInferResponse",
    "InferParameterEntry": f"{_ENTRY}InferParameter",
    "InferParameter": "bool_param=1:bool int64_param=2:int64 string_param=3:string",
    "InferTensorContents": "uint_contents=4:*uint32 fp32_contents=6:*float bytes_contents=8:*bytes",
    "ModelConfig": (
        "name=1:string platform=2:string max_batch_size=4:int32 input=5:*ModelInput output=6:*ModelOutput"
        " instance_group=7:*ModelInstanceGroup default_model_filename=8:string dynamic_batching=11:ModelDynamicBatching"
        " optimization=12:ModelOptimizationPolicy parameters=14:*ParametersEntry ensemble_scheduling=15:ModelEnsembling"
        " model_warmup=16:*ModelWarmup backend=17:string"
    ),
    "ModelInput": "name=1:string data_type=2:DataType dims=4:*int64 optional=8:bool",
    "ModelOutput": "name=1:string data_type=2:DataType dims=3:*int64",
    "ModelInstanceGroup": "count=2:int32 kind=4:Kind",
    "ModelDynamicBatching": "max_queue_delay_microseconds=2:uint64",
    "ModelOptimizationPolicy": "graph=1:Graph execution_accelerators=4:ExecutionAccelerators",
    "Graph": "level=1:int32",
    "ExecutionAccelerators": "gpu_execution_accelerator=1:*Accelerator",
    "Accelerator": "name=1:string parameters=2:*StringEntry",
    "ModelParameter": "string_value=1:string",
    "ModelEnsembling": "step=1:*Step",
    "Step": "model_name=1:string model_version=2:int64 input_map=3:*StringEntry output_map=4:*StringEntry",
    "ModelWarmup": "name=1:string batch_size=2:uint32 inputs=3:*InputsEntry",
    "Input": "data_type=1:DataType dims=2:*int64 random_data=4:bool input_data_file=5:string",
    "ParametersEntry": f"{_ENTRY}ModelParameter",
    "InputsEntry": f"{_ENTRY}Input",
    "StringEntry": f"{_ENTRY}string",
}


def message(name: str, /, **fields: Any) -> Any:
    """Return a message; fields are numbers, strings, bytes, dictionaries and lists of them."""
    return message_class(name)(**fields)


def entries(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a map as its entries."""
    return [{"key": key, "value": value} for key, value in values.items()]


@functools.cache
def message_class(name: str) -> Any:
    """Return the class of the messages of a name in ``inference``."""
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{PACKAGE}.{name}"))


@functools.cache
def _pool() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="mio_export/inference.proto", package=PACKAGE, syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, code in values.items():
            enum.value.add(name=value, number=code)
    for name, fields in _MESSAGES.items():
        declared = file.message_type.add(name=name)
        for text in fields.split():
            label, _, kind = text.partition(":")
            field_name, _, number = label.partition("=")
            added = declared.field.add(name=field_name, number=int(number))
            added.label = field.LABEL_REPEATED if kind.startswith("*") else field.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            if kind in _ENUMS or kind in _MESSAGES:
                added.type = field.TYPE_ENUM if kind in _ENUMS else field.TYPE_MESSAGE
                added.type_name = f".{PACKAGE}.{kind}"
            else:
                added.type = field.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()  # its own, so that the stock client may be imported beside it
    pool.Add(file)
    return pool


__all__ = ["PACKAGE", "SERVICE", "entries", "message", "message_class"]
