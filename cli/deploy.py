"""``mio deploy``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, echo, print_json

app = typer.Typer(help="Hand a bundle to an inference server.", no_args_is_help=True)


@app.callback()
def _targets() -> None:
    """Keep ``triton`` a command of its own beside servers to come."""


@app.command()
def triton(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.mio", help="A bundle.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="REPOSITORY", help="Folder to write.")],
    backend: Annotated[
        str, typer.Option(help="What runs the encoder: onnxruntime, pytorch, tensorrt or python.")
    ] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16 or int8: that of a proved artifact.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if the artifact was proved on it.")] = "auto",
    decode: Annotated[
        str, typer.Option(help="full, or scaled: large JPEGs at a fraction of their size. Take that of your store.")
    ] = "full",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a repository that differs.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model repository for Triton Inference Server, with a compose file.

    Only proved artifacts are deployed; every hash is checked first.

    Example:  mio deploy triton encoder.mio -o repository
    """
    from mio_export.serving import write_repository

    done = write_repository(
        bundle, out, backend=backend, precision=precision, device=device, decode=decode, overwrite=overwrite
    )
    if as_json:
        print_json(asdict(done))
        return
    says = done.parameters
    served = f"{says['artifact']} ({says['precision']}, {backend} on {says['device']})"
    echo(f"{done.path}: models {' and '.join(done.models)}; {served}, up to {done.max_batch} images a request")
    for note in done.notes:
        echo(note)
    echo(f"start it and prove it as {done.path / 'README.md'} says")


__all__ = ["app"]
