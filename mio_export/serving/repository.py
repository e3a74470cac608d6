"""A Triton model repository made from a bundle: the encoder, a decoder in front of it, and the ensemble of both."""

import filecmp
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mio_export.bundle import Artifact, Bundle, Format, broken_files, load_bundle
from mio_export.errors import GateError, MioError, UsageError
from mio_export.evidence import artifact_problems
from mio_export.files import staged_folder
from mio_export.onnx_file import check_onnx
from mio_export.serving.repository_check import check_repository
from mio_export.serving.repository_files import write_surroundings
from mio_export.serving.repository_models import Plan, write_models

Backend = Literal["onnxruntime", "pytorch", "tensorrt", "python"]
_FORMATS: dict[str, Format] = {
    "onnxruntime": "onnx",
    "pytorch": "torchscript",
    "tensorrt": "tensorrt",
    "python": "onnx",
}
_RTX = (
    "Triton loads engines of TensorRT; one of TensorRT for RTX is another format, which it cannot load:"
    " use --backend tensorrt or onnxruntime"
)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A repository that was written."""

    path: Path
    models: tuple[str, ...]
    """Names of the models; the first is the ensemble, which takes image files."""
    artifact: str
    """File of the bundle that is served."""
    precision: str
    device: str
    max_batch: int
    space: str
    notes: tuple[str, ...]
    """What is left to do or to know, a line each."""


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
    """Write a model repository for Triton Inference Server, checked before it appears.

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
        GateError: a file of the bundle is not what was proved, the artifact was not proved, or what was written
            disagrees with the graph; nothing is left behind.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    out = Path(out)
    if broken := broken_files(bundle):
        raise GateError("\n     ".join([f"{bundle.path} is not what was proved; nothing is deployed", *broken]))
    plan = _plan(bundle, backend, precision, device, decode)
    if problems := artifact_problems(bundle, plan.artifact):
        raise GateError("\n     ".join([f"{bundle.path} is refused; nothing is deployed", *problems]))
    if plan.artifact.format == "onnx":
        check_onnx(bundle.path / plan.artifact.file, plan.artifact.companions)
    _check_ours(out)
    with staged_folder(out) as folder:
        write_models(folder, plan)
        write_surroundings(folder, plan)
        if problems := check_repository(folder):
            raise GateError("\n     ".join(["the repository is refused; nothing is written", *problems]))
        if out.exists() and not overwrite and not _same(folder, out):
            raise UsageError(f"{out} exists and is another repository; choose another -o, or add --overwrite")
    return Deployment(
        path=out,
        models=(plan.ensemble, plan.decoder, plan.encoder),
        artifact=plan.artifact.file,
        precision=plan.artifact.precision,
        device=plan.device,
        max_batch=plan.max_batch,
        space=bundle.manifest.space,
        notes=plan.notes,
    )


def _plan(bundle: Bundle, backend: str, precision: str, device: str, decode: str) -> Plan:
    """Settle what is served, and where."""
    if backend == "tensorrt-rtx":
        raise UsageError(_RTX)
    if backend not in _FORMATS:
        raise UsageError(f"backend must be {', '.join(get_args(Backend))}; got {backend!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu or cuda; got {device!r}")
    if decode not in ("full", "scaled"):
        raise UsageError(f"decode must be full or scaled; got {decode!r}")
    notes = []
    try:
        artifact = _proved(bundle, _FORMATS[backend], precision)
    except MioError:
        if backend != "tensorrt":
            raise
        artifact = _proved_onnx_instead(bundle, precision)
        notes.append("there is no engine yet: run build_engine.sh on the GPU that will serve, then the smoke test")
    return Plan(
        bundle=bundle,
        artifact=artifact,
        backend=backend,
        device=_device(artifact, backend, device),
        name=re.sub(r"[^A-Za-z0-9._-]", "-", bundle.manifest.name),
        decode=decode,
        notes=tuple(notes),
    )


def _proved(bundle: Bundle, format: Format, precision: str) -> Artifact:
    rows = [a for a in bundle.manifest.artifacts if (a.format, a.precision) == (format, precision)]
    for artifact in rows:
        if artifact.parity.verdict == "proved":
            return artifact
    if rows:
        raise GateError(
            f"the {format} {precision} artifact of {bundle.path} is {rows[0].parity.verdict}; only proved ones are"
            " deployed: mio verify --images DIR where it runs"
        )
    held = ", ".join(dict.fromkeys(f"{a.format} {a.precision}" for a in bundle.manifest.artifacts)) or "none"
    raise UsageError(f"{bundle.path} holds no {format} {precision} artifact; it holds: {held}")


def _proved_onnx_instead(bundle: Bundle, precision: str) -> Artifact:
    try:
        return _proved(bundle, "onnx", precision)
    except UsageError as error:
        if any(artifact.format == "tensorrt-rtx" for artifact in bundle.manifest.artifacts):
            raise UsageError(_RTX) from None
        raise UsageError(f"TensorRT needs a proved engine, or the ONNX graph to build one: {error}") from None


def _device(artifact: Artifact, backend: str, device: str) -> str:
    """Settle the device: that of a proof."""
    if artifact.format == "onnx" and backend == "tensorrt":
        return "cuda"  # the engine is proved by the smoke test, where it is built
    proved = [name for name in ("cuda", "cpu") if name in artifact.parity.devices]
    if backend == "python":
        if device == "cuda":
            raise UsageError("--backend python runs on the CPU; use --backend onnxruntime for a GPU")
        device = "cpu"
    if device == "auto" and proved:
        return proved[0]
    if device not in proved:
        where = " and ".join(artifact.parity.devices) or "no device"
        raise GateError(
            f"{artifact.file} was proved on {where}, not on {device}; run there: mio verify --images DIR --device cuda"
            if device == "cuda"
            else f"{artifact.file} was proved on {where}, not on {device}"
        )
    return device


def _check_ours(out: Path) -> None:
    """Never replace a folder that is no repository of ours."""
    if out.is_file():
        raise UsageError(f"{out} is a file; -o names a folder")
    if out.exists() and any(out.iterdir()) and not (out / "smoke" / "expected.json").is_file():
        raise UsageError(f"{out} exists and is not a repository of mio deploy; choose another -o")


def _same(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names, others = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (first, second)
    )
    return names == others and all(filecmp.cmp(first / name, second / name, shallow=False) for name in names)


__all__ = ["Backend", "Deployment", "write_repository"]
