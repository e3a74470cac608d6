"""A folder that builds a container of ``mio serve`` with a bundle inside, for compose and for KServe."""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from mio_export.bundle import MANIFEST, PAGE, SIGNATURE, Bundle, broken_files, load_bundle, named_files
from mio_export.embedding.versions import distribution_of
from mio_export.errors import GateError, MissingBackendError, UsageError
from mio_export.files import same_files, staged_folder
from mio_export.runtimes import BACKENDS, Choice, choose
from mio_export.runtimes.registry import backend_of, check_evidence
from mio_export.serving.footprint import footprint, resources
from mio_export.serving.protocol import model_name

_SETTINGS = "container.json"
"""What a folder was written with; where it lies, the folder is ours."""
_SERVER = (
    "grpcio httptools numpy onnx pillow prometheus-client protobuf pyarrow pydantic starlette typer urllib3 uvicorn"
)
_TORCH = {"onnxruntime": "", "openvino": "", "torch": "lightly safetensors torch torchvision"}
"""What a runtime needs beside its own library; those that are not named need torch."""
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@-]{0,254}")


@dataclass(frozen=True, kw_only=True)
class Container:
    """A folder that was written, and what ``container.json`` says of it."""

    path: Path
    settings: Mapping[str, Any]


def write_container(
    bundle: Bundle | str | Path,
    out: str | Path,
    *,
    runtime: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    decode: str = "full",
    kserve_image: str | None = None,
    overwrite: bool = False,
) -> Container:
    """Write a bundle, a Dockerfile and a compose file of ``mio serve``; the same call writes the same bytes.

    Args:
        bundle: a bundle or its path; every hash of it is checked first.
        out: the folder.
        runtime: a name in ``BACKENDS``; ``auto``: the first that has a proved artifact, as none is measured.
        precision: of the artifact; ``auto``: fp32.
        device: ``cpu``, ``cuda``, or ``auto``: ``cuda`` if the artifact was proved on it.
        decode: ``full``, or ``scaled`` as ``mio embed --decode scaled``.
        kserve_image: the image's name in a registry: write an InferenceService too, with requests and limits that are
            measured here, and kept until a call with ``overwrite``.
        overwrite: replace a folder of ours that differs.

    Raises:
        UsageError: a value is not allowed, the bundle holds no such artifact, or ``out`` exists and differs.
        GateError: a file is not what was proved, or the artifact was not proved on the device; nothing is written.
        MissingBackendError: the runtime is not installed here, so that its version is not known.
    """
    bundle, out = bundle if isinstance(bundle, Bundle) else load_bundle(bundle), Path(out)
    name = model_name(bundle.path.resolve().name.removesuffix(".mio"))
    if device not in ("auto", "cpu", "cuda") or decode not in ("full", "scaled"):
        raise UsageError(f"device must be auto, cpu or cuda, and decode full or scaled; got {device!r} and {decode!r}")
    if kserve_image is not None and not _IMAGE.fullmatch(kserve_image):
        raise UsageError(f"--image must be the name of an image, REGISTRY/NAME:TAG; got {kserve_image!r}")
    is_there = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if is_there and not (out / _SETTINGS).is_file():
        raise UsageError(f"{out} exists and is no folder of mio deploy container; choose another -o")
    if broken := broken_files(bundle):
        raise GateError("\n     ".join([f"{bundle.path} is not what was proved; nothing is deployed", *broken]))
    choice = _settled(bundle, runtime, precision, device)
    settings: dict[str, Any] = {
        "name": name,
        "space": bundle.manifest.space,
        **{"artifact": choice.file, "artifact_sha256": choice.sha256},
        **{"runtime": choice.runtime, "precision": choice.precision, "device": choice.device, "decode": decode},
        **{"mio_export": version("mio-export"), "requirements": _requirements(bundle, choice)},
        "needs_torch": choice.runtime not in ("onnxruntime", "openvino"),
        "kserve_image": kserve_image,
        "service": re.sub(r"[^a-z0-9]+", "-", f"mio-{name.lower()}")[:40].strip("-"),
    }
    if kserve_image is not None:
        before = json.loads((out / _SETTINGS).read_text()) if is_there and not overwrite else {}
        is_same = {**before, **settings} == before
        measured = before["measured"] if is_same else _measured(bundle, choice)
        settings |= {"measured": measured, "resources": resources(bundle, measured)}
    with staged_folder(out) as folder:
        _write(folder, bundle, settings)
        for wheel in out.glob("*.whl"):  # of mio-export, which the user has laid there
            shutil.copyfile(wheel, folder / wheel.name)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # the container runs as another user
        if is_there and not overwrite and not same_files(folder, out):
            raise UsageError(f"{out} exists and is another container; choose another -o, or add --overwrite")
    return Container(path=out, settings=settings)


def _settled(bundle: Bundle, runtime: str, precision: str, device: str) -> Choice:
    """Choose the artifact, and a device that it was proved on, whether or not that is here."""
    choice = choose(bundle, runtime, precision=precision)
    rows = [a for a in bundle.manifest.artifacts if (a.file, backend_of(a.format)) == (choice.file, choice.runtime)]
    if device == "auto":
        device = "cuda" if any("cuda" in row.parity.devices for row in rows) else "cpu"
    choice = replace(choice, device=device)
    check_evidence(bundle, choice)
    return choice


def _requirements(bundle: Bundle, choice: Choice) -> list[str]:
    """Return what is installed beside mio-export, in the versions that are used here."""
    library = distribution_of(choice.runtime)
    timm = "timm" if bundle.manifest.encoder.backbone.startswith("timm/") and choice.runtime == "torch" else ""
    names = f"{_SERVER} uvloop {library} {_TORCH.get(choice.runtime, 'torch')} {timm}".split()
    try:
        pins = {name: version(name).partition("+")[0] for name in sorted(set(names))}
    except PackageNotFoundError as error:
        raise MissingBackendError(f"{error.name} is not installed here: {BACKENDS[choice.runtime].install}") from None
    if choice.runtime == "onnxruntime":
        pins["onnxruntime" if choice.device == "cpu" else "onnxruntime-gpu[cuda,cudnn]"] = pins.pop(library)
    with suppress(PackageNotFoundError):
        pins["pillow-heif"] = version("pillow-heif")  # it decodes here, so it does there
    return [f"{name}=={pin}" for name, pin in pins.items()]


def _measured(bundle: Bundle, choice: Choice) -> dict[str, Any] | None:
    try:
        return footprint(bundle, choice)
    except MissingBackendError:
        return None


def _write(folder: Path, bundle: Bundle, settings: Mapping[str, Any]) -> None:
    from jinja2 import Environment, StrictUndefined

    inside = folder / f"{settings['name']}.mio"
    for file in [MANIFEST, *dict(named_files(bundle.manifest)), PAGE, SIGNATURE]:
        if file not in (PAGE, SIGNATURE) or bundle.file(file).is_file():
            (inside / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(file), inside / file)
    if broken := broken_files(load_bundle(inside)):
        raise GateError("\n     ".join([f"{bundle.path} was changed meanwhile; nothing is deployed", *broken]))
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    for template in (files("mio_export.serving") / "templates" / "container").iterdir():
        if settings["kserve_image"] or template.name != "inference_service.yaml":
            text = environment.from_string(template.read_text(encoding="utf-8")).render(settings)
            (folder / template.name).write_text(text, encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(settings["requirements"]) + "\n", encoding="utf-8")
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


__all__ = ["Container", "write_container"]
