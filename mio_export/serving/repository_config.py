"""The part of Triton's ``ModelConfig`` that repositories here use, as protobuf messages, read and written as text.

Names and numbers are those of ``model_config.proto``; ``tests/serving/test_repository.py`` compares them with the
stock client's. That client itself pins protobuf and ml-dtypes below what exporting needs, so it is no dependency.
"""

import functools
from typing import Any

PACKAGE = "inference"
_ENUMS = {
    "DataType": {"TYPE_INVALID": 0, "TYPE_UINT8": 2, "TYPE_FP32": 11, "TYPE_STRING": 13},
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
}
# a map is on the wire and in text a repeated message of key and value, and is declared so
_ENTRY = "key=1:string value=2:"
_MESSAGES = {
    "ModelConfig": (
        "name=1:string platform=2:string max_batch_size=4:int32 input=5:*ModelInput output=6:*ModelOutput"
        " instance_group=7:*ModelInstanceGroup default_model_filename=8:string dynamic_batching=11:ModelDynamicBatching"
        " optimization=12:ModelOptimizationPolicy parameters=14:*ParametersEntry ensemble_scheduling=15:ModelEnsembling"
        " model_warmup=16:*ModelWarmup backend=17:string"
    ),
    "ModelInput": "name=1:string data_type=2:DataType dims=4:*int64",
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


def model_config(**fields: Any) -> Any:
    """Return a ``ModelConfig`` message; fields are numbers, strings, dictionaries and lists of them."""
    return _message_class()(**fields)


def entries(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a map as its entries."""
    return [{"key": key, "value": value} for key, value in values.items()]


def data_type(tensor: Any) -> str:
    """Return the name of a declared input's or output's type, such as ``TYPE_UINT8``."""
    return str(tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name)


def to_text(config: Any) -> str:
    """Return the text of a ``config.pbtxt``."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def from_text(text: str) -> Any:
    """Read a ``config.pbtxt`` of those fields.

    Raises:
        ValueError: it is not such text, or has another field.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, _message_class()())
    except text_format.ParseError as error:
        raise ValueError(" ".join(str(error).split())) from None


@functools.cache
def _message_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="mio_export/model_config.proto", package=PACKAGE, syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, code in values.items():
            enum.value.add(name=value, number=code)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for declared in fields.split():
            label, _, kind = declared.partition(":")
            field_name, _, number = label.partition("=")
            added = message.field.add(name=field_name, number=int(number))
            added.label = field.LABEL_REPEATED if kind.startswith("*") else field.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            if kind in _ENUMS or kind in _MESSAGES:
                added.type = field.TYPE_ENUM if kind in _ENUMS else field.TYPE_MESSAGE
                added.type_name = f".{PACKAGE}.{kind}"
            else:
                added.type = field.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()  # its own, so that the stock client may be imported beside it
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.ModelConfig"))


__all__ = ["data_type", "entries", "from_text", "model_config", "to_text"]
