"""Resuming a store that other versions wrote to: only if the versions here still give the vectors that it holds."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mio_export.bundle import Bundle
from mio_export.console.progress import Progress
from mio_export.decoding import Decoder
from mio_export.embedding.versions import difference, versions_here
from mio_export.errors import SpaceError
from mio_export.evidence import Budget, Comparison, ParityReport, budget_for
from mio_export.limits import Limits
from mio_export.parity.report import compare
from mio_export.preprocess import DecodeError, Pixels
from mio_export.runtimes import Choice, Selected
from mio_export.sources import SourceFile, evenly_spaced
from mio_export.store import (
    FAILED,
    Span,
    StoreInfo,
    Vector,
    iter_columns,
    next_number,
    read_vectors,
    shard_number,
    shard_paths,
    write_info,
)

_SAMPLE = 32
_CANDIDATES = 8 * _SAMPLE
"""Files that are read to find the sample; those whose bytes changed or that cannot be read are passed over."""


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A file of the collection whose row has a vector that other versions computed."""

    file: SourceFile
    sha256: str
    path: Path
    row: int


def continued(
    selected: Selected,
    info: StoreInfo,
    out: Path,
    files: Sequence[SourceFile],
    progress: Progress,
    *,
    limits: Limits,
) -> StoreInfo:
    """Return the store's description with the versions that run here in its last span, and write it down.

    Where other versions computed what the store holds, some of its files are embedded again first.

    Args:
        selected: what embeds; its bundle has the budget that it was proved with.
        info: the store's description so far.
        out: the store's folder, locked.
        files: the collection.
        progress: shows what the comparison gave.
        limits: what one file may cost.

    Raises:
        SpaceError: the versions that run here give other vectors, or nothing is left that could be compared.
    """
    versions = versions_here(selected.choice.runtime)
    first = next_number(out, info.part)
    spans = tuple(span for span in info.spans if span.first_shard < first)  # of what was pruned or never written
    if shard_paths(out) and (not spans or spans[-1].versions != versions):
        _check_agreement(selected, info, out, files, versions, progress, limits)
    if not spans or spans[-1].versions != versions:
        spans = (*spans, Span(first_shard=first, versions=versions))
    if spans != info.spans:
        info = replace(info, spans=spans)
        write_info(out, info)
    return info


def _check_agreement(
    selected: Selected,
    info: StoreInfo,
    out: Path,
    files: Sequence[SourceFile],
    versions: Mapping[str, str],
    progress: Progress,
    limits: Limits,
) -> None:
    others = [span.versions for span in info.spans if span.versions != versions]
    change = difference(versions, others[-1] if others else {})
    remedy = "install those versions again, or choose another -o"
    stored, num_vectors = _stored(info, out, files, versions)
    if not num_vectors:
        return  # other versions left no vector behind that this run's could be mixed with
    sample, pixels = _read_again(stored, selected.bundle, info, limits)
    if not sample:
        raise SpaceError(
            f"{out} was made with {change}, and none of its files is still there unchanged and readable, so nothing can"
            f" be compared; {remedy}"
        )
    compared = _compared(selected, info, sample, pixels)
    numbers = (
        f"{len(sample)} of its files, embedded again, have a relative error of {compared.max_relative_error:.1e} at"
        f" most and a cosine of {compared.min_cosine:.7f} at least"
    )
    if compared.problems:
        raise SpaceError(
            f"{out} was made with {change}, and the vectors do not agree: {numbers}"
            f" ({'; '.join(compared.problems)}); {remedy}"
        )
    progress.line(f"{out} was made with {change}; they agree: {numbers}")


def _stored(
    info: StoreInfo, out: Path, files: Sequence[SourceFile], versions: Mapping[str, str]
) -> tuple[list[_Stored], int]:
    """Return files, evenly evenly_spaced, with a vector of other versions; and how many such vectors there are."""
    place_of = {file.key: place for place, file in enumerate(files)}
    where = np.full((len(files), 2), -1, np.int64)  # shard and row of the vector that counts
    counted: set[str] = set()
    paths = shard_paths(out)
    for number, rows in enumerate(iter_columns(out, info, ("key", "size", "status"))):
        is_other = info.versions_of(shard_number(paths[number])) != versions
        for row, (key, size, status) in enumerate(rows):
            fits = is_other and status != FAILED
            (counted.add if fits else counted.discard)(key)
            place = place_of.get(key)
            if place is not None:
                where[place] = (number, row) if fits and files[place].size == size else -1
    chosen = np.flatnonzero(where[:, 0] >= 0)
    chosen = np.array(evenly_spaced(chosen.tolist(), _CANDIDATES), np.int64)
    hashes = dict(_hashes(info, out, {int(number) for number in where[chosen, 0]}))
    return [
        _Stored(
            file=files[place],
            sha256=hashes[int(where[place, 0])][int(where[place, 1])],
            path=paths[int(where[place, 0])],
            row=int(where[place, 1]),
        )
        for place in chosen.tolist()
    ], len(counted)


def _hashes(info: StoreInfo, out: Path, numbers: set[int]) -> Mapping[int, list[str]]:
    columns = iter_columns(out, info, ("sha256",))
    return {number: [row[0] for row in rows] for number, rows in enumerate(columns) if number in numbers}


def _read_again(
    stored: Sequence[_Stored], bundle: Bundle, info: StoreInfo, limits: Limits
) -> tuple[list[_Stored], list[Pixels]]:
    """Read and decode files whose bytes are those of their row, up to the sample's size."""
    sample, pixels = [], []
    order = sorted(
        range(len(stored)), key=lambda index: (index % (_CANDIDATES // _SAMPLE), index)
    )  # evenly_spaced, too
    with Decoder(bundle.manifest.preprocess, scaled=info.decode == "scaled", limits=limits) as decoder:
        for index in order:
            found = stored[index]
            try:
                data = found.file.read(decoder.limits.max_file_bytes)[0]
                if hashlib.sha256(data).hexdigest() != found.sha256:
                    continue
                pixels.append(decoder.decode(data))
            except (OSError, DecodeError, MemoryError):
                continue
            sample.append(found)
            if len(sample) == _SAMPLE:
                break
    return sample, pixels


def _compared(selected: Selected, info: StoreInfo, sample: Sequence[_Stored], pixels: Sequence[Pixels]) -> Comparison:
    """Embed the sample, and hold it to the artifact's budget; among so few, neighbours say nothing."""
    before: list[Vector] = [read_vectors(found.path, info)[found.row] for found in sample]
    size, runtime, device = info.batch_size, selected.runtime, selected.choice.device
    starts = range(0, len(pixels), size)
    now = np.concatenate([runtime.embed(np.stack(pixels[start : start + size])) for start in starts])
    comparable = np.any(np.stack(before), axis=1) | np.any(now, axis=1)  # two zero vectors have no cosine
    budget = replace(_budget(selected.bundle, selected.choice), top1=0.0, recall_at_10=0.0)
    return compare(np.stack(before)[comparable], now[comparable], budget=budget, batch_size=size, device=device)


def _budget(bundle: Bundle, choice: Choice) -> Budget:
    """Return the bounds that the artifact was proved with; for the weights themselves, those of fp32."""
    wanted = (
        {"precision": "fp32"} if choice.runtime == "torch" else {"runtime": choice.runtime, "sha256": choice.sha256}
    )
    for artifact in bundle.artifacts(**wanted):
        return ParityReport.load(bundle.file(artifact.parity.report)).budget
    return budget_for("fp32", own_rms_error=0.0, own_row_error=0.0)
