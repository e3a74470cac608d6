"""Whether a repository that was written agrees with its graphs, and its models with each other."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mio_export.errors import MioError
from mio_export.files import sha256_file
from mio_export.preprocess import Preprocess
from mio_export.serving.repository_config import data_type, from_text
from mio_export.serving.repository_models import ENGINE_SOURCE
from mio_export.sidecar import read_sidecar

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Data type and shape without the batch, by name."""
Signature = tuple[Tensors, Tensors, int | None]
"""Inputs, outputs, and the largest batch if there is one."""

_ELEMENT_TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8"}  # of onnx.TensorProto


def check_repository(folder: Path) -> list[str]:
    """Read every ``config.pbtxt`` again and compare it with the graph beside it; return a line for each problem.

    Compared are names, types and shapes of inputs and outputs, the free batch dimension, the file's sha256 with the
    one that the parameters name, and what flows from one step of the ensemble to the next.
    """
    configs, problems = {}, []
    for model in sorted(path for path in (folder / "models").iterdir() if path.is_dir()):
        try:
            configs[model.name] = from_text((model / "config.pbtxt").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"{model.name}/config.pbtxt: {error}")
    for name, config in configs.items():
        found = (
            _ensemble_problems(config, configs) if config.platform == "ensemble" else _model_problems(folder, config)
        )
        common = (
            (config.name == name, f"its name is {config.name!r}"),
            (config.max_batch_size >= 1, "max_batch_size is not set; Triton would take 4"),
            ((folder / "models" / name / "1").is_dir(), "there is no version folder 1"),
        )
        problems += [f"{name}: {problem}" for problem in [*(text for holds, text in common if not holds), *found]]
    if not any(config.platform == "ensemble" for config in configs.values()):
        problems.append("there is no ensemble")
    return problems


def _model_problems(folder: Path, config: Any) -> list[str]:
    version, name = folder / "models" / config.name / "1", config.default_model_filename
    file = _computed_with(folder, version, name)
    for needed in (file, *(() if file == folder / ENGINE_SOURCE else (version / name,))):
        if not needed.is_file():
            return [f"{needed.relative_to(folder)} is missing"]
    is_artifact = file.suffix != ".json"
    if is_artifact and sha256_file(file) != _parameters(config).get("artifact_sha256"):
        return [f"{file.name} is not the artifact that artifact_sha256 names"]
    try:
        inputs, outputs, largest = _SIGNATURES[file.suffix](file, config)
    except (MioError, ValueError, KeyError, TypeError) as error:
        return [f"{file.name} cannot be read: {' '.join(str(error).split())[:300]}"]
    declared = (("input", _tensors(config.input), inputs), ("output", _tensors(config.output), outputs))
    problems = [
        f"{kind} {_shown(ours)} in config.pbtxt, {_shown(graph)} in {file.name}"
        for kind, ours, graph in declared
        if ours != graph
    ]
    if largest is not None and config.max_batch_size > largest:
        problems.append(f"max_batch_size is {config.max_batch_size}, {file.name} takes {largest}")
    return problems


def _computed_with(folder: Path, version: Path, name: str) -> Path:
    """Return the file that says what a model takes and gives."""
    if (contract := version / "preprocess.json").is_file():
        return contract
    if name == "model.plan" and not (version / name).is_file():
        return folder / ENGINE_SOURCE  # the engine is built of it on the target
    return version / ("model.onnx" if name == "model.py" else name)


