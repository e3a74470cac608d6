"""``mio verify``."""

from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, print_json, print_parity
from mio_export.errors import GateError


def run(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.mio", help="A bundle.")],
    images: Annotated[Path | None, typer.Option(help="Folder of real images: prove every artifact again.")] = None,
    limit: Annotated[int, typer.Option(help="Number of images to take from it.")] = 256,
    device: Annotated[
        str,
        typer.Option(help="Where the artifacts run: cpu, cuda, tensorrt (of ONNX Runtime), or auto: all there are."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Check a bundle, or prove it again.

    Without images, every hash; with images, every artifact is compared with the encoder again, and what was unproven
    because it could not run where it was built is proved or refused.

    Example:  mio verify encoder.mio --images photos
    """
    from mio_export.parity import verify

    result = verify(bundle, images=images, limit=limit, device=device)
    if as_json:
        values = {"passed": result.passed, "broken": result.broken, "problems": result.problems}
        print_json({**values, "unproven": result.unproven, "reports": [r.to_dict() for r in result.reports]})
    elif result.reports:
        print_parity(result.reports)
    refused = [f"{r.artifact}: {problem}" for r in result.reports for problem in r.problems]
    if not result.passed:
        raise GateError("\n     ".join([f"{bundle} is refused", *result.broken, *result.problems, *refused]))
    if as_json:
        return
    for line in result.unproven:
        typer.echo(f"unproven: {line} cannot run here; verify it where it does")
    typer.echo(f"{bundle}: every hash holds" + ("" if images else "; to prove the artifacts again, add --images DIR"))
