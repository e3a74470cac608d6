import shutil
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mio_export.bundle import SIGNATURE
from mio_export.errors import GateError, MissingBackendError, UsageError
from mio_export.exporting import export
from mio_export.parity.signing import check_signature, sign


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle.path, tmp_path / "copy.mio")


def key_pair(folder, name, password=None):
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return key_pair(tmp_path_factory.mktemp("keys"), "signer")


def test_a_signed_bundle_verifies_with_its_signer_and_with_no_other(copy, keys, tmp_path, mio):
    private, public = keys
    assert mio("verify", copy, "--signer", public).code == 3
    assert "is not signed (it holds no model.sig)" in mio("verify", copy, "--signer", public).err
    signed = mio("sign", copy, "--private-key", private)
    assert signed.code == 0, signed.err
    found = mio("verify", copy, "--signer", public)
    assert found.code == 0, found.err
    assert mio("verify", copy).code == 0  # the signature is no foreign file
    _, stranger = key_pair(tmp_path, "stranger")
    refused = mio("verify", copy, "--signer", stranger)
    assert refused.code == 3
    assert "has no valid signature of" in refused.err


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "report.html").write_text("other"),
        lambda path: (path / "parity" / "more.json").write_text("{}"),
        lambda path: (path / ".gitattributes").write_text("more"),
        lambda path: (path / "encoder.torchscript").unlink(),
        lambda path: (path / SIGNATURE).write_text("{}"),
        lambda path: (path / SIGNATURE).write_bytes(b"\xff"),
    ],
    ids=["a file changed", "a file added", "a file of git added", "a file removed", "no signature in it", "no text"],
)
def test_a_signature_is_over_every_file(copy, keys, mio, change):
    private, public = keys
    sign(copy, private_key=private)
    change(copy)
    refused = mio("verify", copy, "--signer", public)
    assert refused.code == 3
    assert "has no valid signature of" in refused.err
    assert "Traceback" not in refused.err


def test_a_signature_says_nothing_of_the_machine_and_touches_nothing_outside(copy, keys):
    import base64
    import json

    path = sign(copy, private_key=keys[0])
    payload = json.loads(base64.b64decode(json.loads(path.read_text())["dsseEnvelope"]["payload"]))
    assert sorted(payload["predicate"]["serialization"]["ignore_paths"]) == [SIGNATURE, "parity/.lock"]
    path.unlink()
    path.symlink_to(copy.with_name("outside"))
    with pytest.raises(GateError, match=r"model\.sig: the manifest does not name it"):
        sign(copy, private_key=keys[0])
    assert not copy.with_name("outside").exists()


def test_a_certificate_of_an_authority_that_is_trusted_signs_too(copy, tmp_path):
    import datetime

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "signer")])
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(True, False, False, False, False, True, False, False, False)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    private, pem = tmp_path / "key.pem", tmp_path / "certificate.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    sign(copy, private_key=private, certificate=pem, chain=[pem])
    check_signature(copy, signer=str(pem))
    (copy / "report.html").write_text("other")
    with pytest.raises(GateError, match="has no valid signature"):
        check_signature(copy, signer=str(pem))


def test_new_verdicts_outdate_a_signature_and_verify_says_so(copy, keys, photos, mio):
    import json
    from dataclasses import replace

    from mio_export.bundle import load_bundle, save_manifest

    manifest = load_bundle(copy).manifest
    rows = tuple(replace(a, parity=replace(a.parity, verdict="unproven", devices=())) for a in manifest.artifacts)
    save_manifest(copy, replace(manifest, artifacts=rows))
    sign(copy, private_key=keys[0])
    result = mio("verify", copy, "--images", photos, "--limit", 4, "--signer", keys[1])
    assert result.code == 0, result.err
    assert f"the signature no longer fits the new verdicts: mio sign {copy}" in result.out
    assert mio("verify", copy, "--signer", keys[1]).code == 3
    assert json.loads(mio("verify", copy, "--json").out)["passed"]


def test_a_signed_bundle_is_replaced_by_an_export(copy, encoder, photos, keys):
    sign(copy, private_key=keys[0])
    (copy / ".manifest.json.tmp").write_text("left by a process that was killed")
    export(encoder, copy, images=photos, limit=4, max_batch=2)
    assert not (copy / SIGNATURE).exists()
    assert not (copy / ".manifest.json.tmp").exists()


def test_what_is_wrong_with_a_key_is_said(copy, keys, tmp_path, mio, monkeypatch):
    private, public = keys
    with pytest.raises(UsageError, match="is no private key to sign with"):
        sign(copy, private_key=public)
    encrypted, _ = key_pair(tmp_path, "encrypted", password=b"secret")
    with pytest.raises(UsageError, match="not encrypted"):
        sign(copy, private_key=encrypted)
    with pytest.raises(UsageError, match="does not exist; give a PEM file"):
        sign(copy, private_key=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is no public key"):
        check_signature(copy, signer=str(private))
    with pytest.raises(UsageError, match=r"or an identity together with --issuer URL; got 'me@example\.org'"):
        check_signature(copy, signer="me@example.org")
    (copy / "encoder.onnx").write_bytes(b"x")
    with pytest.raises(GateError, match="is refused, and not signed"):
        sign(copy, private_key=private)
    assert not (copy / SIGNATURE).exists()
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(MissingBackendError, match="pip install 'mio-export\\[signing\\]'"):
        sign(copy, private_key=private)
    assert mio("sign", copy, "--private-key", private).code == 5
