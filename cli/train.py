"""``mio train``."""

from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, print_json


def run(
    data: Annotated[Path, typer.Option(help="Folder of images, searched to the bottom; labels are not needed.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")],
    objective: Annotated[
        str | None, typer.Option(help="mio, minc, spectral, simclr, byol, linear-byol or simsiam.  [default: mio]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.  [default: 36]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and views.  [default: 0]")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any field of the recipe, such as loss.temperature=0.5."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, with its settings.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Train an encoder on unlabelled images.

    A folder's train/ is used if it has one; otherwise a fifth of the images is held out for mio evaluate. The run holds
    the settings, a line of metrics for each epoch, the encoder, and what --resume needs.

    Example:  mio train --objective minc --data photos -o run --epochs 20
    """
    from mio_export.progress import stderr_progress
    from mio_export.settings import with_settings
    from mio_export.train import recipe_from_dict, stored_recipe, train
    from mio_export.train.run_report import REPORT

    given = {"objective": objective, "epochs": epochs, "seed": seed}
    stored = stored_recipe(out) if resume else {}
    values = stored | {key: value for key, value in given.items() if value is not None}
    result = train(
        recipe_from_dict(with_settings(values, settings or [])),
        data,
        out,
        resume=resume,
        device=device,
        progress=stderr_progress(),
    )
    if as_json:
        print_json({"recipe": result.recipe.to_dict(), "metrics": result.metrics, "failures": result.failures})
        return
    typer.echo(f"{out}: {result.metrics['epoch']} epochs, loss {result.metrics['loss']:.4f}")
    typer.echo(f"report: {out / REPORT}")
    typer.echo(f"next:  mio evaluate {out} --data {data}\n       mio export {out} -o {out.name}.mio --images {data}")
