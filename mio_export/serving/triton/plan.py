"""What is deployed: the artifact, the backend that runs it, and the device."""

import json
from dataclasses import dataclass, replace

from mio_export.bundle import Artifact, Bundle, Format, runtime_of
from mio_export.bundle.sidecar import read_sidecar
from mio_export.errors import GateError, UsageError
from mio_export.runtimes import Choice
from mio_export.serving.protocol import Served

RELEASE = "26.11"
"""Of NVIDIA's containers, the newest when this was written."""
_FORMATS: dict[str, tuple[Format, ...]] = {
    "onnxruntime": ("onnx",),
    "pytorch": ("torchscript",),
    "tensorrt": ("tensorrt", "onnx"),
    "python": ("onnx",),
}
"""What each backend runs; an engine that is not there is built of the graph."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is deployed, all settled."""

    bundle: Bundle
    artifact: Artifact
    backend: str
    served: Served
    """What the server will say of itself."""
    builds_engine: bool
    """Whether the engine is yet to be built on the target."""


def settle(bundle: Bundle, *, backend: str, precision: str, device: str, decode: str) -> Plan:
    """Settle what is deployed, and where it runs.

    Raises:
        UsageError: a name is not known, or the bundle holds no such artifact.
        GateError: it was not proved, or not on the device.
    """
    choices = (("backend", backend, [*_FORMATS]), ("device", device, ["auto", "cpu", "cuda"]))
    for name, value, allowed in (*choices, ("decode", decode, ["full", "scaled"])):
        if value not in allowed:
            raise UsageError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}; got {value!r}")
    formats, precise = _FORMATS[backend], [a for a in bundle.manifest.artifacts if a.precision == precision]
    fitting = [artifact for artifact in precise if artifact.format in formats]
    proved = [artifact for artifact in fitting if artifact.parity.verdict == "proved"]
    if not proved:
        rows = bundle.manifest.artifacts
        held = ", ".join(dict.fromkeys(f"{a.format} {a.precision} ({a.parity.verdict})" for a in rows)) or "none"
        wanted = f"{' or '.join(formats)} {precision}"
        kind = GateError if fitting else UsageError
        raise kind(f"{bundle.path} holds no proved {wanted} artifact for Triton; it holds: {held}")
    artifact = min(proved, key=lambda a: formats.index(a.format))
    builds_engine = backend == "tensorrt" and artifact.format == "onnx"
    # an engine is proved where it is built, by asking the server that runs it
    possible = ("cuda",) if builds_engine else ("cpu",) if backend == "python" else ("cuda", "cpu")
    found = [name for name in possible if builds_engine or name in artifact.parity.devices]
    if not found or device not in ("auto", *found):
        where = " and ".join(artifact.parity.devices)
        raise GateError(
            f"--backend {backend} runs {artifact.file} on {' or '.join(found) or 'nothing'}, not on {device}; it was"
            f" proved on {where}: mio verify {bundle.path} --images DIR --device {device} proves it where it runs"
        )
    max_batch = bundle.manifest.max_batch
    if artifact.format == "tensorrt":
        max_batch = min(max_batch, read_sidecar(bundle.path / artifact.file).profile.max)
    choice = Choice(
        runtime="tensorrt" if builds_engine else runtime_of(artifact.format),
        precision=artifact.precision,
        device=found[0] if device == "auto" else device,
        file=artifact.file,
        sha256=artifact.sha256,
    )
    served = Served.of(bundle, choice, decode=decode, max_batch=max_batch)
    versions = json.loads(served.parameters["versions"])
    if backend != "python":  # the container's, not ours
        versions = {name: text for name, text in versions.items() if name not in ("onnxruntime", "tensorrt", "torch")}
    versions = json.dumps({**versions, "triton": RELEASE})
    served = replace(served, parameters={**served.parameters, "versions": versions})
    return Plan(bundle=bundle, artifact=artifact, backend=backend, served=served, builds_engine=builds_engine)


__all__ = ["RELEASE", "Plan", "settle"]
