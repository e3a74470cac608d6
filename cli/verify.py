"""``mio verify``."""

from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, echo, print_json, print_parity
from mio_export.errors import GateError, UsageError


def run(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.mio", help="A bundle.")],
    images: Annotated[Path | None, typer.Option(help="Folder of real images: prove every artifact again.")] = None,
    limit: Annotated[int, typer.Option(help="Number of images to take from it.")] = 256,
    device: Annotated[
        str,
        typer.Option(help="Where the artifacts run: cpu, cuda, tensorrt (of ONNX Runtime), or auto: all there are."),
    ] = "auto",
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Hold a live server to the gate: http:// or grpc://HOST:PORT/NAME."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle, or prove it again.

    Without images, every hash; with images, every artifact is compared with the encoder again, and what was unproven
    because it could not run where it was built is proved or refused.

    With --server, the server's answers are compared with the encoder, its preprocessing included.

    Example:  mio verify encoder.mio --images photos
    """
    if server is not None:
        _verify_server(bundle, server, images=images, limit=limit, as_json=as_json)
        return
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
        echo(f"unproven: {line} cannot run here; verify it where it does")
    echo(f"{bundle}: every hash holds" + ("" if images else "; to prove the artifacts again, add --images DIR"))


def _verify_server(bundle: Path, url: str, *, images: Path | None, limit: int, as_json: bool) -> None:
    from mio_export.serving import verify_server

    if images is None:
        raise UsageError("a server is held to the gate on real images; add --images DIR")
    report = verify_server(bundle, url, images=images, limit=limit)
    if as_json:
        print_json(report.to_dict())
    else:
        print_parity([report])
    if not report.passed:
        raise GateError("\n     ".join([f"{url} is refused", *report.problems]))
    if not as_json:
        echo(f"{url} gives the embeddings of {bundle}, from pixels and from encoded images")
