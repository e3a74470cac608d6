"""``quickstart``: the whole path on the embedded sample, from images to verified embeddings."""

from dataclasses import dataclass
from pathlib import Path

from mio_export.bundle import Bundle
from mio_export.console.progress import Progress
from mio_export.embedding import EmbedResult, embed
from mio_export.errors import GateError
from mio_export.exporting import export
from mio_export.parity import EVERYTHING, Verification, verify
from mio_export.sample import extract_sample
from mio_export.train import Evaluation, Recipe, evaluate, recipe_from_dict, train

FORMATS = ("onnx", "torchscript")


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """Everything that quickstart made."""

    folder: Path
    bundle: Bundle
    recipe: Recipe
    evaluation: Evaluation
    verification: Verification
    embedded: EmbedResult


def quickstart(
    folder: str | Path = "mio-quickstart", *, objective: str = "mio", seed: int = 0, progress: Progress | None = None
) -> QuickstartResult:
    """Train on the sample, evaluate, export, verify and embed it.

    Leaves ``images/``, ``run/``, ``sample.mio`` and ``embeddings/`` in the folder. What is finished there already is
    used again, so that an interrupted quickstart goes on where it stopped.

    Args:
        folder: where to work.
        objective: ``mio``, ``minc`` or ``spectral``.
        seed: seed of the training run.
        progress: is told how far the work is.

    Raises:
        GateError: an artifact does not give the encoder's embeddings.
        UsageError: the objective is unknown, or the folder holds a quickstart with other settings.
    """
    folder = Path(folder)
    progress = progress or Progress()
    recipe = recipe_from_dict({"objective": objective, "seed": seed})
    images, run, path = folder / "images", folder / "run", folder / "sample.mio"
    progress.line("1/5  unpacking the sample: 5,000 training and 1,000 test images of Fashion-MNIST")
    extract_sample(images)
    progress.line("2/5  training")
    trained = train(recipe, images, run, resume=(run / "recipe.json").is_file(), progress=progress)
    progress.line("3/5  evaluating")
    evaluation = evaluate(run, images, progress=progress)
    progress.line("4/5  exporting, each artifact proved on the 1,000 test images")
    exported = export(
        run,
        path,
        formats=FORMATS,
        images=images / "test",
        limit=1_000,
        progress=progress,
    )
    verification = verify(path, images=images / "test", limit=1_000, runtimes=EVERYTHING)
    if not verification.passed:
        raise GateError(f"{path} does not pass its own verification")
    progress.line("5/5  embedding the 1,000 test images")
    embedded = embed(path, images / "test", folder / "embeddings", progress=progress)
    return QuickstartResult(
        folder=folder,
        bundle=exported.bundle,
        recipe=trained.recipe,
        evaluation=evaluation,
        verification=verification,
        embedded=embedded,
    )
