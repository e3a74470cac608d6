"""What is asked of a run, and every choice of a store resolved before the first image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from mio_export.bundle import WEIGHTS, Bundle
from mio_export.console.progress import Progress
from mio_export.embedding.decode_mode import resolve_decode
from mio_export.embedding.partition import part_of
from mio_export.errors import GateError, SpaceError, UsageError
from mio_export.limits import Limits
from mio_export.runtimes import BACKENDS, Selected, choose
from mio_export.runtimes.selection import first_installed
from mio_export.runtimes.timing import best_batch, fastest
from mio_export.sources import SourceFile
from mio_export.store import STORE, Part, StoreInfo, read_info, shard_paths, write_info

BATCH_SIZE = 32
SHARD_SIZE = 4096
_KEPT = ("runtime", "precision", "device", "batch_size", "shard_size", "decode")
"""What a store keeps of its first run, where a later one leaves it open."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """What was asked for, as ``embed`` has it; ``auto`` and None leave it to the store, or to what is measured."""

    runtime: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    batch_size: int | None = None
    shard_size: int | None = None
    decode: str = "auto"
    shard: str | None = None
    cache: Path | None = None
    engine: str = "local"
    address: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.decode not in ("auto", "full", "scaled"):
            raise UsageError(f"decode must be auto, full or scaled, got {self.decode!r}")


@contextmanager
def resolved(
    bundle: Bundle, out: Path, files: Sequence[SourceFile], options: EmbedOptions, progress: Progress
) -> Iterator[tuple[StoreInfo, Selected]]:
    """Resolve every choice, and write a new store's down at once; one without a single row counts as new.

    Yields:
        The store's description, and the artifact: open if it had to be measured, and closed at the end.

    Raises:
        UsageError: an option is not allowed, or differs from what the store was created with.
        GateError: the folder holds shards but no description.
        SpaceError: the store holds vectors of another space, artifact, precision, decode mode or runtime.
    """
    part = part_of(options.shard, files) if options.shard is not None else None
    stored = _stored(out)
    if stored is not None:
        _check_comparable(stored, options, bundle, out)
        left_open = [name for name in _KEPT if getattr(options, name) in ("auto", None)]
        options = replace(options, **{name: getattr(stored, name) for name in left_open})
    with _selected(bundle, options, progress) as selected:
        choice, manifest = selected.choice, bundle.manifest
        info = StoreInfo(
            bundle=manifest.name,
            space=manifest.space,
            artifact_file=choice.file,
            artifact_sha256=choice.sha256,
            precision=choice.precision,
            decode=resolve_decode(options.decode, selected, files, limits=options.limits, progress=progress),
            runtime=choice.runtime,
            device=choice.device,
            embedding_dim=manifest.encoder.embedding_dim,
            normalized=manifest.encoder.normalize,
            batch_size=options.batch_size if options.batch_size is not None else _batch_size(selected, part, progress),
            shard_size=options.shard_size if options.shard_size is not None else SHARD_SIZE,
            part=part,
        )
        _check_sizes(info, bundle)
        if stored is None:
            write_info(out, info)
        else:
            _check_same(stored, info, out)
        yield stored or info, selected


def _selected(bundle: Bundle, options: EmbedOptions, progress: Progress) -> Selected:
    """Choose the artifact; the parts of a collection must choose alike, so none of them measures."""
    runtime, precision, device = options.runtime, options.precision, options.device
    if runtime != "auto":
        return Selected(bundle, choose(bundle, runtime, precision=precision, device=device))
    if options.shard is not None:
        return Selected(bundle, first_installed(bundle, precision=precision, device=device))
    return fastest(bundle, precision=precision, device=device, progress=progress)


def _stored(out: Path) -> StoreInfo | None:
    """Return what a store was created with; None if it has no row yet, so that every choice is still free."""
    has_rows = bool(shard_paths(out))
    stored = read_info(out)
    if stored is None and has_rows:
        raise GateError(f"{out} holds shards but no {STORE} to say what they are; choose another -o")
    return stored if has_rows else None


def _check_comparable(stored: StoreInfo, options: EmbedOptions, bundle: Bundle, out: Path) -> None:
    """Refuse another space or runtime before anything is looked for on this machine."""
    if stored.space != bundle.manifest.space:
        raise SpaceError(
            f"{out} holds vectors of another embedding space ({stored.bundle}, {stored.space[:12]}…)"
            f" than {bundle.path} ({bundle.manifest.space[:12]}…); choose another -o"
        )
    if options.runtime not in ("auto", stored.runtime) and options.runtime in BACKENDS:
        wished = (BACKENDS[options.runtime].format, stored.precision)
        files = [a.file for a in bundle.manifest.artifacts if (a.format, a.precision) == wished]
        raise SpaceError(
            f"{out} holds vectors of {stored.artifact_file} in {stored.runtime}, not of {(files or [WEIGHTS])[0]} in"
            f" {options.runtime}; leave --runtime out, or choose another -o"
        )


def _batch_size(selected: Selected, part: Part | None, progress: Progress) -> int:
    """Return the batch size where none was asked for; parts must choose alike, so none of them measures."""
    device, largest = selected.choice.device, selected.bundle.manifest.max_batch
    if device == "cpu" or part is not None:
        return min(BATCH_SIZE, largest)
    found = best_batch(selected.runtime, largest)
    progress.line(f"batches of {found} images, the best of those that were tried on {device}")
    return found


def _check_sizes(info: StoreInfo, bundle: Bundle) -> None:
    largest = bundle.manifest.max_batch
    if not 1 <= info.batch_size <= largest:
        raise UsageError(
            f"batch size must be 1 to {largest} (the largest that {bundle.path} was proved at), got {info.batch_size}"
        )
    if info.shard_size < 1:
        raise UsageError(f"shard size must be 1 or more, got {info.shard_size}")


def _check_same(stored: StoreInfo, info: StoreInfo, out: Path) -> None:
    if stored.identity != info.identity:
        raise SpaceError(
            f"{out} holds vectors of {stored.artifact_file} ({stored.runtime}, {stored.precision}, {stored.decode}"
            f" decoding, {stored.artifact_sha256[:12]}…), not of {info.artifact_file} ({info.runtime},"
            f" {info.precision}, {info.decode} decoding, {info.artifact_sha256[:12]}…); choose another -o"
        )
    for attribute in ("device", "batch_size", "shard_size"):
        if getattr(stored, attribute) != getattr(info, attribute):
            name = f"--{attribute.replace('_', '-')}"
            raise UsageError(
                f"{out} was created with {name} {getattr(stored, attribute)}, got {getattr(info, attribute)};"
                f" leave {name} out, or choose another -o"
            )
    if str(stored.part) != str(info.part):
        begun = f"with --shard {stored.part}" if stored.part else "without --shard"
        raise UsageError(f"{out} was created {begun}; use the same, or choose another -o")
    if stored.part != info.part:
        then, now = (part.num_files if part else 0 for part in (stored.part, info.part))
        raise UsageError(
            f"the collection has changed since {out} was created ({then:,} files, now {now:,}), so its parts would not"
            " fit; begin them in another -o"
        )
