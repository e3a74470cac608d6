"""Checkpoints of a run: written whole, the last two kept, a damaged one passed over."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from mio_export.console.progress import Progress
from mio_export.files import sha256_file, staged_file
from mio_export.train.run_files import CHECKPOINTS

_KEPT = 2
_HASH_LENGTH = 16
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.ckpt")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that is what it was when it was written."""

    path: Path
    state: dict[str, Any]
    """Lightning's: weights, target, Λ, optimiser, schedule, scaler, progress, callbacks; tensors and plain values."""


class Checkpoints:
    """The folder ``checkpoints/`` of a run; a file's name holds its step and the beginning of its sha256.

    All randomness of a step comes from the seed and the batch's number, so no generator's state need be kept.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / CHECKPOINTS

    def save(self, trainer: pl.Trainer) -> None:
        """Write the trainer's state; every process must call it, the first one writes."""
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self._folder / "unused")
            return
        self._folder.mkdir(exist_ok=True)
        with staged_file(self._folder / "newest.ckpt") as temporary:
            trainer.save_checkpoint(temporary)
        newest = self._folder / "newest.ckpt"
        sha256 = sha256_file(newest)[:_HASH_LENGTH]
        newest.replace(self._folder / f"step-{trainer.global_step:09d}-{sha256}.ckpt")
        for old in self._files()[_KEPT:]:
            old.unlink()

    def latest(self, progress: Progress) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, saying which ones are not; None if there is none."""
        for path in self._files():
            if sha256_file(path)[:_HASH_LENGTH] == path.stem.rsplit("-", 1)[-1]:
                state = torch.load(path, map_location="cpu", weights_only=True)
                return Checkpoint(path=path, state=state)
            progress.line(f"{path.name} is damaged and passed over")
        return None

    def clear(self) -> None:
        """Remove what is left of an earlier run."""
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        """All checkpoints, the newest first."""
        found = [path for path in self._folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (path.name[:14], path.stat().st_mtime_ns), reverse=True)
