"""``mio export``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mio_export.cli.output import Json, echo, print_json, print_parity
from mio_export.errors import UsageError

if TYPE_CHECKING:
    from mio_export.models import Encoder


def run(
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle to write, NAME.mio.")],
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A training run.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Instead of a run: a torchvision or timm name.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its weights: .safetensors, or .pth of plain tensors.")] = None,
    stem: Annotated[str, typer.Option(help="imagenet, or small for a ResNet of small images.")] = "imagenet",
    preprocess: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Its preprocessing where it differs from its library's, such as image_size=64."
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            help="onnx, openvino, tensorrt, tensorrt-rtx, pt2 or torchscript (legacy); repeatable.  [default: onnx]",
        ),
    ] = None,
    precisions: Annotated[
        list[str] | None, typer.Option("--precision", help="fp32, fp16, bf16 or int8; repeatable.  [default: fp32]")
    ] = None,
    capabilities: Annotated[
        list[str] | None,
        typer.Option("--capability", metavar="X.Y", help="GPUs to build engines for, such as 8.9; repeatable."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of real images to prove on; int8 is calibrated on others of them.  [default: built-in ones]"
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Number of images to prove on.")] = 256,
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A tighter bound of parity, such as recall@10=0.98; repeatable."),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Largest batch that the artifacts will be given.")] = 64,
    normalize: Annotated[bool, typer.Option("--normalize", help="L2-normalise embeddings, in the graph.")] = False,
    head: Annotated[str, typer.Option(help="backbone, or projector: embed as the run's projections.")] = "backbone",
    dim: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Keep the first K projections, of a run with ordered ones (minc, loss.ordered=true)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export an encoder, with proof, into a bundle.

    Every artifact is compared with the encoder in float64 on real images before it enters; if one is refused, no bundle
    appears and all is kept in NAME.mio.rejected. Artifacts that cannot run here are added as unproven.

    Example:  mio export run -o encoder.mio -f onnx -f torchscript --images photos

    Example:  mio export run -o encoder.mio -f openvino --precision fp32 --precision bf16 --images photos

    Example:  mio export run -o encoder.mio -f tensorrt-rtx --capability 8.9 --precision fp16 --images photos

    Example:  mio export --backbone resnet50 --weights resnet50.safetensors -o resnet50.mio --images photos
    """
    from mio_export.console.progress import stderr_progress
    from mio_export.exporting import export
    from mio_export.files import cache_folder

    result = export(
        _source(run, backbone, weights, stem, preprocess or []),
        out,
        formats=formats or ["onnx"],
        precisions=precisions or ["fp32"],
        capabilities=capabilities or [],
        images=images,
        limit=limit,
        max_batch=max_batch,
        require=_requirements(require or []),
        normalize=normalize,
        head=head,
        dim=dim,
        cache=cache_folder(),
        progress=stderr_progress(),
    )
    if as_json:
        print_json(json.loads(result.bundle.manifest.to_json()))
        return
    print_parity(result.reports)
    manifest = result.bundle.manifest
    echo("", f"{out}/report.html shows the images on which each artifact errs most")
    echo(f"{out}: {manifest.encoder.embedding_dim} dimensions, space {manifest.space[:12]}…")


def _requirements(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"--require takes NAME=NUMBER, such as recall@10=0.98; got {text!r}") from None
    return found


def _source(
    run: Path | None, backbone: str | None, weights: Path | None, stem: str, preprocess: list[str]
) -> "Path | Encoder":
    """Return the run, or the encoder that a backbone and its weights make."""
    if run is not None and backbone is None and weights is None:
        return run
    if run is not None or backbone is None or weights is None:
        raise UsageError("export takes either a RUN, or --backbone together with --weights")
    from mio_export.models import encoder_from_weights
    from mio_export.settings import with_settings

    return encoder_from_weights(backbone, weights, preprocess=with_settings({}, preprocess), stem=stem)
