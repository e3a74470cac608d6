"""``mio quickstart``."""

from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import echo, print_evaluation, print_parity


def run(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to work in.")] = Path("mio-quickstart"),
    objective: Annotated[str, typer.Option(help="mio, minc, or another that mio train knows.")] = "mio",
    seed: Annotated[int, typer.Option(help="Seed of the training run.")] = 0,
) -> None:
    """See the whole path on the built-in sample.

    Trains, evaluates, exports, verifies and embeds it: a few minutes on two cores.

    Example:  mio quickstart --objective minc -o tour
    """
    from mio_export.console.progress import stderr_progress
    from mio_export.quickstart import quickstart
    from mio_export.train.run_files import REPORT

    result = quickstart(out, objective=objective, seed=seed, progress=stderr_progress())
    print_evaluation(result.evaluation)
    print_parity(result.verification.reports)
    echo(
        "", f"{result.embedded.num_ok:,} images embedded into {out / 'embeddings'}, the encoder is {out / 'sample.mio'}"
    )
    echo(f"report of the training: {out / 'run' / REPORT}")
    echo("", "With a folder of your own images:")
    echo("  mio train --objective mio --data PHOTOS -o RUN")
    echo("  mio export RUN -o NAME.mio -f onnx -f torchscript --images PHOTOS")
    echo("  mio embed NAME.mio PHOTOS -o EMBEDDINGS")
