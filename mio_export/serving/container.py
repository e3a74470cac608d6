"""A folder that builds a container of ``mio serve`` with a bundle inside, for compose and for KServe."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from mio_export.bundle import Bundle, copy_bundle, load_bundle
from mio_export.embedding.versions import distribution_of
from mio_export.errors import MissingBackendError, UsageError
from mio_export.files import same_files, staged_folder
from mio_export.runtimes import BACKENDS, Choice, choose_elsewhere
from mio_export.serving.footprint import footprint
from mio_export.serving.options import ServeOptions
from mio_export.serving.protocol import model_name

_SETTINGS = "container.json"
"""What a folder was written with; where it lies, the folder is ours."""
_SERVER = "grpcio httptools numpy pillow prometheus-client protobuf pyarrow pydantic starlette typer urllib3 uvicorn"
_WITHOUT_TORCH = ("onnxruntime", "openvino")
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@-]{0,254}")


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
) -> dict[str, Any]:
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

    Returns:
        What ``container.json`` says: JSON-ready values, by name.

    Raises:
        UsageError: a value is not allowed, the bundle holds no such artifact, or ``out`` exists and differs.
        GateError: a file is not what was proved, or the artifact was not proved on the device; nothing is written.
        MissingBackendError: the runtime is not installed here, so that its version is not known.
    """
    bundle, out = bundle if isinstance(bundle, Bundle) else load_bundle(bundle), Path(out)
    name = model_name(bundle.path.resolve().name.removesuffix(".mio"))
    if decode not in ("full", "scaled"):
        raise UsageError(f"decode must be full or scaled, got {decode!r}")
    if kserve_image is not None and not _IMAGE.fullmatch(kserve_image):
        raise UsageError(f"--image must be the name of an image, REGISTRY/NAME:TAG; got {kserve_image!r}")
    is_there = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if is_there and not (out / _SETTINGS).is_file():
        raise UsageError(f"{out} exists and is no folder of mio deploy container; choose another -o")
    choice = choose_elsewhere(bundle, runtime, precision=precision, device=device)
    if choice.runtime == "torch":  # which mio serve refuses
        raise UsageError(f"{bundle.path} has no proved artifact to serve; export one: mio export -f onnx")
    settings: dict[str, Any] = {
        "name": name,
        "space": bundle.manifest.space,
        **{"artifact": choice.file, "artifact_sha256": choice.sha256},
        **{"runtime": choice.runtime, "precision": choice.precision, "device": choice.device, "decode": decode},
        **{"mio_export": version("mio-export"), "requirements": _requirements(choice)},
        "needs_torch": choice.runtime not in _WITHOUT_TORCH,
        "kserve_image": kserve_image,
        "service": re.sub(r"[^a-z0-9]+", "-", f"mio-{name.lower()}")[:40].strip("-"),  # a DNS label
    }
    if kserve_image is not None:
        measured = _measured_before(out, settings) if not overwrite else None
        with suppress(MissingBackendError):  # then the README says so
            measured = measured or footprint(bundle, choice)
        settings |= {"measured": measured, "resources": _resources(bundle, measured)}
    with staged_folder(out) as folder:
        _write(folder, bundle, settings)
        for wheel in out.glob("*.whl"):  # of mio-export, which the user has laid there
            shutil.copyfile(wheel, folder / wheel.name)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # the container runs as another user
        if is_there and not overwrite and not same_files(folder, out):
            raise UsageError(f"{out} exists and is another container; choose another -o, or add --overwrite")
    return settings


def _requirements(choice: Choice) -> list[str]:
    """Return what is installed beside mio-export, in the versions that are used here."""
    library = distribution_of(choice.runtime)
    names = f"{_SERVER} uvloop {library} {'' if choice.runtime in _WITHOUT_TORCH else 'torch'}".split()
    try:
        pins = {name: version(name).partition("+")[0] for name in sorted(set(names))}
    except PackageNotFoundError as error:
        raise MissingBackendError(f"{error.name} is not installed here: {BACKENDS[choice.runtime].install}") from None
    if choice.runtime == "onnxruntime":
        pins["onnxruntime" if choice.device == "cpu" else "onnxruntime-gpu[cuda,cudnn]"] = pins.pop(library)
    with suppress(PackageNotFoundError):
        pins["pillow-heif"] = version("pillow-heif")  # it decodes here, so it does there
    return [f"{name}=={pin}" for name, pin in pins.items()]


def _measured_before(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the folder says was measured, if it is of the same artifact and is run in the same way."""
    try:
        before = json.loads((out / _SETTINGS).read_text(encoding="utf-8"))
        return before["measured"] if {**before, **settings} == before else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _resources(bundle: Bundle, measured: dict[str, Any] | None) -> dict[str, str]:
    """Return what Kubernetes is told, as the README explains it; guesses, if nothing was measured."""
    options = ServeOptions()
    threads, peak_mib = (measured["num_threads"], measured["peak_mib"]) if measured else (2, 2048)
    request = peak_mib + 256 + 64 * threads + options.max_queue * math.prod(bundle.manifest.preprocess.shape) / 2**20
    largest = 512 + 40 * (options.limits_for(bundle).max_pixels or 0) / 2**20  # as a decoding process limits itself
    limit = request + 8 * options.body_bytes_for(bundle) / 2**20 + largest
    memory = {name: f"{256 * math.ceil(mib / 256)}Mi" for name, mib in (("request", request), ("limit", limit))}
    return {"cpu": str(threads), **memory}


def _write(folder: Path, bundle: Bundle, settings: Mapping[str, Any]) -> None:
    from jinja2 import Environment, StrictUndefined

    copy_bundle(bundle, folder / f"{settings['name']}.mio")
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    for template in (files("mio_export.serving") / "templates" / "container").iterdir():
        if settings["kserve_image"] or template.name != "inference_service.yaml":
            text = environment.from_string(template.read_text(encoding="utf-8")).render(settings)
            (folder / template.name).write_text(text, encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(settings["requirements"]) + "\n", encoding="utf-8")
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


__all__ = ["write_container"]
