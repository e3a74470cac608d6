"""``mio merge``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, echo, print_json
from mio_export.errors import UsageError


def run(
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Folders of embedding stores.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new store.")],
    layout: Annotated[
        str, typer.Option(help="store, or of one store: fixed-size-list or list (Parquet), clip-retrieval (.npy).")
    ] = "store",
    dtype: Annotated[str, typer.Option(help="float32, or float16 in other layouts than store.")] = "float32",
    as_json: Json = False,
) -> None:
    """Merge embedding stores into one, or write one in another layout.

    The parts that mio embed --shard made give the bytes of one run. Stores of different collections are merged if no
    key is in two of them.

    Example:  mio merge part-1 part-2 -o embeddings

    Example:  mio merge embeddings -o embeddings-npy --layout clip-retrieval --dtype float16
    """
    from mio_export.console.progress import stderr_progress
    from mio_export.embedding import merge
    from mio_export.layouts import write_layout

    if layout == "store":
        if dtype != "float32":
            raise UsageError(f"a store holds float32; for {dtype} name another --layout")
        merged = merge(parts, out, progress=stderr_progress())
        result, lines = asdict(merged), merged.summary(out)
    else:
        if len(parts) > 1:
            raise UsageError(f"--layout {layout} takes one store, got {len(parts)}; merge them first")
        written = write_layout(parts[0], out, layout=layout, dtype=dtype)  # type: ignore[arg-type]  # checked there
        result, lines = asdict(written), written.summary(out)
    if as_json:
        print_json(result)
    else:
        echo(*lines)
