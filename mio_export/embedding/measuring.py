"""What limits embedding of a collection on this machine: decoding alone, the model alone, and both together."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mio_export.bundle import Bundle, load_bundle
from mio_export.decoding import Decoder
from mio_export.embedding.choices import fastest, settle_decoding
from mio_export.embedding.pipeline import Embedder, StageTimer, decode
from mio_export.errors import GateError, MioError, UsageError
from mio_export.progress import Progress
from mio_export.runtimes import Choice
from mio_export.runtimes.devices import num_threads
from mio_export.runtimes.registry import open_choice
from mio_export.sources import SourceFile, list_sources, named, spread

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
    choice = fastest(opened, device=device, progress=Progress())
    mode = settle_decoding("auto", opened, choice, files, progress=Progress())
    preprocess = opened.manifest.preprocess

    with (
        open_choice(opened, choice) as runtime,
        ThreadPoolExecutor(num_threads()) as pool,
        Decoder(preprocess, scaled=mode == "scaled") as decoder,
    ):
        images = np.zeros((batch_size, *preprocess.shape), np.uint8)

        def decoded(some: Sequence[SourceFile]) -> int:
            results = pool.map(lambda file: decode(file, decoder, max_bytes=decoder.limits.max_file_bytes).pixels, some)
            return sum(pixels is not None for pixels in results)

        def inferred(some: Sequence[SourceFile]) -> int:
            return sum(len(runtime.embed(images)) for _ in range(-(-len(some) // batch_size)))

        def embedded(some: Sequence[SourceFile]) -> int:
            embedder = Embedder(runtime, decoder, pool, batch_size=batch_size, timer=StageTimer())
            return sum(row.has_vector for row in embedder.embed(some).rows)

        stages = (decoded, inferred, embedded)
        few = spread(files, _FEW)
        if not decoded(few):
            raise GateError(f"none of {len(few)} images of {named(specs)} can be read")
        embedded(few)  # first calls allocate
        per_image = sum(1 / _rate(stage, few) for stage in stages)
        sample = spread(files, min(len(files), max(batch_size, int(seconds / _ROUNDS / per_image))))
        rates = np.array([[_rate(stage, sample) for stage in stages] for _ in range(_ROUNDS)])
    decoding, inference, end_to_end = rates.max(axis=0).tolist()
    return Throughput(
        choice=choice,
        decode=mode,
        num_images=len(sample),
        decoding=decoding,
        inference=inference,
        end_to_end=end_to_end,
    )


def _rate(stage: Callable[[Sequence[SourceFile]], int], files: Sequence[SourceFile]) -> float:
    start = time.perf_counter()
    return stage(files) / (time.perf_counter() - start)
