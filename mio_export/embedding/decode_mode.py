"""How large JPEGs are decoded: scaled, which is several times faster, where that keeps the embeddings of the files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mio_export.console.progress import Progress
from mio_export.decoding import Decoder
from mio_export.limits import Limits
from mio_export.parity.report import relative_errors
from mio_export.preprocess import DecodeError, Preprocess
from mio_export.runtimes import Selected
from mio_export.sources import SourceFile, evenly_spaced

_MAX_BATCH = 16
_SAMPLE = 24
_CANDIDATES = 400
MIN_SCALED_COSINE = 0.995
"""Scaled decoding is used where the user's own images keep at least this cosine with full decoding."""


def resolve_decode(
    decode: str, selected: Selected, files: Sequence[SourceFile], *, progress: Progress, limits: Limits | None = None
) -> str:
    """Turn ``auto`` into ``scaled`` or ``full``, by what scaled decoding does to embeddings of the files themselves.

    Args:
        decode: ``auto``, ``full`` or ``scaled``; only ``auto`` looks at any file.
        selected: what embeds, and whose contract decodes.
        files: the user's own.
        progress: is told what was found.
        limits: what one file may cost; None: the defaults.
    """
    if decode != "auto":
        return decode
    manifest = selected.bundle.manifest
    pairs = _both_ways(files, manifest.preprocess, limits)
    if not pairs:
        return "full"
    size = min(_MAX_BATCH, manifest.max_batch)
    whole, scaled = (np.stack([pair[side] for pair in pairs]) for side in (0, 1))
    a, b = (
        np.concatenate([selected.runtime.embed(part[start : start + size]) for start in range(0, len(part), size)])
        for part in (whole, scaled)
    )
    cosine = float(((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    found = (
        f"cosine {cosine:.4f} at worst, relative error {relative_errors(a, b).max():.3f}, on {len(pairs)} of your JPEGs"
    )
    if cosine >= MIN_SCALED_COSINE:
        progress.line(f"large JPEGs are decoded at a fraction of their size: {found}")
        return "scaled"
    progress.line(f"large JPEGs are decoded in full: scaled decoding moves embeddings too far ({found})")
    return "full"


def _both_ways(
    files: Sequence[SourceFile], preprocess: Preprocess, limits: Limits | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Decode some of the JPEGs that scaled decoding would touch, in full and scaled."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    named = [file for file in files if Path(file.key).suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif")]
    with Decoder(preprocess, limits=limits) as full, Decoder(preprocess, scaled=True, limits=limits) as scaled:
        for file in evenly_spaced(named, _CANDIDATES) if named else []:
            try:
                data, _ = file.read(full.limits.max_file_bytes)
                if full.can_scale(data):
                    pairs.append((full.decode(data), scaled.decode(data)))
            except (OSError, DecodeError, MemoryError):
                continue
            if len(pairs) == _SAMPLE:
                break
    return pairs


__all__ = ["MIN_SCALED_COSINE", "resolve_decode"]
