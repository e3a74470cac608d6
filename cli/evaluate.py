"""``mio evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, print_evaluation, print_json


def run(
    path: Annotated[Path, typer.Argument(metavar="RUN|BUNDLE", help="A training run or a bundle.")],
    data: Annotated[Path, typer.Option(help="Folder of images; class folders, if there are any, give labels.")],
    probes: Annotated[bool, typer.Option("--probes", help="Also fit linear and few-shot probes (minutes).")] = False,
    as_json: Json = False,
) -> None:
    """Score an encoder beside its baselines.

    kNN where class folders give labels, and copy retrieval, which needs none, each beside raw pixels, PCA and the same
    encoder untrained. A folder with train/ and test/ is taken as it is; otherwise a fifth of it is held out.

    Example:  mio evaluate run --data photos
    """
    from mio_export.progress import stderr_progress
    from mio_export.train import evaluate
    from mio_export.train.run_report import REPORT

    evaluation = evaluate(path, data, probes=probes, progress=stderr_progress())
    if as_json:
        print_json(evaluation.to_dict())
        return
    print_evaluation(evaluation)
    if (path / REPORT).is_file():
        typer.echo(f"\nreport: {path / REPORT}")
    for failure in evaluation.failures:
        typer.echo(f"left out: {failure}", err=True)
