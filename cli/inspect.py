"""``mio inspect``."""

from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, print_json, print_pairs


def run(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A bundle, an artifact of one, or an embedding store.")],
    as_json: Json = False,
) -> None:
    """Say what a bundle, an artifact or a store holds.

    Example:  mio inspect encoder.mio
    """
    from mio_export.inspection import describe

    description = describe(path)
    if as_json:
        print_json(description.values)
    else:
        print_pairs(description.lines)
