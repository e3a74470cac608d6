"""The bundle ``NAME.mio/``: an encoder, its decode contract, its artifacts and the proof of each, in one folder."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from mio_export.errors import GateError, UsageError
from mio_export.files import sha256_file, write_text
from mio_export.preprocess import Preprocess
from mio_export.schema import parse_json

SCHEMA_VERSION = 2
"""Version 2 added ``Proof.further``; version 1 is read as it is."""
MANIFEST = "manifest.json"
WEIGHTS = "encoder.safetensors"
PAGE = "report.html"
SIGNATURE = "model.sig"
REPORTS = "parity"
"""Folder of the parity reports and the golden images."""
LOCK = f"{REPORTS}/.lock"
_STRICT: dict[str, Any] = {"extra": "forbid"}
REQUIREMENTS = {
    "rms-error": "max_rms_error",
    "row-error": "max_row_error",
    "min-cosine": "min_cosine",
    "p1-cosine": "p1_cosine",
    "mean-cosine": "mean_cosine",
    "norm-drift": "max_norm_drift",
    "top1": "top1",
    "recall@10": "recall_at_10",
    "knn-change": "max_knn_change",
}
"""What ``--require`` calls each bound, and the field of the budget that it tightens."""

Format = Literal["onnx", "torchscript", "pt2", "openvino", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Verdict = Literal["proved", "unproven", "refused"]


@dataclass(frozen=True, kw_only=True)
class ProjectorSpec:
    """A projection head after the backbone, and how much of what it gives is kept."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    hidden_dim: int
    """Width of the hidden layers."""
    output_dim: int
    """Width of the projections."""
    num_layers: int
    """Linear layers."""
    norm: bool = True
    """Whether the last layer is followed by batch norm, as the hidden ones are."""
    ordered: bool
    """Whether the projections were trained in an order, the first being the leading one."""
    keep: int
    """K: the first K projections are kept, 1 to ``output_dim``."""

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "output_dim", "num_layers"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 1 <= self.keep <= self.output_dim:
            raise UsageError(f"keep must be 1 to {self.output_dim}, the width of the projections; got {self.keep}")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What an encoder is, apart from its weights."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    backbone: str
    """Name: one of ours, ``torchvision/NAME`` or ``timm/NAME``."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """First layers of a torchvision ResNet: ``small`` is 3x3, stride 1, padding 1, without max-pool."""
    embedding_dim: int
    """D, the width of an embedding."""
    pooling: Literal["backbone"] = "backbone"
    """How a feature map becomes one vector; ``backbone``: as the backbone itself does before its classifier."""
    normalize: bool = False
    """Whether embeddings are divided by their L2 norm."""
    projector: ProjectorSpec | None = None
    """What makes embeddings of the backbone's features; None: they are the features themselves."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What an encoder was trained on."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    num_images: int
    sha256: str
    """Hash of the names and bytes of the training files."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an encoder was trained, and on what."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    recipe: Mapping[str, Any]
    """Every setting, as JSON-ready values."""
    data: TrainingData
    last: Mapping[str, Any]
    """Metrics of the last epoch."""


@dataclass(frozen=True, kw_only=True)
class ReportFile:
    """A parity report of a bundle."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    report: str
    """Path of the parity report, relative to the bundle."""
    report_sha256: str


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was shown of an artifact, and where it is written down."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    verdict: Verdict
    """``unproven``: built where it cannot run; ``mio verify --images`` on the right machine proves or refuses it."""
    devices: tuple[str, ...]
    """Where it was run: ``cpu``, ``cuda``, ``tensorrt`` (ONNX Runtime's provider); empty if it could not be."""
    report: str
    """Path of the first parity report, relative to the bundle."""
    report_sha256: str
    further: tuple[ReportFile, ...] = ()
    """Reports of proofs on other devices, made later or elsewhere."""

    @property
    def evidence(self) -> tuple[ReportFile, ...]:
        """All reports, the first one first."""
        return (ReportFile(report=self.report, report_sha256=self.report_sha256), *self.further)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One exported file, and how it is to be run. Rows may share a file: OpenVINO reads the ONNX one."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    file: str
    format: Format
    precision: Precision
    sha256: str
    companions: Mapping[str, str] = field(default_factory=dict)
    """Files that it needs beside it (external weights, an engine's sidecar) and their sha256."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What its runtime was told when it was proved, and is told whenever it is opened."""
    parity: Proof
    capability: str | None = None
    """CUDA compute capability that an engine is built for, such as 8.9; None for other formats."""
    opset: int | None = None
    """ONNX opset; None where there is no ONNX graph."""
    exporter: Literal["dynamo", "torchscript"] | None = None
    """PyTorch's exporter that captured the ONNX graph; ``torchscript`` is the fallback."""
    notes: tuple[str, ...] = ()
    """What was done to it that a person should know, a line each."""
    tools: Mapping[str, str]
    """Versions of the libraries that wrote it."""

    def __post_init__(self) -> None:
        if self.capability is not None and not re.fullmatch(r"[0-9]{1,2}\.[0-9]{1,2}", self.capability):
            raise UsageError(f"capability is a number such as 8.9, got {self.capability!r}")

    @property
    def runtime(self) -> str:
        """Name of the runtime that runs it."""
        return runtime_of(self.format)

    @property
    def verdict(self) -> Verdict:
        """What parity says of it."""
        return self.parity.verdict


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of ``manifest.json``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    schema_version: int = SCHEMA_VERSION
    name: str
    encoder: EncoderSpec
    preprocess: Preprocess
    weights_sha256: str
    space: str
    """Fingerprint of the embedding space; see ``space_fingerprint``."""
    max_batch: int
    """Largest batch that the artifacts were proved at."""
    requirements: Mapping[str, float] = field(default_factory=dict)
    """What was asked of parity beyond each precision's budget; see ``mio export --require``."""
    training: Training | None = None
    """None for an encoder that was trained elsewhere."""
    metrics: Mapping[str, Any] | None = None
    """Evaluation of the encoder, if there was one."""
    artifacts: tuple[Artifact, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """Other files that verdicts rest on, and their sha256."""
    digest: str = field(default="", compare=False)
    """sha256 of everything else here; whoever changes the manifest by hand breaks it."""

    def __post_init__(self) -> None:
        check_requirements(self.requirements)

    def to_json(self) -> str:
        """Return the manifest's text, with its digest."""
        values = json.loads(json.dumps(asdict(self)))
        return json.dumps({**values, "digest": _digest(values)}, indent=2) + "\n"

    def common_json(self) -> str:
        """Return what every artifact says of itself, whatever its format: JSON text without names and verdicts."""
        names = ("schema_version", "encoder", "preprocess", "weights_sha256", "space", "max_batch", "training")
        return json.dumps({name: value for name, value in asdict(self).items() if name in names}, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Return the path of a file of the bundle.

        Raises:
            GateError: it lies outside, be it by its name or behind a link, or no file can have the name.
        """
        path = self.path / name
        try:
            is_inside = path.resolve().is_relative_to(self.path.resolve())
        except (OSError, ValueError):
            is_inside = False
        if not is_inside:
            raise GateError(f"{str(path)[:300]} lies outside the bundle; export it again")
        return path

    def artifacts(self, **wanted: str) -> list[Artifact]:
        """Return the artifacts whose attributes are those given, such as ``runtime="openvino", verdict="proved"``."""
        return [
            artifact
            for artifact in self.manifest.artifacts
            if all(getattr(artifact, name) == value for name, value in wanted.items())
        ]


def check_requirements(required: Mapping[str, float]) -> None:
    """Refuse names that parity does not know.

    Raises:
        UsageError: a name is unknown.
    """
    for name in required:
        if name not in REQUIREMENTS:
            raise UsageError(f"--require knows {', '.join(REQUIREMENTS)}; got {name!r}")


def space_fingerprint(*, weights_sha256: str, encoder: EncoderSpec, preprocess: Preprocess) -> str:
    """Return the sha256 that names an embedding space.

    It is of weights, preprocessing, pooling, output normalisation and, if there is one, the projector.
    """
    described = asdict(encoder)
    if encoder.projector is None:
        del described["projector"]  # the key is younger than the fingerprints of encoders without it
    parts = {"weights": weights_sha256, "encoder": described, "preprocess": preprocess.to_dict()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    values = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_bundle(path: str | Path) -> Bundle:
    """Open a bundle; nothing but its manifest is read.

    Raises:
        UsageError: there is no bundle at ``path``.
        GateError: its manifest is damaged.
        MioError: it was written by a newer mio-export.
    """
    path = Path(path)
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path} is not a bundle (it holds no {MANIFEST}); make one with: mio export") from None
    except NotADirectoryError:
        raise UsageError(f"{path} is a file; a bundle is a folder NAME.mio") from None
    manifest = parse_json(text, Manifest, where=path / MANIFEST, newest=SCHEMA_VERSION)
    if manifest.digest != _digest(json.loads(text)):
        raise GateError(f"{path / MANIFEST} is damaged: it was changed after it was written (its digest does not fit)")
    return Bundle(path=path, manifest=manifest)


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into a bundle's folder."""
    write_text(folder / MANIFEST, manifest.to_json())


def runtime_of(format: Format) -> str:
    """Return the name of the runtime that runs a format."""
    return "onnxruntime" if format == "onnx" else format


def named_files(manifest: Manifest) -> list[tuple[str, str]]:
    """Return every file that a manifest names, and its sha256, as often as it names it."""
    named = [(WEIGHTS, manifest.weights_sha256), *manifest.files.items()]
    for artifact in manifest.artifacts:
        named += [(artifact.file, artifact.sha256), *artifact.companions.items()]
        named += [(evidence.report, evidence.report_sha256) for evidence in artifact.parity.evidence]
    return list(dict.fromkeys(named))


def unnamed_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return what else lies in a bundle's folder, relative to it: neither named by the manifest nor ours.

    Ours are its page, its signature, its lock, reports that a later verdict replaced, and what a killed process left;
    never a link, behind which another file would be written.
    """
    named = dict(named_files(manifest))
    return sorted(
        name
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
        if (name := path.relative_to(folder).as_posix()) not in named and (path.is_symlink() or not _is_ours(name))
    )


def _is_ours(name: str) -> bool:
    path = PurePosixPath(name)
    is_report = str(path.parent) == REPORTS and path.suffix == ".json"
    return name in (MANIFEST, PAGE, SIGNATURE) or is_report or path.name.startswith(".")


def broken_files(bundle: Bundle) -> list[str]:
    """Check every hash of a bundle; return one line for each file that is missing or is not what it was."""
    manifest = bundle.manifest
    problems = []
    for name, sha256 in named_files(manifest):
        try:
            problem = _file_problem(bundle.path, name, sha256)
        except (OSError, ValueError) as error:  # a name that no file can have, or a file that cannot be read
            problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        if problem is not None:
            problems.append(f"{name[:200]}: {problem}")
    space = space_fingerprint(
        weights_sha256=manifest.weights_sha256, encoder=manifest.encoder, preprocess=manifest.preprocess
    )
    if space != manifest.space:
        problems.append(f"{MANIFEST}: the space fingerprint does not fit the encoder and preprocessing beside it")
    return problems


def copy_bundle(bundle: Bundle, folder: Path) -> None:
    """Copy what belongs to a bundle, and nothing else, to a folder; every hash is checked before and after.

    Raises:
        GateError: a file is missing or is not what the manifest says; the copy may be incomplete then.
    """
    broken = broken_files(bundle)
    for name in [] if broken else [MANIFEST, PAGE, SIGNATURE, *dict(named_files(bundle.manifest))]:
        if name not in (PAGE, SIGNATURE) or bundle.file(name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(name), folder / name)
    if broken := broken or broken_files(load_bundle(folder)):
        raise GateError("\n     ".join([f"{bundle.path} is not what was proved; nothing is deployed", *broken]))


def _file_problem(folder: Path, name: str, sha256: str) -> str | None:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        return "lies outside the bundle"
    if not file.is_file():
        return "missing"
    found = sha256_file(file)
    return None if found == sha256 else f"sha256 is {found[:12]}…, the manifest says {sha256[:12]}…"


__all__ = [
    "Artifact",
    "Bundle",
    "EncoderSpec",
    "Format",
    "Manifest",
    "Precision",
    "ProjectorSpec",
    "Proof",
    "ReportFile",
    "Training",
    "TrainingData",
    "Verdict",
    "broken_files",
    "check_requirements",
    "copy_bundle",
    "load_bundle",
    "named_files",
    "runtime_of",
    "save_manifest",
    "space_fingerprint",
    "unnamed_files",
]
