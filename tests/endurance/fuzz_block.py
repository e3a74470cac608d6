"""Work through a block of mutants of one kind; what breaks is one JSON line, by the number of its mutant.

    python tests/endurance/fuzz_block.py KIND FIRST COUNT BUNDLE STORE FOLDER

With ``folder=PATH`` for KIND the mutants are the files that lie there, in order; with ``every`` they are of all kinds
in turn. One mutant alone (COUNT 1) is left in FOLDER, to look at. Lines are ``{"at": N}`` before each mutant,
``{"found": N, "what": ...}``, and ``{"done": true}``.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import originals
from mutants import ARCHIVES, IMAGES, KINDS, mutant

from mio_export.bundle import load_bundle
from mio_export.embedding import embed
from mio_export.errors import MioError
from mio_export.inspection import describe
from mio_export.parity import verify
from mio_export.preprocess import DecodeError
from mio_export.sources import list_sources
from mio_export.store import load_embeddings, read_rows

MOST_BYTES = 1 << 30
_ADDRESSES = 8 << 30  # a fault shall not take the machine with it
OPTIONS = {"runtime": "onnxruntime", "decode": "full", "shard_size": 256, "batch_size": 32}


def say(**content: object) -> None:
    os.write(1, json.dumps(content).encode() + b"\n")


def peak_bytes() -> int:
    """The most memory that this process has had; not that of its parent, as ``ru_maxrss`` may be."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def described(error: BaseException) -> str:
    """An error and the line of this project that it came through last."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "mio_export" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "fuzz_block"
    return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:150]}"


class Block:
    """A kind of mutants and what is to hold of each."""

    def __init__(self, kind: str, bundle: Path, store: Path, folder: Path) -> None:
        self.kind, self.bundle, self.store, self.folder = kind, bundle, store, folder
        self.preprocess = load_bundle(bundle).manifest.preprocess
        self.sound: list[Path] = []
        for source, name in ((bundle, "manifest"), (store, "store")):
            if kind == name:
                shutil.copytree(source, folder / name, dirs_exist_ok=True)
        if kind == "list":
            originals.write_listed(folder)
        self.files = list_sources([kind.removeprefix("folder=")]).files if kind.startswith("folder=") else None

    def check(self, number: int) -> None:
        """Raise what breaks the rules for one mutant.

        Raises:
            AssertionError: or any other error.
        """
        if self.files is not None:
            self._image(self.files[number].read()[0])
            return
        name, data = mutant(self.kind, number, bundle=self.bundle, store=self.store)
        if self.kind in ("manifest", "store"):
            (self.folder / self.kind / name).write_bytes(data)
            self._description(self.folder / self.kind)
            return
        path = self.folder / f"{number:06d}{name.removeprefix('mutant')}"
        path.write_bytes(data)
        if self.kind in IMAGES:
            self._image(data)
        else:
            self._archive(path)
        self.sound.append(path)

    def _image(self, data: bytes) -> None:
        try:
            pixels = self.preprocess.decode(data)
        except DecodeError as error:
            reason = str(error)
        else:
            assert pixels.shape == self.preprocess.shape
            return
        assert self.kind != "exif", f"a whole image fails for its EXIF: {reason}"
        assert reason.strip(), "no reason is given"
        assert "\n" not in reason, reason

    def _archive(self, path: Path) -> None:
        try:
            files = list_sources([path]).files
        except MioError:
            return
        for file in files:
            assert -(2**63) <= file.mtime_ns < 2**63, file
            assert 0 <= file.size < 2**63, file
            with contextlib.suppress(OSError):
                file.read()
        keys = [file.key.encode() for file in files]
        assert keys == sorted(set(keys)), "keys are not unique, or not in order"

    def _description(self, folder: Path) -> None:
        """Read a bundle or a store as each command does; only an error of the project's own may come out."""
        readers: tuple[Callable[[Path], object], ...] = (
            (load_bundle, verify, describe) if self.kind == "manifest" else (load_embeddings, describe)
        )
        for read in readers:
            with contextlib.suppress(MioError):
                read(folder)

    def embed(self) -> None:
        """Embed all mutants that are sound so far at once; each entry has its row, and a second run nothing to do.

        Raises:
            AssertionError: one has none, or a failed row no reason.
        """
        if self.kind not in (*ARCHIVES, *IMAGES) or not self.sound:
            return
        folder = self.folder / "sound"
        if self.kind in IMAGES:
            folder.mkdir()
            for path in self.sound:
                path.rename(folder / path.name)
        sources = [folder] if self.kind in IMAGES else self.sound
        keys = [file.key for file in list_sources(sources).files]
        if not keys:
            return
        out = self.folder / "out"
        embed(self.bundle, sources, out, **OPTIONS)
        rows = read_rows(out)
        assert sorted(row.key for row in rows) == sorted(keys), f"{len(keys)} entries, {len(rows)} rows"
        for row in rows:
            assert (row.status == "failed") == (row.stage is not None), row
            assert row.status != "failed" or (row.reason and "\n" not in row.reason), row
        assert embed(self.bundle, sources, out, **OPTIONS).num_embedded == 0, "a second run found something to do"


class Every:
    """Mutants of all kinds in turn; they are not embedded."""

    def __init__(self, *places: Path) -> None:
        self.blocks = [Block(kind, *places) for kind in KINDS]
        self.sound: list[Path] = []

    def check(self, number: int) -> None:
        """Raise what breaks the rules for one mutant, which is named by its kind then.

        Raises:
            AssertionError: or any other error.
        """
        block = self.blocks[number % len(KINDS)]
        try:
            block.check(number // len(KINDS))
        except Exception as error:
            raise AssertionError(f"{block.kind} {number // len(KINDS)}: {described(error)}") from error

    def embed(self) -> None:
        """Do nothing: the whole search does."""


def planted(kind: str, number: int) -> None:
    """The faults that show that the search finds some."""
    if number != 3:
        return
    match kind:
        case "planted-hang":
            time.sleep(60)
        case "planted-crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "planted-memory":
            b"x" * MOST_BYTES
        case "planted-traceback":
            raise IndexError("planted")


def main(kind: str, first: int, count: int, bundle: Path, store: Path, folder: Path) -> None:
    """Work through the mutants from ``first`` on."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    warnings.simplefilter("ignore")
    folder.mkdir(parents=True, exist_ok=True)
    block: Block | Every | None = None
    if not kind.startswith("planted"):
        block = Every(bundle, store, folder) if kind == "every" else Block(kind, bundle, store, folder)
    for number in range(first, first + count):
        say(at=number)
        try:
            block.check(number) if block else planted(kind, number)
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            say(found=number, what=described(error))
            if count == 1:
                traceback.print_exc()
        if peak_bytes() > MOST_BYTES:
            say(found=number, what=f"{peak_bytes() / 2**20:,.0f} MiB of memory")
            sys.exit(9)
    if block and count > 1:
        say(at=-1)
        try:
            block.embed()
        except Exception as error:  # noqa: BLE001
            say(found=-1, what=f"embedding {len(block.sound)} of the {count} mutants from {first}: {described(error)}")
        if peak_bytes() > MOST_BYTES:
            say(found=-1, what=f"embedding mutants from {first}: {peak_bytes() / 2**20:,.0f} MiB of memory")
    say(done=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *map(Path, sys.argv[4:7]))
