"""Query images become vectors by the very artifact that made the store."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mio_export.bundle import Bundle, load_bundle
from mio_export.decoding import Decoder
from mio_export.errors import MioError, MissingBackendError, OutOfMemoryError, SpaceError, UsageError
from mio_export.preprocess import DecodeError, Pixels
from mio_export.progress import Progress
from mio_export.runtimes import Choice, choose
from mio_export.runtimes.registry import backend_of, choice_of, open_choice
from mio_export.sources import read_file
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
    images: Sequence[Path], bundle: Path, info: StoreInfo, *, out: Path, progress: Progress
) -> npt.NDArray[np.float32]:
    """Embed image files as the store's images were: same bundle, artifact, precision and, if it is here, device.

    Returns:
        float32, shape (Q, D).

    Raises:
        SpaceError: the bundle is of another embedding space, or lacks the artifact that made the store.
        MioError: a file cannot be read or decoded.
        OutOfMemoryError: there is not enough memory to decode one.
        GateError: the artifact is not the file that was proved.
        MissingBackendError: its runtime is not installed.
    """
    opened = load_bundle(bundle)
    choice = _choice_of_store(opened, info, out)
    with Decoder(opened.manifest.preprocess, scaled=info.decode == "scaled") as decoder:
        pixels = [_decode(path, decoder) for path in images]
    if choice.device != info.device:
        progress.line(f"{info.device} is not here: the same artifact embeds the query on {choice.device}")
    size = info.batch_size
    with open_choice(opened, choice) as runtime:
        batches = [runtime.embed(np.stack(pixels[start : start + size])) for start in range(0, len(pixels), size)]
    return np.concatenate(batches)


def _choice_of_store(bundle: Bundle, info: StoreInfo, out: Path) -> Choice:
    if bundle.manifest.space != info.space:
        raise SpaceError(
            f"{out} holds vectors of another embedding space ({info.bundle}, {info.space[:12]}…)"
            f" than {bundle.path} ({bundle.manifest.space[:12]}…); give the store's bundle: --bundle PATH"
        )
    try:
        choice = _choice_on(bundle, info, info.device)
    except MissingBackendError:
        choice = _choice_on(bundle, info, "auto")
    if choice is None:
        held = [f"{a.file} ({a.precision}, {a.parity.verdict}, {a.sha256[:12]}…)" for a in bundle.manifest.artifacts]
        raise SpaceError(
            f"{out} holds vectors of {info.artifact_file} ({info.runtime}, {info.precision},"
            f" {info.artifact_sha256[:12]}…), which {bundle.path} does not hold proved; it holds:"
            f" {', '.join(held) or 'none'}; give the store's bundle: --bundle PATH"
        )
    return choice


def _choice_on(bundle: Bundle, info: StoreInfo, device: str) -> Choice | None:
    if info.runtime == "torch" and bundle.manifest.weights_sha256 == info.artifact_sha256:
        return choose(bundle, "torch", device=device)
    for artifact in bundle.manifest.artifacts:
        found = (artifact.sha256, artifact.precision, artifact.parity.verdict, backend_of(artifact.format))
        if found == (info.artifact_sha256, info.precision, "proved", info.runtime):
            return choice_of(artifact, device=device)
    return None


def _decode(path: Path, decoder: Decoder) -> Pixels:
    try:
        return decoder.decode(read_file(path, decoder.limits.max_file_bytes)[0])
    except OSError as error:
        raise MioError(f"{path} cannot be read: {error.strerror or error}; give an image file") from None
    except DecodeError as error:
        raise MioError(f"{path} cannot be decoded: {error}; give an image file") from None
    except MemoryError as error:
        raise OutOfMemoryError(
            f"there is not enough memory to decode {path}; free memory, then run it again"
        ) from error


__all__ = ["bundle_of", "embed_images"]
