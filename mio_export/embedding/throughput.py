"""What limits embedding of a collection on this machine: decoding alone, the model alone, and both together."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mio_export.bundle import Bundle, load_bundle
from mio_export.console.progress import Progress
from mio_export.decoding import Decoder
from mio_export.embedding.decode_mode import resolve_decode
from mio_export.embedding.pipeline import Embedder, StageTimer, decode
from mio_export.errors import GateError, MioError, UsageError
from mio_export.runtimes import Choice, Runtime
from mio_export.runtimes.devices import num_threads
from mio_export.runtimes.timing import Rates, fastest, timed_rounds
from mio_export.sources import SourceFile, evenly_spaced, list_sources, named

_ROUNDS = 3
_FEW = 16


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Images/s of a collection; each the best of three rounds, the stages in turns."""

    choice: Choice
    decode: str
    """``full`` or ``scaled``."""
    num_images: int
    """Of the collection, that were measured on; their bytes were in memory."""
    decoding: float
    """Reading and decoding alone, on all cores."""
    inference: float
    """The artifact alone, on all cores or the GPU."""
    end_to_end: float
    """Both together, without writing."""

    @property
    def share(self) -> float:
        """End to end, of what both allow: sharing the cores on a CPU, side by side on a GPU."""
        d, m = self.decoding, self.inference
        return self.end_to_end / (min(d, m) if self.choice.device != "cpu" else 1 / (1 / d + 1 / m))

    @property
    def limited_by(self) -> str:
        """``decode`` or ``infer``, whichever takes longer."""
        return "decode" if self.decoding < self.inference else "infer"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {**asdict(self), "limited_by": self.limited_by, "share": self.share}

    def lines(self) -> list[str]:
        """Return what was measured, in words."""
        return [
            f"{self.num_images:,} of your images with {self.choice.runtime} {self.choice.precision}"
            f" ({self.decode} decoding): decode alone {self.decoding:,.1f}/s, model alone {self.inference:,.1f}/s,"
            f" end to end {self.end_to_end:,.1f}/s",
            f"limited by {self.limited_by}; end to end is {self.share:.0%} of what both allow",
        ]


def measure(
    bundle: Bundle | str | Path,
    source: str | Path | Sequence[str | Path],
    *,
    batch_size: int = 32,
    seconds: float = 10.0,
    device: str = "auto",
) -> Throughput:
    """Measure how fast ``embed`` with its own choices goes through a collection, and each of its stages alone.

    Args:
        bundle: a bundle or its path.
        source: as ``embed`` takes it.
        batch_size: images embedded at once.
        seconds: how long to measure, about; it decides how many images are taken.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UsageError: the batch size is not allowed, or a source is missing.
        MioError: the source holds no images.
        GateError: none of them can be read.
    """
    opened = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    if not 1 <= batch_size <= opened.manifest.max_batch:
        raise UsageError(f"batch_size must be 1 to {opened.manifest.max_batch}, got {batch_size}")
    specs = [source] if isinstance(source, str | Path) else list(source)
    files = list_sources(specs).files
    if not files:
        raise MioError(f"no images found in {named(specs)}")
    preprocess = opened.manifest.preprocess
    with fastest(opened, device=device, progress=Progress()) as selected, ThreadPoolExecutor(num_threads()) as pool:
        mode = resolve_decode("auto", selected, files, progress=Progress())
        with Decoder(preprocess, scaled=mode == "scaled") as decoder:
            stages = _Stages(selected.runtime, decoder, pool, batch_size)
            few = evenly_spaced(files, _FEW)
            if not stages.decode(few):
                raise GateError(f"none of {len(few)} images of {named(specs)} can be read")
            stages.embed(few)  # first calls allocate
            per_image = float((1 / stages.rates(few, rounds=1)).sum())
            sample = evenly_spaced(files, min(len(files), max(batch_size, int(seconds / _ROUNDS / per_image))))
            rates = stages.rates(sample, rounds=_ROUNDS)
    decoding, inference, end_to_end = rates.max(axis=0).tolist()
    return Throughput(
        choice=selected.choice,
        decode=mode,
        num_images=len(sample),
        decoding=decoding,
        inference=inference,
        end_to_end=end_to_end,
    )


class _Stages:
    """What ``embed`` does with files, stage by stage; each method returns how many images it did."""

    def __init__(self, runtime: Runtime, decoder: Decoder, pool: ThreadPoolExecutor, batch_size: int) -> None:
        self._runtime, self._decoder, self._pool, self._batch_size = runtime, decoder, pool, batch_size
        self._images = np.zeros((batch_size, *runtime.image_shape), np.uint8)

    def rates(self, files: Sequence[SourceFile], *, rounds: int) -> Rates:
        """Return images/s of decoding, of inference and of both together, shape (rounds, 3)."""
        works = [partial(stage, files) for stage in (self.decode, self.infer, self.embed)]
        return timed_rounds(works, rounds=rounds, warm_up=False)

    def decode(self, files: Sequence[SourceFile]) -> int:
        decoded = partial(decode, decoder=self._decoder, max_bytes=self._decoder.limits.max_file_bytes)
        return sum(found.pixels is not None for found in self._pool.map(decoded, files))

    def infer(self, files: Sequence[SourceFile]) -> int:
        return sum(len(self._runtime.embed(self._images)) for _ in range(-(-len(files) // self._batch_size)))

    def embed(self, files: Sequence[SourceFile]) -> int:
        embedder = Embedder(self._runtime, self._decoder, self._pool, batch_size=self._batch_size, timer=StageTimer())
        return sum(row.has_vector for row in embedder.embed(files).rows)
