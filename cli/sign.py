"""``mio sign``."""

from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import echo


def run(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.mio", help="A bundle.")],
    private_key: Annotated[
        Path | None,
        typer.Option(
            metavar="PEM",
            help="Elliptic curve key to sign with.  [default: the identity that you log in with, by Sigstore]",
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Signing certificate of this key, for those who trust an authority."),
    ] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option(metavar="PEM", help="A certificate between it and the authority; repeatable."),
    ] = None,
) -> None:
    """Sign a bundle, so that others can tell that it is yours and unchanged.

    The signature, model.sig, is over every file of the bundle; others check it with mio verify --signer. Needs the
    extra signing.

    Make a key:  openssl ecparam -name prime256v1 -genkey -noout -out signer.key

    Its public half:  openssl ec -in signer.key -pubout -out signer.pub

    Example:  mio sign encoder.mio --private-key signer.key
    """
    from mio_export.parity.signing import sign

    signature = sign(bundle, private_key=private_key, certificate=certificate, chain=chain or [])
    echo(f"{signature}: signed; others check it with: mio verify {bundle} --signer PUBLIC_KEY")
