"""``answer``: the neighbours of image files and of stored images."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mio_export.console.progress import Progress
from mio_export.errors import UsageError
from mio_export.searching.neighbors import Neighbor, check_k, neighbors_of, other_neighbors, search
from mio_export.searching.queries import bundle_of, embed_images
from mio_export.sources import evenly_spaced
from mio_export.store import Embeddings, load_embeddings

_MOST_COMPARED = 20_000  # comparing a million names would take a minute


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A query and its neighbours."""

    query: str
    """Path of an image file, or key of a stored image."""
    stored: bool
    """Whether the query is a stored image; it is not among its own neighbours then."""
    neighbors: tuple[Neighbor, ...]
    """The nearest first."""


def answer(
    out: str | Path,
    *,
    images: Sequence[str | Path] = (),
    keys: Sequence[str] = (),
    bundle: str | Path | None = None,
    runtime: str = "auto",
    k: int = 10,
    progress: Progress | None = None,
) -> list[Answer]:
    """Find the nearest stored images of image files, then of stored images; nothing is written.

    Args:
        out: a store's folder.
        images: image files; they need the store's bundle.
        keys: keys of stored images; they need none.
        bundle: the bundle's path; None: ``NAME.mio`` beside the store, else in the working directory.
        runtime: ``auto``: the store's; one whose files may hold code (``pt2``, ``torchscript``) must be named.
        k: number of neighbours, 1 or more, clamped to what the store holds.
        progress: is told if the device is not the store's.

    Raises:
        UsageError: there is no store or no bundle, a key is not in the store, ``k`` is below 1, or the store's runtime
            must be named.
        SpaceError: the bundle is of another embedding space, or lacks the artifact that made the store; or another
            runtime than the store's is named, or a shard of another identity lies in the store.
        MioError: an image cannot be read or decoded, or the store holds no embeddings.
    """
    check_k(k)
    folder, store = Path(out), load_embeddings(out)
    answers = []
    if images:
        paths = [Path(image) for image in images]
        found = Path(bundle) if bundle is not None else bundle_of(folder, store.info)
        vectors = embed_images(paths, found, store.info, out=folder, progress=progress or Progress(), runtime=runtime)
        pairs = zip(paths, search(store, vectors, k=k), strict=True)
        answers += [Answer(query=str(path), stored=False, neighbors=neighbors) for path, neighbors in pairs]
    return answers + [_answer_key(store, key, k, folder) for key in keys]


def _answer_key(store: Embeddings, key: str, k: int, out: Path) -> Answer:
    if key not in store.keys:
        named = [other for other in store.keys if other.endswith(f"/{key.rpartition('/')[2]}")]
        close = difflib.get_close_matches(key, named or evenly_spaced(store.keys, _MOST_COMPARED), n=1, cutoff=0)
        hint = f"; the nearest name is {close[0]!r}" if close else ""
        raise UsageError(f"{out} holds no embedding of {key!r}{hint}; keys are paths below the embedded folder")
    indices, cosines = other_neighbors(store.vectors, np.array([store.keys.index(key)]), k)
    return Answer(query=key, stored=True, neighbors=neighbors_of(store.keys, indices[0], cosines[0]))


__all__ = ["Answer", "answer"]
