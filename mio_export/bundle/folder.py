"""The bundle ``NAME.mio/`` on disk: its manifest and every file that this names, in one folder."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mio_export.bundle.manifest import (
    MANIFEST,
    PAGE,
    REPORTS,
    SCHEMA_VERSION,
    SIGNATURE,
    Artifact,
    Manifest,
    digest_of,
    named_files,
    space_fingerprint,
)
from mio_export.errors import GateError, UsageError
from mio_export.files import sha256_file, write_text
from mio_export.schema import parse_json


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Return the path of a file of the bundle.

        Raises:
            GateError: it lies outside, be it by its name or behind a link, or no file can have the name.
        """
        path = self.path / name
        try:
            is_inside = path.resolve().is_relative_to(self.path.resolve())
        except (OSError, ValueError):
            is_inside = False
        if not is_inside:
            raise GateError(f"{str(path)[:300]} lies outside the bundle; export it again")
        return path

    def artifacts(self, **wanted: str) -> list[Artifact]:
        """Return the artifacts whose attributes are those given, such as ``runtime="openvino", verdict="proved"``."""
        return [
            artifact
            for artifact in self.manifest.artifacts
            if all(getattr(artifact, name) == value for name, value in wanted.items())
        ]


def load_bundle(path: str | Path) -> Bundle:
    """Open a bundle; nothing but its manifest is read.

    Raises:
        UsageError: there is no bundle at ``path``.
        GateError: its manifest is damaged.
        MioError: it was written by a newer mio-export.
    """
    path = Path(path)
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path} is not a bundle (it holds no {MANIFEST}); make one with: mio export") from None
    except NotADirectoryError:
        raise UsageError(f"{path} is a file; a bundle is a folder NAME.mio") from None
    manifest = parse_json(text, Manifest, where=path / MANIFEST, newest=SCHEMA_VERSION)
    if manifest.digest != digest_of(json.loads(text)):
        raise GateError(f"{path / MANIFEST} is damaged: it was changed after it was written (its digest does not fit)")
    return Bundle(path=path, manifest=manifest)


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into a bundle's folder."""
    write_text(folder / MANIFEST, manifest.to_json())


def unnamed_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return what else lies in a bundle's folder, relative to it: neither named by the manifest nor ours.

    Ours are its page, its signature, its lock, reports that a later verdict replaced, and what a killed process left;
    never a link, behind which another file would be written.
    """
    named = dict(named_files(manifest))
    return sorted(
        name
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
        if (name := path.relative_to(folder).as_posix()) not in named and (path.is_symlink() or not _is_ours(name))
    )


def _is_ours(name: str) -> bool:
    path = PurePosixPath(name)
    is_report = str(path.parent) == REPORTS and path.suffix == ".json"
    return name in (MANIFEST, PAGE, SIGNATURE) or is_report or path.name.startswith(".")


def broken_files(bundle: Bundle) -> list[str]:
    """Check every hash of a bundle; return one line for each file that is missing or is not what it was."""
    manifest = bundle.manifest
    problems = []
    for name, sha256 in named_files(manifest):
        try:
            problem = _file_problem(bundle.path, name, sha256)
        except (OSError, ValueError) as error:  # a name that no file can have, or a file that cannot be read
            problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        if problem is not None:
            problems.append(f"{name[:200]}: {problem}")
    space = space_fingerprint(
        weights_sha256=manifest.weights_sha256, encoder=manifest.encoder, preprocess=manifest.preprocess
    )
    if space != manifest.space:
        problems.append(f"{MANIFEST}: the space fingerprint does not fit the encoder and preprocessing beside it")
    return problems


def copy_bundle(bundle: Bundle, folder: Path) -> None:
    """Copy what belongs to a bundle, and nothing else, to a folder; every hash is checked before and after.

    Raises:
        GateError: a file is missing or is not what the manifest says; the copy may be incomplete then.
    """
    broken = broken_files(bundle)
    for name in [] if broken else [MANIFEST, PAGE, SIGNATURE, *dict(named_files(bundle.manifest))]:
        if name not in (PAGE, SIGNATURE) or bundle.file(name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(name), folder / name)
    if broken := broken or broken_files(load_bundle(folder)):
        raise GateError("\n     ".join([f"{bundle.path} is not what was proved; nothing is deployed", *broken]))


def _file_problem(folder: Path, name: str, sha256: str) -> str | None:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        return "lies outside the bundle"
    if not file.is_file():
        return "missing"
    found = sha256_file(file)
    return None if found == sha256 else f"sha256 is {found[:12]}…, the manifest says {sha256[:12]}…"


__all__ = [
    "Bundle",
    "broken_files",
    "copy_bundle",
    "load_bundle",
    "save_manifest",
    "unnamed_files",
]
