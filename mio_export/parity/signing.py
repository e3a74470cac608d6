"""Who made a bundle: a signature over its whole folder, by the OpenSSF model-signing library.

Hashes and evidence show that the parts of a bundle belong together; whoever writes a bundle can write those too. Only a
signature shows whose it is. It lies in the bundle as ``model.sig``, in Sigstore's bundle format, and the tools of
model-signing read it as well.
"""

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mio_export.bundle import LOCK, SIGNATURE, load_bundle
from mio_export.errors import GateError, MioError, MissingBackendError, UsageError, one_line
from mio_export.extras import install_command
from mio_export.files import write_text
from mio_export.parity import verify


def sign(
    path: str | Path,
    *,
    private_key: Path | None = None,
    certificate: Path | None = None,
    chain: Sequence[Path] = (),
) -> Path:
    """Sign a bundle that passes ``verify``; an older signature is replaced.

    Args:
        path: the bundle.
        private_key: PEM file of an elliptic curve key (P-256, P-384 or P-521), not encrypted. None: sign as the
            identity that you log in with, by Sigstore, which needs a network and a browser.
        certificate: PEM file of the signing certificate of this key, if verifiers trust an authority instead of it.
        chain: PEM files of the certificates between it and the authority.

    Returns:
        The signature's path.

    Raises:
        MissingBackendError: model-signing is not installed.
        UsageError: there is no bundle, or a key or certificate is not one.
        GateError: the bundle does not pass.
        MioError: Sigstore did not sign.
    """
    folder = Path(path)
    library = _library("signing")
    bundle = load_bundle(folder)
    if private_key is None and (certificate is not None or chain):
        raise UsageError("a certificate is given together with its --private-key")
    config = _signer(library, private_key, certificate, chain)
    verification = verify(bundle.path)
    if not verification.passed:
        problems = [*verification.broken, *verification.problems]
        raise GateError("\n     ".join([f"{folder} is refused, and not signed", *problems]))
    with tempfile.TemporaryDirectory() as outside:  # what lies in the folder is signed
        signature = Path(outside, SIGNATURE)
        try:
            with _quiet():
                config.set_hashing_config(_hashing([SIGNATURE, LOCK])).sign(folder.resolve(), signature)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - model-signing raises what its parts do
            raise MioError(f"{folder} could not be signed: {one_line(error)}") from None
        write_text(folder / SIGNATURE, signature.read_text(encoding="utf-8"))
    return folder / SIGNATURE


def check_signature(path: str | Path, *, signer: str, issuer: str | None = None) -> None:
    """Refuse a bundle unless every file of it is as the signer signed it.

    Args:
        path: the bundle; nothing of it but the signature is read before that was checked.
        signer: a PEM file with the signer's public key, or with the certificates that are trusted; or an identity of
            Sigstore, such as a mail address.
        issuer: URL of who vouches for an identity, such as https://accounts.google.com.

    Raises:
        MissingBackendError: model-signing is not installed.
        UsageError: there is no bundle, or the signer is neither a key nor an identity with its issuer.
        GateError: there is no signature, it is not the signer's, or it is of other files.
    """
    folder = Path(path)
    verifier = _verifier(_library("verifying"), signer, issuer)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a bundle; a bundle is a folder NAME.mio")
    if not (folder / SIGNATURE).is_file():
        raise GateError(f"{folder} is not signed (it holds no {SIGNATURE}); its maker signs it with: mio sign")
    try:
        with _quiet():
            # what a signature leaves out is in the signature
            verifier.set_hashing_config(_hashing([])).verify(folder.resolve(), folder.resolve() / SIGNATURE)
    except Exception as error:  # noqa: BLE001 - whatever is raised here, the signature was not found valid
        reason = one_line(error) or type(error).__name__
        raise GateError(f"{folder} has no valid signature of {signer}: {reason}") from None


def _library(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError:
        raise MissingBackendError(f"model-signing is not installed: {install_command('signing')}") from None


def _hashing(ignored: Sequence[str]) -> Any:
    """Return what is hashed: all but some files; by default model-signing leaves out ``.git`` and its like."""
    return _library("hashing").Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _signer(library: Any, private_key: Path | None, certificate: Path | None, chain: Sequence[Path]) -> Any:
    config = library.Config()
    if private_key is None:
        return config.use_sigstore_signer()
    for file in (private_key, *([certificate] if certificate else []), *chain):
        if not file.is_file():
            raise UsageError(f"{file} does not exist; give a PEM file")
    try:
        if certificate is not None:
            return config.use_certificate_signer(
                private_key=private_key, signing_certificate=certificate, certificate_chain=chain
            )
        return config.use_elliptic_key_signer(private_key=private_key)
    except Exception as error:  # noqa: BLE001 - cryptography raises many kinds
        raise UsageError(
            f"{private_key} is no private key to sign with (PEM, not encrypted, P-256, P-384 or P-521): "
            f"{one_line(error)}"
        ) from None


def _verifier(library: Any, signer: str, issuer: str | None) -> Any:
    config, file = library.Config(), Path(signer)
    if not file.is_file():
        if issuer is None:
            raise UsageError(
                f"--signer takes a PEM file with a public key or certificates, or an identity together with --issuer"
                f" URL; got {signer!r}"
            )
        return config.use_sigstore_verifier(identity=signer, oidc_issuer=issuer)
    try:
        if b"-----BEGIN CERTIFICATE-----" in file.read_bytes():
            return config.use_certificate_verifier(certificate_chain=[file])
        return config.use_elliptic_key_verifier(public_key=file)
    except Exception as error:  # noqa: BLE001 - cryptography raises many kinds
        raise UsageError(
            f"{file} is no public key (PEM, P-256, P-384 or P-521) and holds no certificates: {one_line(error)}"
        ) from None


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Model-signing prints; what it says goes where messages go, not among results."""
    return contextlib.redirect_stdout(sys.stderr)


__all__ = ["check_signature", "sign"]
