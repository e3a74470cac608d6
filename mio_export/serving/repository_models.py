"""The three models of a repository: their folders, files and ``config.pbtxt``."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mio_export.bundle import Artifact, Bundle
from mio_export.serving.repository_config import entries, model_config, to_text
from mio_export.sidecar import read_sidecar, sidecar_path

CONTRACT = (
    "__init__.py",
    "claims.py",
    "errors.py",
    "formats.py",
    "memory.py",
    "orientation.py",
    "png.py",
    "preprocess.py",
    "schema.py",
)
"""What ``mio_export.preprocess`` needs of this package, shipped beside the decoder byte for byte."""
MODEL_FILES = {"onnxruntime": "model.onnx", "pytorch": "model.pt", "tensorrt": "model.plan", "python": "model.py"}
ENGINE_SOURCE = Path("engine") / "model.onnx"
"""Where the graph lies that an engine is built from on the target."""
WARMUP_FILE = "wide.png"
_QUEUE_DELAY_US = 500
_LEVELS = {"extended": 1, "basic": -1, "disabled": 2}
"""Triton's numbers for ONNX Runtime's levels of graph optimisation; ``all`` is its default."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is deployed, all settled."""

    bundle: Bundle
    artifact: Artifact
    backend: str
    device: str
    name: str
    """Name of the ensemble; the two other models' begin with it."""
    decode: str
    """``full``, or ``scaled``: large JPEGs at a fraction of their size."""
    notes: tuple[str, ...] = ()

    @property
    def ensemble(self) -> str:
        """Name of the model that takes image files."""
        return self.name

    @property
    def decoder(self) -> str:
        """Name of the model that decodes."""
        return f"{self.name}-decoder"

    @property
    def encoder(self) -> str:
        """Name of the model that takes pixels."""
        return f"{self.name}-encoder"

    @property
    def builds_engine(self) -> bool:
        """Whether the engine is yet to be built on the target."""
        return self.backend == "tensorrt" and self.artifact.format == "onnx"

    @property
    def max_batch(self) -> int:
        """Largest batch: that of the proof, and of the engine's profile."""
        proved = self.bundle.manifest.max_batch
        if self.artifact.format != "tensorrt":
            return proved
        return min(proved, read_sidecar(self.bundle.path / self.artifact.file).profile.max)

    @property
    def tensors(self) -> tuple[str, str]:
        """Names of the encoder's input and output."""
        # TorchScript keeps no names: Triton's PyTorch backend counts inputs and outputs
        return ("INPUT__0", "OUTPUT__0") if self.backend == "pytorch" else ("images", "embeddings")

    @property
    def parameters(self) -> dict[str, str]:
        """What travels with every model, for clients to compare with their vectors' own."""
        return {
            "space": self.bundle.manifest.space,
            "artifact_sha256": self.artifact.sha256,
            "precision": self.artifact.precision,
            "decode": self.decode,
        }


def write_models(folder: Path, plan: Plan) -> None:
    """Write ``models/`` into a repository's folder."""
    for name, config, write in (
        (plan.ensemble, _ensemble_config(plan), _write_ensemble),
        (plan.decoder, _decoder_config(plan), _write_decoder),
        (plan.encoder, _encoder_config(plan), _write_encoder),
    ):
        model = folder / "models" / name
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(to_text(config), encoding="utf-8")
        write(model, plan)


def _common(plan: Plan, name: str, **fields: Any) -> Any:
    parameters = {**plan.parameters, **fields.pop("parameters", {})}
    return model_config(
        name=name,
        max_batch_size=plan.max_batch,
        parameters=entries({key: {"string_value": value} for key, value in parameters.items()}),
        **fields,
    )


def _files() -> dict[str, Any]:
    return {"name": "files", "data_type": "TYPE_STRING", "dims": [1]}


def _images(plan: Plan, name: str = "images") -> dict[str, Any]:
    return {"name": name, "data_type": "TYPE_UINT8", "dims": plan.bundle.manifest.preprocess.shape}


def _embeddings(plan: Plan, name: str = "embeddings") -> dict[str, Any]:
    return {"name": name, "data_type": "TYPE_FP32", "dims": [plan.bundle.manifest.encoder.embedding_dim]}


def _batching(kind: str) -> dict[str, Any]:
    return {
        "instance_group": [{"count": 1, "kind": kind}],
        "dynamic_batching": {"max_queue_delay_microseconds": _QUEUE_DELAY_US},
    }


