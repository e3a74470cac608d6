"""``mio search``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mio_export.cli.output import Json, echo, print_json, print_table
from mio_export.console.terminal import printable
from mio_export.errors import UsageError

if TYPE_CHECKING:
    from mio_export.searching import Answer


def run(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of an embedding store.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file to look for; may be given again.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Stored image to look for; may be given again.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle that made the store.  [default: NAME.mio beside OUT, then here]")
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="auto: the store's; pt2 and torchscript, which may hold code, must be named.")
    ] = "auto",
    k: Annotated[int, typer.Option("-k", help="Number of neighbours.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a gallery of the whole store.")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="What was embedded, for the gallery's pictures: a folder, archive, list or URL; may repeat."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the stored images nearest to an image, or show all in a gallery.

    An image file is embedded by the very artifact that made the store; a stored image (--key) needs no bundle.

    Example:  mio search embeddings --image photos/temple/00.jpg

    Example:  mio search embeddings --html gallery.html --source photos
    """
    from mio_export.console.progress import stderr_progress
    from mio_export.searching import answer, write_gallery

    if not image and not key and html is None:
        raise UsageError("nothing to search for; give --image FILE, --key KEY or --html FILE")
    progress = stderr_progress()
    answers = answer(out, images=image or (), keys=key or (), bundle=bundle, runtime=runtime, k=k, progress=progress)
    gallery = write_gallery(html, out, answers=answers, source=source, progress=progress) if html else None
    if as_json:
        print_json({"answers": [asdict(found) for found in answers], "gallery": gallery and asdict(gallery)})
        return
    for found in answers:
        _print_answer(found)
    if gallery:
        echo(*gallery.summary())


def _print_answer(found: "Answer") -> None:
    keys = [printable(near.key) for near in found.neighbors]
    width = max(map(len, keys), default=3)
    pairs = zip(found.neighbors, keys, strict=True)
    rows = [(str(near.rank), key.ljust(width), f"{near.cosine:.6f}") for near, key in pairs]
    print_table(f"nearest to {found.query}", ("rank", "key".ljust(width), "cosine"), rows)


__all__ = ["run"]
