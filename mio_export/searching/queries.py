"""Query images become vectors by the very artifact that made the store."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mio_export.bundle import Bundle, load_bundle
from mio_export.console.progress import Progress
from mio_export.decoding import Decoder
from mio_export.errors import MioError, MissingBackendError, SpaceError, UsageError
from mio_export.runtimes import Choice, choose
from mio_export.runtimes.backends import NAMED_ONLY
from mio_export.runtimes.devices import has_cuda
from mio_export.runtimes.image_files import embed_image_files
from mio_export.runtimes.opening import open_choice
from mio_export.runtimes.selection import choice_of
from mio_export.store import StoreInfo


def bundle_of(out: Path, info: StoreInfo) -> Path:
    """Return where the bundle of a store lies: ``NAME.mio`` beside the store, else in the working directory.

    Raises:
        UsageError: it is in neither place.
    """
    name = f"{info.bundle}.mio"
    for path in (out.absolute().parent / name, Path(name)):
        if path.is_dir():
            return path
    raise UsageError(f"{out} was made with {name}, which is neither beside it nor here; give its path: --bundle PATH")


def embed_images(
    images: Sequence[Path], bundle: Path, info: StoreInfo, *, out: Path, progress: Progress, runtime: str = "auto"
) -> npt.NDArray[np.float32]:
    """Embed image files as the store's images were: same bundle, artifact, precision and, if it is here, device.

    Args:
        images: paths.
        bundle: the bundle's path.
        info: of the store.
        out: the store's folder, for messages.
        progress: is told if the device is not the store's.
        runtime: ``auto``, or the store's; formats that may hold code must be named.

    Returns:
        float32, shape (Q, D).

    Raises:
        SpaceError: the bundle is of another embedding space, or lacks the artifact that made the store; or the store
            was made with another runtime than the one named.
        UsageError: the store was made with a format that may hold code, and its runtime is not named.
        MioError: a file cannot be read or decoded.
        OutOfMemoryError: there is not enough memory to decode one.
        GateError: the artifact is not the file that was proved.
        MissingBackendError: its runtime is not installed.
    """
    opened = load_bundle(bundle)
    _check_runtime(runtime, info, out)
    choice = _choice_of_store(opened, info, out)
    if choice.device != info.device:
        progress.line(f"{info.device} is not here: the same artifact embeds the query on {choice.device}")
    with (
        open_choice(opened, choice) as session,
        Decoder(opened.manifest.preprocess, scaled=info.decode == "scaled") as decoder,
    ):
        vectors, reasons = embed_image_files(session, images, decoder, batch_size=info.batch_size)
    for path, reason in zip(images, reasons, strict=True):
        if reason is not None:
            problem = reason if reason.startswith("cannot be read: ") else f"cannot be decoded: {reason}"
            raise MioError(f"{path} {problem}; give an image file")
    return vectors


def _check_runtime(runtime: str, info: StoreInfo, out: Path) -> None:
    if runtime not in ("auto", info.runtime):
        raise SpaceError(f"{out} holds vectors of {info.runtime}, not of {runtime}; leave --runtime out")
    if info.runtime in NAMED_ONLY and runtime == "auto":
        raise UsageError(
            f"{out} was made with {info.runtime}, whose files may hold code and run only when they are named; if you"
            f" trust the bundle, add --runtime {info.runtime}"
        )


def _choice_of_store(bundle: Bundle, info: StoreInfo, out: Path) -> Choice:
    if bundle.manifest.space != info.space:
        raise SpaceError(
            f"{out} holds vectors of another embedding space ({info.bundle}, {info.space[:12]}…)"
            f" than {bundle.path} ({bundle.manifest.space[:12]}…); give the store's bundle: --bundle PATH"
        )
    try:
        choice = _choice_on(bundle, info, info.device if info.device == "cpu" or has_cuda() else "auto")
    except MissingBackendError:
        choice = _choice_on(bundle, info, "auto")
    if choice is None:
        held = [f"{a.file} ({a.precision}, {a.verdict}, {a.sha256[:12]}…)" for a in bundle.manifest.artifacts]
        raise SpaceError(
            f"{out} holds vectors of {info.artifact_file} ({info.runtime}, {info.precision},"
            f" {info.artifact_sha256[:12]}…), which {bundle.path} does not hold proved; it holds:"
            f" {', '.join(held) or 'none'}; give the store's bundle: --bundle PATH"
        )
    return choice


def _choice_on(bundle: Bundle, info: StoreInfo, device: str) -> Choice | None:
    if info.runtime == "torch" and bundle.manifest.weights_sha256 == info.artifact_sha256:
        return choose(bundle, "torch", device=device)
    rows = bundle.artifacts(
        runtime=info.runtime, precision=info.precision, sha256=info.artifact_sha256, verdict="proved"
    )
    return choice_of(rows[0], device=device) if rows else None


__all__ = ["bundle_of", "embed_images"]
