"""Every choice of a store, settled before the first image: those it was begun with, else those given."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mio_export.bundle import WEIGHTS, Bundle
from mio_export.embedding.choices import best_batch, fastest, first_installed, settle_decoding
from mio_export.embedding.parts import part_of
from mio_export.errors import GateError, SpaceError, UsageError
from mio_export.limits import Limits
from mio_export.progress import Progress
from mio_export.runtimes import BACKENDS, Choice, choose
from mio_export.runtimes.registry import open_choice
from mio_export.sources import SourceFile
from mio_export.store import STORE, Part, StoreInfo, read_info, shard_paths, write_info

BATCH_SIZE = 32
SHARD_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What was asked for; ``auto`` and None leave it to the store, or to what is measured."""

    runtime: str
    precision: str
    device: str
    batch_size: int | None
    shard_size: int | None
    decode: str
    shard: str | None


def settle(
    bundle: Bundle, out: Path, files: Sequence[SourceFile], wishes: Wishes, progress: Progress, *, limits: Limits
) -> tuple[StoreInfo, Choice]:
    """Settle every choice, and write a new store's down at once; one without a single row counts as new.

    Raises:
        UsageError: a wish is not allowed, or differs from what the store was begun with.
        GateError: the folder holds shards but no description.
        SpaceError: the store holds vectors of another space, artifact, precision, decode mode or runtime.
    """
    if wishes.decode not in ("auto", "full", "scaled"):
        raise UsageError(f"decode must be auto, full or scaled, got {wishes.decode!r}")
    part = part_of(wishes.shard, files) if wishes.shard is not None else None
    stored = _begun(out)
    runtime, precision, device, decode = wishes.runtime, wishes.precision, wishes.device, wishes.decode
    batch_size, shard_size = wishes.batch_size, wishes.shard_size
    if stored is not None:
        runtime = stored.runtime if runtime == "auto" else runtime
        precision = stored.precision if precision == "auto" else precision
        device = stored.device if device == "auto" else device
        batch_size = stored.batch_size if batch_size is None else batch_size
        shard_size = stored.shard_size if shard_size is None else shard_size
        decode = stored.decode if decode == "auto" else decode
        _check_comparable(stored, wishes, bundle, out)
    # the parts of a collection must choose alike, so none of them measures
    if runtime != "auto":
        choice = choose(bundle, runtime, precision=precision, device=device)
    elif part is None:
        choice = fastest(bundle, precision=precision, device=device, progress=progress)
    else:
        choice = first_installed(bundle, precision=precision, device=device)
    info = StoreInfo(
        bundle=bundle.manifest.name,
        space=bundle.manifest.space,
        artifact_file=choice.file,
        artifact_sha256=choice.sha256,
        precision=choice.precision,
        decode=settle_decoding(decode, bundle, choice, files, limits=limits, progress=progress),
        runtime=choice.runtime,
        device=choice.device,
        embedding_dim=bundle.manifest.encoder.embedding_dim,
        normalized=bundle.manifest.encoder.normalize,
        batch_size=_settled_batch(bundle, choice, part, progress) if batch_size is None else batch_size,
        shard_size=SHARD_SIZE if shard_size is None else shard_size,
        part=part,
    )
    _check_sizes(info, bundle)
    if stored is None:
        write_info(out, info)
    else:
        _check_same(stored, info, out)
    return stored or info, choice


def _begun(out: Path) -> StoreInfo | None:
    """Return what a store was begun with; None if it has no row yet, so that every choice is still free."""
    has_rows = bool(shard_paths(out))
    stored = read_info(out)
    if stored is None and has_rows:
        raise GateError(f"{out} holds shards but no {STORE} to say what they are; choose another -o")
    return stored if has_rows else None


def _check_comparable(stored: StoreInfo, wishes: Wishes, bundle: Bundle, out: Path) -> None:
    """Refuse another space or runtime before anything is looked for on this machine."""
    if stored.space != bundle.manifest.space:
        raise SpaceError(
            f"{out} holds vectors of another embedding space ({stored.bundle}, {stored.space[:12]}…)"
            f" than {bundle.path} ({bundle.manifest.space[:12]}…); choose another -o"
        )
    if wishes.runtime not in ("auto", stored.runtime) and wishes.runtime in BACKENDS:
        wished = (BACKENDS[wishes.runtime].format, stored.precision)
        files = [a.file for a in bundle.manifest.artifacts if (a.format, a.precision) == wished]
        raise SpaceError(
            f"{out} holds vectors of {stored.artifact_file} in {stored.runtime}, not of {(files or [WEIGHTS])[0]} in"
            f" {wishes.runtime}; leave --runtime out, or choose another -o"
        )


def _settled_batch(bundle: Bundle, choice: Choice, part: Part | None, progress: Progress) -> int:
    """Return the batch size where none was asked for; parts must choose alike, so none of them measures."""
    largest = bundle.manifest.max_batch
    if choice.device == "cpu" or part is not None:
        return min(BATCH_SIZE, largest)
    with open_choice(bundle, choice) as runtime:
        found = best_batch(runtime, largest)
    progress.line(f"batches of {found} images, the best of those that were tried on {choice.device}")
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
    for field in ("device", "batch_size", "shard_size"):
        if getattr(stored, field) != getattr(info, field):
            name = f"--{field.replace('_', '-')}"
            raise UsageError(
                f"{out} was begun with {name} {getattr(stored, field)}, got {getattr(info, field)};"
                f" leave {name} out, or choose another -o"
            )
    if str(stored.part) != str(info.part):
        begun = f"with --shard {stored.part}" if stored.part else "without --shard"
        raise UsageError(f"{out} was begun {begun}; call it so again, or choose another -o")
    if stored.part != info.part:
        raise UsageError(
            f"the collection has changed since {out} was begun ({stored.part.num_files if stored.part else 0:,} files,"
            f" now {info.part.num_files if info.part else 0:,}), so its parts would not fit; begin them in another -o"
        )
