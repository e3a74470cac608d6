"""``mio verify``."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mio_export.cli.output import Json, echo, print_json, print_parity
from mio_export.errors import GateError, UsageError

if TYPE_CHECKING:
    from mio_export.parity import Verification


def run(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.mio", help="A bundle.")],
    images: Annotated[Path | None, typer.Option(help="Folder of real images: prove every artifact again.")] = None,
    limit: Annotated[int, typer.Option(help="Number of images to take from it.")] = 256,
    device: Annotated[
        str,
        typer.Option(help="Where the artifacts run: cpu, cuda, tensorrt (of ONNX Runtime), or auto: all there are."),
    ] = "auto",
    runtimes: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="With images: prove those of this runtime only; repeatable.  [default: all but pt2, torchscript]",
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="With images: prove pt2 and torchscript too; for bundles you trust."),
    ] = False,
    signer: Annotated[
        str | None,
        typer.Option(
            metavar="PEM",
            help="Refuse it unless signed by this public key, certificate authority or --issuer's identity.",
        ),
    ] = None,
    issuer: Annotated[
        str | None, typer.Option(metavar="URL", help="Who vouches for a --signer that is an identity of Sigstore.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Hold a live server to the gate: http:// or grpc://HOST:PORT/NAME."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MIO_API_KEY", help="Key of the server; better in the variable.")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Certificates to trust for https:// and grpcs://, not the system's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle, or prove it again.

    Without images: every hash, and whether the evidence of every verdict fits. With images, every artifact is compared
    with the encoder again, and what was unproven because it could not run where it was built is proved or refused.

    With --server, the server's answers are compared with the encoder, its preprocessing included.

    Example:  mio verify encoder.mio --images photos
    """
    if signer is not None or issuer is not None:
        with _json_if_refused(as_json):
            _check_signature(bundle, signer, issuer)
    if server is not None:
        if runtimes or everything or device != "auto":
            raise UsageError("a server has chosen its runtime and device: leave out --runtime, --all and --device")
        _verify_server(bundle, server, images=images, limit=limit, api_key=api_key, ca=ca, as_json=as_json)
        return
    from mio_export.parity import EVERYTHING, verify

    if ca is not None:
        raise UsageError("--ca is for --server")
    if images is None and (runtimes or everything):
        raise UsageError("--runtime and --all say what is proved again; add --images DIR")
    chosen = EVERYTHING if everything else runtimes
    with _json_if_refused(as_json):
        result = verify(bundle, images=images, limit=limit, device=device, runtimes=chosen)
    _print(result, as_json=as_json)
    refused = [f"{r.artifact}: {problem}" for r in result.reports for problem in r.problems]
    if not result.passed:
        raise GateError("\n     ".join([f"{bundle} is refused", *result.broken, *result.problems, *refused]))
    if not as_json:
        proved = "" if images else "; to prove the artifacts again, add --images DIR"
        echo(f"{bundle}: every hash holds and the evidence fits{proved}")


@contextmanager
def _json_if_refused(as_json: bool) -> Iterator[None]:
    """Print a refusal as JSON too where it comes before there is a result."""
    try:
        yield
    except GateError as error:
        if as_json:
            print_json({"passed": False, "broken": [], "problems": str(error).splitlines(), "reports": []})
        raise


def _check_signature(bundle: Path, signer: str | None, issuer: str | None) -> None:
    from mio_export.parity.signing import check_signature

    if signer is None:
        raise UsageError("--issuer vouches for an identity; add --signer IDENTITY")
    check_signature(bundle, signer=signer, issuer=issuer)
    echo(f"{bundle}: signed by {signer}", err=True)


def _print(result: "Verification", *, as_json: bool) -> None:
    """Print what was found; notes go beside the result, which for machines is JSON alone."""
    if as_json:
        values = {"passed": result.passed, "broken": result.broken, "problems": result.problems}
        values |= {"unproven": result.unproven, "left_out": result.left_out, "unwritten": result.unwritten}
        print_json({**values, "reports": [report.to_dict() for report in result.reports]})
    elif result.reports:
        print_parity(result.reports)
    notes = [f"not proved again: {line} is a program; include it with --all" for line in result.left_out]
    notes += [f"unproven: {line}; prove it where it runs, with --images DIR" for line in result.unproven]
    notes += [f"not written down: {result.unwritten}"] if result.unwritten else []
    if result.signature_outdated:
        notes.append(f"the signature no longer fits the new verdicts: mio sign {result.bundle.path}")
    for note in notes:
        echo(note, err=as_json)


def _verify_server(
    bundle: Path,
    url: str,
    *,
    images: Path | None,
    limit: int,
    api_key: str | None,
    ca: Path | None,
    as_json: bool,
) -> None:
    from mio_export.serving import verify_server

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it logs is in the error
    if images is None:
        raise UsageError("a server is held to the gate on real images; add --images DIR")
    with _json_if_refused(as_json):
        report = verify_server(bundle, url, images=images, limit=limit, api_key=api_key, ca=ca)
    if as_json:
        print_json(report.to_dict())
    else:
        print_parity([report])
    if not report.passed:
        raise GateError("\n     ".join([f"{url} is refused", *report.problems]))
    if not as_json:
        echo(f"{url} gives the embeddings of {bundle}, from pixels and from encoded images")
