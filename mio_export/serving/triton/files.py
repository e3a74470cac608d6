"""The files of a repository: ``templates/`` filled in, the decode contract, and the artifact."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from mio_export.bundle.sidecar import sidecar_path
from mio_export.errors import GateError
from mio_export.files import sha256_file
from mio_export.serving.messages import entries, message_class
from mio_export.serving.options import ServeOptions
from mio_export.serving.protocol import pack
from mio_export.serving.triton.plan import RELEASE, Plan

CONTRACT = (
    *(f"{name}.py" for name in ("__init__", "errors", "extras", "files", "limits", "memory", "preprocess", "schema")),
    "decoding/*.py",
    "image_formats/*.py",
)
"""What decodes an image, of this package, shipped byte for byte."""
_LOADS = {"onnxruntime": "model.onnx", "pytorch": "model.pt", "tensorrt": "model.plan", "python": "model.py"}
"""The file that each backend loads."""
_HERE = Path(__file__).parent
_PACKAGE = _HERE.parents[1]


def write_files(folder: Path, plan: Plan) -> None:
    """Write a repository into an empty folder.

    Raises:
        GateError: the artifact is another than it was when it was checked.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values = _values(plan)
    for name in environment.list_templates():
        text = environment.get_template(name).render(values)
        if name.startswith("models/"):
            _write_model(folder / "models", text, plan)
        elif name != "files/build_engine.sh" or plan.builds_engine:
            (folder / Path(name).name).write_text(text, encoding="utf-8")
    _write_contract(folder / "models" / f"{plan.served.name}_decode", plan)
    _write_artifact(folder, plan)


def _values(plan: Plan) -> dict[str, object]:
    served, versions = plan.served, json.loads(plan.served.parameters["versions"])
    is_numbered = plan.backend == "pytorch"  # TorchScript keeps no names
    return {
        "name": served.name,
        "release": RELEASE,
        "backend": plan.backend,
        "device": served.parameters["device"],
        "decode": served.parameters["decode"],
        "artifact": plan.artifact,
        "builds_engine": plan.builds_engine,
        "graph_level": plan.artifact.options.get("graph_optimization_level", "all"),
        "loads": _LOADS[plan.backend],
        "source": "INPUT__0" if is_numbered else "images",
        "target": "OUTPUT__0" if is_numbered else "embeddings",
        "shape": served.image_shape,
        "dim": served.embedding_dim,
        "max_batch": served.max_batch,
        "max_body_bytes": ServeOptions().body_bytes_for(plan.bundle),
        "packages": [f"{n}=={versions[n]}" for n in ("pillow", "pillow-heif", "onnxruntime") if n in versions],
        "parameters": served.parameters,
    }


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

    for file in (file for pattern in CONTRACT for file in sorted(_PACKAGE.glob(pattern))):
        copy = decode / "1" / file.relative_to(_PACKAGE.parent)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    limits = asdict(ServeOptions().limits_for(plan.bundle))
    contract = {"preprocess": plan.bundle.manifest.preprocess.to_dict(), "limits": limits}
    (decode / "1" / "contract.json").write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
    (decode / "warmup").mkdir()
    (decode / "warmup" / "file").write_bytes(pack([golden_files()["wide"]]))


def _write_artifact(folder: Path, plan: Plan) -> None:
    artifact, target = plan.artifact, folder / "models" / f"{plan.served.name}_encode" / "1" / _LOADS[plan.backend]
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


__all__ = ["CONTRACT", "write_files"]