def _contract(path: Path, config: Any) -> Signature:
    del config
    values = json.loads(path.read_text(encoding="utf-8"))
    preprocess = Preprocess(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
    return {"files": ("TYPE_STRING", (1,))}, {"images": ("TYPE_UINT8", preprocess.shape)}, None


def _onnx(path: Path, config: Any) -> Signature:
    import onnx

    del config
    graph = onnx.load(path, load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    inputs = {value.name: _onnx_tensor(value) for value in graph.input if value.name not in weights}
    return inputs, {value.name: _onnx_tensor(value) for value in graph.output}, None


def _onnx_tensor(value: Any) -> tuple[str, tuple[int, ...]]:
    batch, *dims = value.type.tensor_type.shape.dim
    if batch.HasField("dim_value"):
        raise MioError(f"the batch of {value.name} is fixed at {batch.dim_value}")
    kind = value.type.tensor_type.elem_type
    return _ELEMENT_TYPES.get(kind, f"ONNX type {kind}"), tuple(dim.dim_value for dim in dims)


def _torchscript(path: Path, config: Any) -> Signature:
    """Run it once: TorchScript keeps neither shapes nor the names that Triton counts."""
    import numpy as np

    from mio_export.runtimes.registry import open_file

    shape, width = tuple(config.input[0].dims), config.output[0].dims[0]
    with open_file("torchscript", path, image_shape=shape, embedding_dim=width) as runtime:
        found = runtime.embed(np.zeros((2, *shape), np.uint8))
    kind = "TYPE_FP32" if found.dtype == np.float32 else str(found.dtype)
    return {"INPUT__0": ("TYPE_UINT8", shape)}, {"OUTPUT__0": (kind, found.shape[1:])}, None


def _engine(path: Path, config: Any) -> Signature:
    """Believe the sidecar: the engine itself opens on its own GPU only."""
    del config
    sidecar = read_sidecar(path)
    if sidecar.library != "tensorrt":
        raise MioError(f"model.plan is an engine of {sidecar.library}, which Triton cannot load")
    if sidecar.engine_sha256 != sha256_file(path):
        raise MioError("model.plan is not the engine that its sidecar describes")
    contract, encoder = sidecar.provenance["preprocess"], sidecar.provenance["encoder"]
    shape = (contract["image_size"], contract["image_size"], contract["channels"])
    outputs: Tensors = {"embeddings": ("TYPE_FP32", (encoder["embedding_dim"],))}
    return {"images": ("TYPE_UINT8", shape)}, outputs, sidecar.profile.max


_SIGNATURES: dict[str, Callable[[Path, Any], Signature]] = {
    ".json": _contract,
    ".onnx": _onnx,
    ".pt": _torchscript,
    ".plan": _engine,
}


def _ensemble_problems(ensemble: Any, configs: Mapping[str, Any]) -> list[str]:
    """Follow every tensor through the steps."""
    flowing, problems = _tensors(ensemble.input), []
    spaces = {_parameters(ensemble).get("space")}
    for step in ensemble.ensemble_scheduling.step:
        model = configs.get(step.model_name)
        if model is None:
            problems.append(f"step {step.model_name} is no model of this repository")
            continue
        spaces.add(_parameters(model).get("space"))
        takes, gives = _tensors(model.input), _tensors(model.output)
        found = {entry.key: flowing.get(entry.value) for entry in step.input_map}
        if found != takes:
            problems.append(f"step {step.model_name} takes {_shown(takes)}, and is given {_shown(found)}")
        for entry in step.output_map:
            if entry.key not in gives:
                problems.append(f"step {step.model_name} gives {_shown(gives)}, no {entry.key}")
            else:
                flowing[entry.value] = gives[entry.key]
        if model.max_batch_size < ensemble.max_batch_size:
            problems.append(f"step {step.model_name} takes {model.max_batch_size} of {ensemble.max_batch_size} at once")
    promised = _tensors(ensemble.output)
    if not promised or any(flowing.get(name) != tensor for name, tensor in promised.items()):
        problems.append(f"its output is to be {_shown(promised)}; the steps give {_shown(flowing)}")
    if len(spaces) != 1:
        problems.append("its steps are of different embedding spaces")
    return problems


def _tensors(declared: Any) -> Tensors:
    return {tensor.name: (data_type(tensor), tuple(tensor.dims)) for tensor in declared}


def _parameters(config: Any) -> dict[str, str]:
    return {entry.key: entry.value.string_value for entry in config.parameters}


def _shown(tensors: Mapping[str, tuple[str, tuple[int, ...]] | None]) -> str:
    return ", ".join(f"{name} {t[0]} {list(t[1])}" if t else f"{name} nothing" for name, t in tensors.items()) or "none"


__all__ = ["check_repository"]
