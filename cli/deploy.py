"""``mio deploy``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, echo, print_json
from mio_export.errors import UsageError

app = typer.Typer(help="Hand a bundle to an inference server.", no_args_is_help=True)


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


@app.command()
def container(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.mio", help="A bundle.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Folder to write.")],
    runtime: Annotated[
        str, typer.Option(help="auto, onnxruntime, openvino, …: whose proved artifact is served.")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto (fp32), fp16, bf16 or int8: that of a proved artifact.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if the artifact was proved on it.")] = "auto",
    decode: Annotated[
        str, typer.Option(help="full, or scaled: large JPEGs at a fraction of their size. Take that of your store.")
    ] = "full",
    kserve: Annotated[bool, typer.Option("--kserve", help="Write an InferenceService too; measures for it.")] = False,
    image: Annotated[
        str | None, typer.Option(metavar="REGISTRY/NAME:TAG", help="What the image is called there; with --kserve.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder of this command that differs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a Dockerfile and a compose file of mio serve with the bundle inside.

    Only proved artifacts are deployed; every hash is checked first.

    Example:  mio deploy container encoder.mio -o container

    Example:  mio deploy container encoder.mio -o container --kserve --image registry.example/encoder:1
    """
    from mio_export.serving.container import write_container

    if kserve != (image is not None):
        raise UsageError("--kserve needs --image REGISTRY/NAME:TAG, and --image is for --kserve only")
    done = write_container(
        bundle,
        out,
        **{"runtime": runtime, "precision": precision, "device": device, "decode": decode},
        kserve_image=image,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"path": out, **done})
        return
    served = "{artifact} ({runtime} {precision} on {device})".format(**done)
    echo(f"{out}: {served}; build it, start it and test it as {out / 'README.md'} says")
    if image and not done["measured"]:
        echo("the artifact does not run here, so requests and limits are guesses: see the README")


__all__ = ["app"]
