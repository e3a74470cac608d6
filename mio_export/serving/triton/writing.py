"""Write a model repository: checked before, and read again before it appears."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mio_export.bundle import Bundle, broken_files, load_bundle
from mio_export.bundle.onnx_file import check_onnx
from mio_export.errors import GateError, UsageError
from mio_export.evidence import artifact_problems
from mio_export.files import sha256_file, staged_folder
from mio_export.serving.triton.files import write_files
from mio_export.serving.triton.plan import Plan, settle

_MARK = "mio-deploy.json"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A repository that was written."""

    path: Path
    models: tuple[str, str]
    """Names of the model that takes files and of the one that takes pixels."""
    max_batch: int
    parameters: dict[str, str]
    """What the server will say of itself."""
    notes: tuple[str, ...]
    """What is left to do, a line each."""


def write_repository(
    bundle: Bundle | str | Path,
    out: str | Path,
    *,
    backend: str = "onnxruntime",
    precision: str = "fp32",
    device: str = "auto",
    decode: str = "full",
    overwrite: bool = False,
) -> Deployment:
    """Write a model repository for Triton Inference Server.

    Args:
        bundle: a bundle or its path; every hash of it is checked first.
        out: the repository's folder.
        backend: what runs the encoder: ``onnxruntime``, ``pytorch`` (the TorchScript artifact), ``tensorrt`` (the
            engine; if there is none, the ONNX graph and a script that builds one), or ``python`` (ONNX Runtime in the
            Python backend, on the CPU, for servers without the first).
        precision: of the artifact.
        device: ``cpu``, ``cuda``, or ``auto``: ``cuda`` if the artifact was proved on it.
        decode: ``full``, or ``scaled`` as ``mio embed --decode scaled``; vectors of both must not be mixed.
        overwrite: replace a repository that lies at ``out`` and differs.

    Raises:
        UsageError: a name is not known, the bundle holds no such artifact, or ``out`` exists and differs.
        GateError: a file of the bundle is not what was proved, the artifact was not proved there, or its graph
            disagrees with the manifest; nothing is left behind.
    """
    bundle, out = bundle if isinstance(bundle, Bundle) else load_bundle(bundle), Path(out)
    _refuse(f"{bundle.path} is not what was proved", broken_files(bundle))
    plan = settle(bundle, backend=backend, precision=precision, device=device, decode=decode)
    _refuse(f"{bundle.path} is refused", artifact_problems(bundle, plan.artifact))
    if plan.artifact.format == "onnx":
        check_onnx(bundle.path / plan.artifact.file, plan.artifact.companions)
        _refuse(f"{bundle.path} is refused", _graph_problems(plan))
    if out.is_file():
        raise UsageError(f"{out} is a file; -o names a folder")
    if out.exists() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise UsageError(f"{out} exists and is not a repository of mio deploy; choose another -o")
    done = Deployment(
        path=out,
        models=plan.served.models,
        max_batch=plan.served.max_batch,
        parameters=dict(plan.served.parameters),
        notes=("there is no engine yet: run build_engine.sh on the GPU that will serve",) if plan.builds_engine else (),
    )
    with staged_folder(out) as folder:
        write_files(folder, plan)
        (folder / _MARK).write_text(json.dumps({**asdict(done), "path": None}, indent=2) + "\n", encoding="utf-8")
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # the container runs as another user
        if out.exists() and not overwrite and _hashes(folder) != _hashes(out):
            raise UsageError(f"{out} exists and is another repository; choose another -o, or add --overwrite")
    return done


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        raise GateError("\n     ".join([f"{what}; nothing is deployed", *problems]))


def _graph_problems(plan: Plan) -> list[str]:
    """Compare the names, types and shapes of a graph with those that will be declared; 0 is a free dimension."""
    import onnx

    graph = onnx.load(plan.bundle.path / plan.artifact.file, load_external_data=False).graph
    weights, served = {tensor.name for tensor in graph.initializer}, plan.served
    declared: list[tuple[Any, ...]] = [("images", onnx.TensorProto.UINT8, 0, *served.image_shape)]
    declared.append(("embeddings", onnx.TensorProto.FLOAT, 0, served.embedding_dim))
    tensors = [(value.name, value.type.tensor_type) for value in (*graph.input, *graph.output)]
    found = [(n, t.elem_type, *(d.dim_value for d in t.shape.dim)) for n, t in tensors if n not in weights]
    return [] if found == declared else [f"{plan.artifact.file}: its tensors are {found}, not {declared}"]


def _hashes(folder: Path) -> dict[Path, str]:
    return {path.relative_to(folder): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


__all__ = ["Deployment", "write_repository"]