def _ensemble_config(plan: Plan) -> Any:
    source, target = plan.tensors
    decode = {"input_map": entries({"files": "files"}), "output_map": entries({"images": "pixels"})}
    encode = {"input_map": entries({source: "pixels"}), "output_map": entries({target: "embeddings"})}
    return _common(
        plan,
        plan.ensemble,
        platform="ensemble",
        input=[_files()],
        output=[_embeddings(plan)],
        ensemble_scheduling={
            "step": [
                {"model_name": plan.decoder, "model_version": -1, **decode},
                {"model_name": plan.encoder, "model_version": -1, **encode},
            ]
        },
    )


def _write_ensemble(model: Path, plan: Plan) -> None:
    # a version folder must be there, and copies to object stores and git lose an empty one
    (model / "1" / "ensemble.txt").write_text(f"{plan.decoder} then {plan.encoder}\n", encoding="utf-8")


def _decoder_config(plan: Plan) -> Any:
    return _common(
        plan,
        plan.decoder,
        backend="python",
        default_model_filename="model.py",
        input=[_files()],
        output=[_images(plan)],
        model_warmup=[
            {
                "name": "one file",
                "batch_size": 1,
                "inputs": entries({"files": {"data_type": "TYPE_STRING", "dims": [1], "input_data_file": "file"}}),
            }
        ],
        **_batching("KIND_CPU"),
    )


def _write_decoder(model: Path, plan: Plan) -> None:
    from mio_export.parity.golden import golden_files

    version, package = model / "1", Path(__file__).parent.parent
    shutil.copyfile(Path(__file__).with_name("repository_decoder.py"), version / "model.py")
    (version / package.name).mkdir()
    for name in CONTRACT:
        shutil.copyfile(package / name, version / package.name / name)
    contract = json.dumps(plan.bundle.manifest.preprocess.to_dict(), indent=2) + "\n"
    (version / "preprocess.json").write_text(contract, encoding="utf-8")
    (model / "warmup").mkdir()
    file = golden_files()[Path(WARMUP_FILE).stem]
    (model / "warmup" / "file").write_bytes(len(file).to_bytes(4, "little") + file)  # how Triton lays out strings


def _encoder_config(plan: Plan) -> Any:
    source, target = plan.tensors
    level = plan.artifact.options.get("graph_optimization_level", "all")
    extra: dict[str, Any] = {"backend": plan.backend, "optimization": {}}
    if plan.backend == "pytorch":
        extra["platform"] = "pytorch_libtorch"
    if plan.backend == "python":
        extra["parameters"] = {"graph_optimization_level": level}
    if plan.backend == "onnxruntime" and level in _LEVELS:
        extra["optimization"]["graph"] = {"level": _LEVELS[level]}
    if plan.backend == "onnxruntime" and plan.device == "cuda":
        # TF32 keeps 10 bits of mantissa; the artifact was proved without it
        cuda = {"name": "cuda", "parameters": entries({"use_tf32": "0"})}
        extra["optimization"]["execution_accelerators"] = {"gpu_execution_accelerator": [cuda]}
    if not extra["optimization"]:
        del extra["optimization"]
    image = {"data_type": "TYPE_UINT8", "dims": plan.bundle.manifest.preprocess.shape, "random_data": True}
    return _common(
        plan,
        plan.encoder,
        default_model_filename=MODEL_FILES[plan.backend],
        input=[_images(plan, source)],
        output=[_embeddings(plan, target)],
        model_warmup=[
            {"name": f"batch of {size}", "batch_size": size, "inputs": entries({source: image})}
            for size in dict.fromkeys((1, plan.max_batch))
        ],
        **_batching("KIND_GPU" if plan.device == "cuda" else "KIND_CPU"),
        **extra,
    )


def _write_encoder(model: Path, plan: Plan) -> None:
    artifact, version = plan.artifact, model / "1"
    if plan.backend == "python":
        shutil.copyfile(Path(__file__).with_name("repository_encoder.py"), version / "model.py")
    target = version / ("model.onnx" if plan.backend == "python" else MODEL_FILES[plan.backend])
    if plan.builds_engine:
        (version / "engine.txt").write_text("build_engine.sh writes model.plan here\n", encoding="utf-8")
        target = model.parent.parent / ENGINE_SOURCE
        target.parent.mkdir()
    shutil.copyfile(plan.bundle.path / artifact.file, target)
    for name in artifact.companions:
        source = plan.bundle.path / name
        beside = sidecar_path(target) if artifact.format == "tensorrt" else target.with_name(source.name)
        shutil.copyfile(source, beside)


__all__ = ["CONTRACT", "ENGINE_SOURCE", "MODEL_FILES", "Plan", "write_models"]
