"""``mio merge``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, print_json


def run(
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Folders of embedding stores.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new store.")],
    as_json: Json = False,
) -> None:
    """Merge embedding stores into one.

    The parts that mio embed --shard made give the bytes of one run. Stores of different collections are merged if no
    key is in two of them.

    Example:  mio merge part-1 part-2 -o embeddings
    """
    from mio_export.embedding import merge
    from mio_export.progress import stderr_progress

    result = merge(parts, out, progress=stderr_progress())
    if as_json:
        print_json(asdict(result))
    else:
        typer.echo(
            f"{out}: {result.num_stores:,} stores, {result.num_files:,} files, {result.num_ok:,} embedded,"
            f" {result.num_failed:,} failed"
        )
