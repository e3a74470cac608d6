"""``mio train``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mio_export.cli.output import Json, echo, print_json, print_plan
from mio_export.errors import UsageError

if TYPE_CHECKING:
    from mio_export.train import TrainResult


def run(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe's name or a .yaml file.  [default: folder]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of images, CIFAR, STL-10, Fashion-MNIST or tar shards; labels are not used."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="mio, minc, spectral, simclr, byol, linear-byol or simsiam.  [default: mio]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and views.  [default: 0]")] = None,
    seeds: Annotated[int, typer.Option(help="Train so many runs, OUT/seed-0 and on, to evaluate together.")] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any field of the recipe, such as loss.temperature=0.5."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, with its settings.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, size, memory and cost; train nothing.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    devices: Annotated[int, typer.Option(help="Processes on this machine, one for each GPU.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines; start the same command on each, or use torchrun.")] = 1,
    evaluate_every: Annotated[
        int, typer.Option(help="Epochs between scores on held-out training images; 0 for none.")
    ] = 0,
    on_collapse: Annotated[str, typer.Option(help="warn or stop (exit status 3) when the encoder collapses.")] = "warn",
    as_json: Json = False,
) -> None:
    """Train an encoder on unlabelled images.

    A folder's train/ is used if it has one; otherwise a fifth of the images is held out for mio evaluate. The run holds
    the settings, a line of metrics for each epoch, the encoder, and what --resume needs.

    Example:  mio train --objective minc --data photos -o run --epochs 20

    Example:  mio train resnet18-cifar10 --dry-run
    """
    from mio_export.console.progress import is_first_process, stderr_progress
    from mio_export.train import plan_training, resolve_recipe, train_seeds

    given = {"objective": objective, "epochs": epochs, "seed": seed}
    stored_in = out if resume and seeds == 1 else None
    values = resolve_recipe(recipe, given, settings or [], stored_in=stored_in)
    if dry_run:
        planned = plan_training(values, data, device=device, num_devices=devices * nodes)
        return print_json(asdict(planned)) if as_json else print_plan(planned)
    if data is None or out is None:
        raise UsageError("training needs --data DIR and -o RUN (or --dry-run)")
    results = train_seeds(
        values,
        data,
        out,
        num_seeds=seeds,
        resume=resume,
        device=device,
        num_devices=devices,
        num_nodes=nodes,
        evaluate_every=evaluate_every,
        on_collapse=on_collapse,
        progress=stderr_progress(),
    )
    if is_first_process():
        _print(results, data, out, as_json)
    return None


def _print(results: "list[TrainResult]", data: Path, out: Path, as_json: bool) -> None:
    from mio_export.train.run_files import REPORT

    if as_json:
        rows = [
            {"run": str(r.run), "recipe": r.recipe.to_dict(), "metrics": r.metrics, "failures": r.failures}
            for r in results
        ]
        print_json(rows[0] if len(rows) == 1 else rows)
        return
    for result in results:
        echo(f"{result.run}: {result.metrics['epoch']} epochs, loss {result.metrics['loss']:.4f}")
    if len(results) == 1:
        echo(f"report: {out / REPORT}")
    echo(f"next:  mio evaluate {out} --data {data}")
    if len(results) == 1:
        echo(f"       mio export {out} -o {out.name}.mio --images {data}")
