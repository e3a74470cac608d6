"""The files of a repository: ``templates/`` filled in, the decode contract, and the artifact."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from mio_export.errors import GateError
from mio_export.files import sha256_file
from mio_export.serving.messages import entries, message_class
from mio_export.serving.options import ServeOptions
from mio_export.serving.protocol import pack
from mio_export.serving.triton.plan import RELEASE, Plan
from mio_export.sidecar import sidecar_path

CONTRACT = ("__init__", "claims", "errors", "formats", "limits", "memory", "orientation", "png", "preprocess", "schema")
"""What ``mio_export.decoding`` needs of this package, shipped byte for byte."""
_FILES = {"onnxruntime": "model.onnx", "pytorch": "model.pt", "tensorrt": "model.plan", "python": "model.py"}
"""What each backend loads."""
_LEVELS = {"all": 0, "extended": 1, "basic": -1, "disabled": 2}
"""Triton's numbers for ONNX Runtime's levels of graph optimisation."""
_TF32_OFF = 'gpu_execution_accelerator { name: "cuda" parameters { key: "use_tf32" value: "0" } }'
"""TF32 keeps 10 bits of mantissa; the artifact was proved without it."""
_PACKAGES = ("pillow", "pillow-heif", "onnxruntime")
"""What the container is built with, if it is needed."""
_HERE = Path(__file__).parent
_PACKAGE = _HERE.parents[1]


def write_files(folder: Path, plan: Plan) -> None:
    """Write a repository into an empty folder.

    Raises:
        GateError: the artifact is another than it was when it was checked.
    """
    values = _values(plan)
    for template in sorted((_HERE / "templates" / "files").iterdir()):
        needed = {"build_engine.sh": plan.builds_engine, "compose.override.yaml": values["kind"] == "KIND_GPU"}
        if needed.get(template.name, True):
            (folder / template.name).write_text(_filled(template, values), encoding="utf-8")
    for template in sorted((_HERE / "templates" / "models").iterdir()):
        _write_model(folder / "models", _filled(template, values), plan)
    _write_contract(folder / "models" / f"{plan.served.name}_decode", plan)
    _write_artifact(folder, plan)


def _write_model(folder: Path, text: str, plan: Plan) -> None:
    from google.protobuf import text_format

    config = text_format.Parse(text, message_class("ModelConfig")())  # refuses what Triton does not know
    says = {name: {"string_value": value} for name, value in plan.served.parameters.items()}
    config.MergeFrom(type(config)(max_batch_size=plan.served.max_batch, parameters=entries(says)))
    version = folder / config.name / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    if config.backend == "python":
        shutil.copyfile(_HERE / "model.py", version / "model.py")
    else:  # a version folder must be there, and copies to object stores and git lose an empty one
        (version / "README").write_text(f"{config.name} is made by config.pbtxt\n", encoding="utf-8")


def _write_contract(decode: Path, plan: Plan) -> None:
    from mio_export.parity.golden import golden_files

    for file in (*(_PACKAGE / f"{name}.py" for name in CONTRACT), *(_PACKAGE / "decoding").glob("*.py")):
        copy = decode / "1" / file.relative_to(_PACKAGE.parent)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    limits = asdict(ServeOptions().limits_for(plan.bundle))
    contract = {"preprocess": plan.bundle.manifest.preprocess.to_dict(), "limits": limits}
    (decode / "1" / "contract.json").write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
    (decode / "warmup").mkdir()
    (decode / "warmup" / "file").write_bytes(pack([golden_files()["wide"]]))


def _write_artifact(folder: Path, plan: Plan) -> None:
    artifact, target = plan.artifact, folder / "models" / f"{plan.served.name}_encode" / "1" / _FILES[plan.backend]
    if plan.backend == "python":
        target = target.with_name("model.onnx")
    if plan.builds_engine:
        target = folder / "engine" / "model.onnx"
        target.parent.mkdir()
    for name, sha256 in {artifact.file: artifact.sha256, **artifact.companions}.items():
        beside = sidecar_path(target) if artifact.format == "tensorrt" else target.with_name(Path(name).name)
        copy = target if name == artifact.file else beside
        shutil.copyfile(plan.bundle.path / name, copy)
        if sha256_file(copy) != sha256:
            raise GateError(f"{name} changed while it was copied; nothing is deployed")


def _values(plan: Plan) -> dict[str, object]:
    """Return what stands in templates between two @."""
    served, level = plan.served, plan.artifact.options.get("graph_optimization_level", "all")
    on_gpu, versions = served.parameters["device"] == "cuda", json.loads(served.parameters["versions"])
    options = {
        "onnxruntime": f"""optimization {{
            graph {{ level: {_LEVELS[level]} }} execution_accelerators {{ {_TF32_OFF if on_gpu else ""} }}
        }}""",
        "python": f'parameters {{ key: "graph_optimization_level" value {{ string_value: "{level}" }} }}',
        "pytorch": 'platform: "pytorch_libtorch"',
    }
    # TorchScript keeps no names: Triton's PyTorch backend counts inputs and outputs
    source, target = ("INPUT__0", "OUTPUT__0") if plan.backend == "pytorch" else ("images", "embeddings")
    return {
        "name": served.name,
        "release": RELEASE,
        "backend": plan.backend,
        "backend_options": options.get(plan.backend, ""),
        "loads": _FILES[plan.backend],
        "source": source,
        "target": target,
        "kind": "KIND_GPU" if on_gpu else "KIND_CPU",
        "decode": served.parameters["decode"],
        "shape": ", ".join(map(str, served.image_shape)),
        "extents": "x".join(map(str, served.image_shape)),
        "dim": served.embedding_dim,
        "max_batch": served.max_batch,
        "usual_batch": min(32, served.max_batch),
        "max_body_bytes": ServeOptions().body_bytes_for(plan.bundle),
        "packages": " ".join(f"{name}=={versions[name]}" for name in _PACKAGES if name in versions),
        "parameters": "\n".join(f"| `{name}` | `{value}` |" for name, value in served.parameters.items()),
    }


def _filled(template: Path, values: dict[str, object]) -> str:
    text = template.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


__all__ = ["CONTRACT", "write_files"]
