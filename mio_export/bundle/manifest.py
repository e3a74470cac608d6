"""``manifest.json``: an encoder, its decode contract, its artifacts and what was proved of each."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mio_export.errors import UsageError
from mio_export.preprocess import Preprocess
from mio_export.schema import json_text, strict

SCHEMA_VERSION = 2
"""Version 2 added ``ParitySummary.further``; version 1 is read as it is."""
MANIFEST = "manifest.json"
WEIGHTS = "encoder.safetensors"
PAGE = "report.html"
SIGNATURE = "model.sig"
REPORTS = "parity"
"""Folder of the parity reports and the golden images."""
LOCK = f"{REPORTS}/.lock"
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


@strict
@dataclass(frozen=True, kw_only=True)
class ProjectorSpec:
    """A projection head after the backbone, and how much of what it gives is kept."""

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


@strict
@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What an encoder is, apart from its weights."""

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


@strict
@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What an encoder was trained on."""

    num_images: int
    sha256: str
    """Hash of the names and bytes of the training files."""


@strict
@dataclass(frozen=True, kw_only=True)
class Training:
    """How an encoder was trained, and on what."""

    recipe: Mapping[str, Any]
    """Every setting, as JSON-ready values."""
    data: TrainingData
    last: Mapping[str, Any]
    """Metrics of the last epoch."""


@strict
@dataclass(frozen=True, kw_only=True)
class ReportFile:
    """A parity report of a bundle."""

    report: str
    """Path of the parity report, relative to the bundle."""
    report_sha256: str


@strict
@dataclass(frozen=True, kw_only=True)
class ParitySummary:
    """What was shown of an artifact, and where it is written down."""

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


@strict
@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One exported file, and how it is to be run. Rows may share a file: OpenVINO reads the ONNX one."""

    file: str
    format: Format
    precision: Precision
    sha256: str
    companions: Mapping[str, str] = field(default_factory=dict)
    """Files that it needs beside it (external weights, an engine's sidecar) and their sha256."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What its runtime was told when it was proved, and is told whenever it is opened."""
    parity: ParitySummary
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


@strict
@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of ``manifest.json``."""

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
        return json_text({**values, "digest": digest_of(values)})

    def common_json(self) -> str:
        """Return what every artifact says of itself, whatever its format: JSON text without names and verdicts."""
        names = ("schema_version", "encoder", "preprocess", "weights_sha256", "space", "max_batch", "training")
        return json.dumps({name: value for name, value in asdict(self).items() if name in names}, sort_keys=True)


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


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's JSON values, its own ``digest`` left out."""
    values = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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


__all__ = [
    "LOCK",
    "MANIFEST",
    "PAGE",
    "REPORTS",
    "REQUIREMENTS",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "WEIGHTS",
    "Artifact",
    "EncoderSpec",
    "Format",
    "Manifest",
    "ParitySummary",
    "Precision",
    "ProjectorSpec",
    "ReportFile",
    "Training",
    "TrainingData",
    "Verdict",
    "check_requirements",
    "digest_of",
    "named_files",
    "runtime_of",
    "space_fingerprint",
]
