"""``mio evaluate``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, echo, print_evaluation, print_json, print_seeds
from mio_export.errors import UsageError


def run(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|RUNS|BUNDLE", help="A training run, a folder of runs seed-*, or a bundle.")
    ],
    data: Annotated[Path, typer.Option(help="Folder of images; class folders, if there are any, give labels.")],
    probes: Annotated[
        bool, typer.Option("--probes", help="Also fit linear, SGD and few-shot probes (minutes).")
    ] = False,
    dims: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...",
            help="Also score the first K projections of a run with ordered ones (minc, loss.ordered=true).",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Score an encoder beside its baselines.

    kNN where class folders give labels, and copy retrieval, which needs none, each beside raw pixels, PCA and the same
    encoder untrained. A folder with train/ and test/ is taken as it is; otherwise a fifth of it is held out.

    Of a folder that holds the runs seed-0, seed-1, ... it prints mean and deviation over the seeds, and how far trained
    lies above each baseline in kNN, with its 95 % paired bootstrap interval.

    Example:  mio evaluate run --data photos

    Example:  mio evaluate runs --data photos --probes
    """
    from mio_export.console.progress import stderr_progress
    from mio_export.train import Evaluation, SeedSummary, evaluate, evaluate_seeds, seed_runs
    from mio_export.train.run_files import REPORT

    call: Callable[..., Evaluation | SeedSummary] = evaluate_seeds if seed_runs(path) else evaluate
    result = call(path, data, probes=probes, dims=_numbers(dims), device=device, progress=stderr_progress())
    if as_json:
        print_json(result.to_dict())
        return
    if isinstance(result, SeedSummary):
        print_seeds(result)
    else:
        print_evaluation(result)
    if (path / REPORT).is_file():
        echo("", f"report: {path / REPORT}")
    for failure in result.failures:
        echo(f"left out: {failure}", err=True)


def _numbers(text: str | None) -> tuple[int, ...]:
    """Return the numbers of a list with commas; none of no list."""
    try:
        return tuple(int(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise UsageError(f"--dims takes numbers with commas, such as 4,16,64; got {text!r}") from None
