"""The client: against real servers, and against one that answers whatever a test wants."""

import datetime
import io
import ipaddress
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import numpy as np
import pytest

from mio_export.errors import MioError, SpaceError, UsageError
from mio_export.runtimes import open_runtime
from mio_export.serving import RemoteEncoder, verify_server
from mio_export.serving.messages import SERVICE, entries, message, message_class
from mio_export.serving.protocol import HEADER_LENGTH, join, pack

BOTH = pytest.mark.parametrize("protocol", ["http", "grpc"])
SAYS = {"space": "5" * 64, "artifact": "encoder.onnx", "artifact_sha256": "a" * 64, "precision": "fp32"}
SAYS |= {"runtime": "onnxruntime", "device": "cpu", "decode": "full", "versions": "{}"}
IMAGE = np.zeros((1, 4, 4, 3), np.uint8)


def jpegs(photo_crops, number):
    """Different JPEGs, in several sizes."""
    files = []
    for index in range(number):
        image = photo_crops[index % len(photo_crops)].rotate(index).resize((60 + index, 80))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def cosine(a, b):
    return ((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()


@BOTH
def test_200_images_get_the_embeddings_of_the_artifact(server, bundle, photo_crops, protocol):
    files = jpegs(photo_crops, 200)
    pixels = np.stack([bundle.manifest.preprocess.decode(file) for file in files])
    with open_runtime(bundle, "onnxruntime") as runtime:
        expected = np.concatenate([runtime.embed(pixels[i : i + 20]) for i in range(0, 200, 20)])
    with RemoteEncoder(getattr(server, protocol), space=bundle.manifest.space) as encoder:
        assert (encoder.space, encoder.max_batch) == (bundle.manifest.space, 32)
        assert (encoder.image_shape, encoder.embedding_dim) == ((32, 32, 3), 256)
        vectors = encoder.embed(pixels)
        assert (vectors.dtype, vectors.shape) == (np.float32, expected.shape)
        assert cosine(vectors, expected) >= 0.99999
        vectors, errors = encoder.embed_files(files)
        assert errors == [None] * 200
        assert cosine(vectors, expected) >= 0.99999


@BOTH
def test_a_bad_image_answers_for_itself_and_its_neighbours_are_untouched(server, photo_crops, protocol):
    good = jpegs(photo_crops, 3)
    with RemoteEncoder(getattr(server, protocol)) as encoder:
        expected, _ = encoder.embed_files(good)
        vectors, errors = encoder.embed_files([*[good[0]] * 31, b"", good[1], good[1][:200], b"text", good[2]])
        with pytest.raises(UsageError, match="there is no image"):
            encoder.embed_files([])
        with pytest.raises(UsageError, match=r"images must be uint8 of shape \(N, 32, 32, 3\)"):
            encoder.embed(np.zeros((1, 32, 31, 3), np.uint8))
    assert [number for number, error in enumerate(errors) if error] == [31, 33, 34]
    assert errors[31] == "image 31: the file is empty"  # counted on over the batches
    assert errors[34] == "image 34: not an image that Pillow can read"
    assert np.isnan(vectors[[31, 33, 34]]).all()
    assert cosine(vectors[[0, 32, 35]], expected) >= 0.999999


@BOTH
def test_a_local_runtime_and_the_client_answer_alike(server, bundle, photo_crops, tmp_path, protocol):
    (tmp_path / "good.jpg").write_bytes(jpegs(photo_crops, 1)[0])
    files = [tmp_path / "good.jpg", str(tmp_path / "nowhere.jpg"), b"", b"text", *jpegs(photo_crops, 33)]
    with RemoteEncoder(getattr(server, protocol)) as encoder, open_runtime(bundle, "onnxruntime") as runtime:
        (a, said), (b, found) = encoder.embed_files(files), runtime.embed_files(files)
        for one in ("good.jpg", b"good"):
            with pytest.raises(UsageError, match="files must be a list"):
                encoder.embed_files(one)
    assert said == found
    assert said[:2] == [None, "image 1: cannot be read: No such file or directory"]
    assert np.isnan(a[1:4]).all()
    assert np.isnan(b[1:4]).all()
    is_good = [error is None for error in said]
    assert cosine(a[is_good], b[is_good]) >= 0.99999


def test_files_that_are_long_together_go_in_several_requests(server, photo_crops):
    buffer = io.BytesIO()
    photo_crops[0].resize((2600, 2600)).save(buffer, "BMP")  # 20 MB
    with RemoteEncoder(server.http) as encoder:
        vectors, errors = encoder.embed_files([buffer.getvalue()] * 4)
    assert errors == [None] * 4
    assert np.isfinite(vectors).all()


@BOTH
def test_another_space_and_an_unknown_model_are_refused(server, protocol):
    url = getattr(server, protocol)
    with pytest.raises(SpaceError, match="another embedding space"):
        RemoteEncoder(url, space="0" * 64)
    with pytest.raises(UsageError, match="unknown model 'encoders'"):
        RemoteEncoder(url + "s")
    with pytest.raises(UsageError, match=f"; call it {url}$"):
        RemoteEncoder(url + "_pixels")


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://127.0.0.1/encoder",
        "http://127.0.0.1:8000",
        "http:///encoder",
        "http://[::1/encoder",
        "http://127.0.0.1:99999/encoder",
        "http://127.0.0.1/a/b",
        "http://user:pass@127.0.0.1/encoder",
    ],
)
def test_a_wrong_url_is_a_usage_error(url):
    with pytest.raises(UsageError, match="http://HOST:PORT/NAME") as caught:
        RemoteEncoder(url)
    assert "pass" not in str(caught.value)


@BOTH
def test_a_silent_server_is_asked_again_and_then_said(protocol):
    start = time.monotonic()
    with pytest.raises(MioError, match="refused"):
        RemoteEncoder(f"{protocol}://127.0.0.1:9/encoder", num_retries=2)
    assert 0.15 <= time.monotonic() - start < 5


def test_the_client_needs_no_torch():
    code = (
        "import sys, mio_export.serving.client; print(sorted({'torch', 'onnxruntime', 'PIL.Image'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['PIL.Image']"


def certificate(folder):
    """A key and a certificate of 127.0.0.1 that it has signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number())
    made = made.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256())
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, pem, plain))
    return cert_file, key_file


@pytest.fixture(scope="module")
def secured(serve, bundle, tmp_path_factory):
    """A server with TLS and a key that decodes scaled; its certificate."""
    folder = tmp_path_factory.mktemp("secured")
    cert, key = certificate(folder)
    with serve(
        bundle.path, folder, "--tls-cert", cert, "--tls-key", key, "--decode=scaled", MIO_API_KEY="s3cret"
    ) as run:
        yield run, cert


@BOTH
def test_with_tls_and_a_key_only_who_has_both_is_answered(secured, photo_crops, protocol, monkeypatch, tmp_path):
    running, cert = secured
    url = getattr(running, protocol).replace("://", "s://")
    files = jpegs(photo_crops, 2)
    with RemoteEncoder(url, ca=cert, api_key="s3cret") as encoder:
        assert encoder.parameters["decode"] == "scaled"
        expected, _ = encoder.embed_files(files)
    monkeypatch.setenv("MIO_API_KEY", "s3cret")
    with RemoteEncoder(url, ca=cert) as encoder:
        assert cosine(encoder.embed_files(files)[0], expected) >= 0.999999
    monkeypatch.setenv("MIO_API_KEY", "wrong")
    with pytest.raises(UsageError, match="MIO_API_KEY") as caught:
        RemoteEncoder(url, ca=cert)
    assert "wrong" not in str(caught.value)
    with pytest.raises(MioError, match=r"(?i)certificate.verify.failed"):
        RemoteEncoder(url, num_retries=1)
    with pytest.raises(UsageError, match="printable ASCII"):
        RemoteEncoder(url, ca=cert, api_key="schlüssel")
    (tmp_path / "none.pem").write_text("none")
    with pytest.raises(UsageError, match=r"none.pem is no PEM file"):
        RemoteEncoder(url, ca=tmp_path / "none.pem")


@BOTH
def test_a_live_server_is_held_to_the_gate(server, bundle, photos, mio, protocol):
    result = mio("verify", bundle.path, "--server", getattr(server, protocol), "--images", photos)
    assert result.code == 0, result.err
    assert "proved" in result.out
    assert "from pixels and from encoded images" in result.out


@pytest.mark.parametrize("options", [["--runtime=onnxruntime"], ["--all"], ["--device=cpu"]])
def test_what_a_server_has_chosen_cannot_be_asked_of_it(bundle, photos, mio, options):
    result = mio("verify", bundle.path, "--server", "http://127.0.0.1:9/encoder", "--images", photos, *options)
    assert (result.code, "leave out" in result.err) == (2, True)
    result = mio("verify", bundle.path, "--ca", "ca.pem")
    assert (result.code, "--ca is for --server" in result.err) == (2, True)


def test_grpc_logs_nothing_beside_the_one_line_of_an_error(bundle, mio, monkeypatch):
    monkeypatch.setenv("GRPC_VERBOSITY", "")  # to be restored
    monkeypatch.delenv("GRPC_VERBOSITY")
    assert mio("verify", bundle.path, "--server", "grpcs://127.0.0.1:9/encoder").code == 2
    assert os.environ["GRPC_VERBOSITY"] == "NONE"


def test_a_server_that_decodes_scaled_is_held_to_the_gate_of_that(secured, bundle, photos, mio, monkeypatch):
    running, cert = secured
    url = running.http.replace("://", "s://")
    arguments = ["verify", bundle.path, "--server", url, "--images", photos, "--ca", cert, "--api-key", "s3cret"]
    result = mio(*arguments)
    assert result.code == 0, result.err
    original = RemoteEncoder.__init__

    def full(self, *arguments, **options):
        original(self, *arguments, **options)
        self.parameters["decode"] = "full"

    monkeypatch.setattr(RemoteEncoder, "__init__", full)  # a server that decodes otherwise than it says
    result = mio(*arguments)
    assert result.code == 3
    assert "preprocessing: image " in result.err
    assert "golden" not in result.err  # lossless ones have one way to be decoded


def test_a_server_of_another_encoder_is_refused(server, encoder, tmp_path, photos, mio):
    import copy

    import torch

    from mio_export.exporting import export

    other = copy.deepcopy(encoder)
    with torch.no_grad():
        next(other.parameters()).add_(0.5)
    path = tmp_path / "encoder.mio"
    export(other, path, formats=("onnx",), images=photos, max_batch=4)
    result = mio("verify", path, "--server", server.http, "--images", photos)
    assert result.code == 4
    assert "another embedding space" in result.err


@pytest.mark.parametrize("fault", ["rows", "nan", "refused"])
def test_a_server_that_decodes_wrong_is_refused(server, bundle, photos, monkeypatch, fault):
    right = RemoteEncoder.embed_files

    def wrong(self, files):
        vectors, errors = right(self, files)
        if fault == "rows":
            return vectors[::-1], errors
        if fault == "nan":
            return vectors * np.nan, errors
        return vectors, [f"image {number}: no" for number in range(len(files))]

    monkeypatch.setattr(RemoteEncoder, "embed_files", wrong)
    report = verify_server(bundle.path, server.http, images=photos)
    assert not report.passed
    for name in ("golden image colour", "image temple/00.jpg"):
        assert any(problem.startswith(f"preprocessing: {name}") for problem in report.problems)


def config(model, **changes):
    is_files = not model.endswith("_pixels")
    tensors = {
        "input": [{"name": "images", "data_type": "TYPE_STRING", "dims": [1]}],
        "output": [{"name": "embedding", "data_type": "TYPE_FP32", "dims": [2]}],
    }
    if not is_files:
        tensors["input"] = [{"name": "images", "data_type": "TYPE_UINT8", "dims": [4, 4, 3]}]
    parameters = {name: {"string_value": value} for name, value in SAYS.items()}
    return {"max_batch_size": 8, "parameters": parameters, **tensors, **changes}


class Answering(BaseHTTPRequestHandler):
    """Says that it serves an encoder, and answers as the test wants."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send(200, json.dumps(self.server.config(self.path.split("/")[3])).encode())

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.num_posts += 1
        self.server.answer(self)

    def send(self, status, content, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def answering():
    """Start a server that answers with a function."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        server.config, server.num_posts, server.daemon_threads = config, 0, True
        server.url = f"http://127.0.0.1:{server.server_port}/encoder"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def output(name, datatype, shape, content):
    sized = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(content)}}
    return sized, content


def answer_of(*outputs, **changes):
    body, length = join({"outputs": [head for head, _ in outputs], **changes}, [content for _, content in outputs])
    return lambda handler: handler.send(200, body, **{HEADER_LENGTH: str(length)})


GOOD = output("embedding", "FP32", [1, 2], np.float32([[1, 2]]).tobytes())
FINE = output("error", "BYTES", [1, 1], pack([b""]))
TWO_ROWS = output("embedding", "FP32", [2, 2], np.zeros((2, 2), np.float32).tobytes())
LONG = output("embedding", "FP32", [1, 2], bytes(16))
DOUBLE = output("embedding", "FP64", [1, 2], bytes(8))
WIDE = output("embedding", "FP32", [1, 4], bytes(16))
TWO_REASONS = output("error", "BYTES", [2, 1], pack([b"", b""]))
CUT = output("error", "BYTES", [1, 1], b"\xff\xff\xff\x7fx")


@pytest.mark.parametrize(
    "answer",
    [
        answer_of(TWO_ROWS, FINE),
        answer_of(LONG, FINE),
        answer_of(DOUBLE, FINE),
        answer_of(WIDE, FINE),
        answer_of(GOOD, TWO_REASONS),
        answer_of(GOOD, CUT),
        answer_of(GOOD),
        answer_of((GOOD[0] | {"parameters": {"binary_data_size": 1 << 40}}, GOOD[1]), FINE),
        answer_of(({**GOOD[0], "data": [1, 2], "parameters": {}}, b""), FINE),
        lambda handler: handler.send(200, b"[" * 100_000),
        lambda handler: handler.send(200, b"<html>"),
        lambda handler: handler.send(200, b"{}", Inference_Header_Content_Length="-1"),
        lambda handler: handler.send(200, b"\xff", Inference_Header_Content_Length="x"),
    ],
)
def test_an_answer_that_is_not_of_the_protocol_is_an_error(answering, answer):
    answering.answer = answer
    with RemoteEncoder(answering.url) as encoder, pytest.raises(MioError, match="the answer is not of the protocol"):
        encoder.embed(IMAGE)
    assert answering.num_posts == 1  # once more would not help


def test_the_good_answer_of_that_server_is_taken(answering):
    answering.answer = answer_of(GOOD, FINE)
    with RemoteEncoder(answering.url) as encoder:
        assert encoder.embed(IMAGE).tolist() == [[1, 2]]


def test_a_reason_makes_its_row_nan_whatever_the_server_sent(answering):
    answering.answer = answer_of(GOOD, output("error", "BYTES", [1, 1], pack([b"no\n image\xff"])))
    with RemoteEncoder(answering.url) as encoder:
        vectors, errors = encoder.embed_files([b"x"])
    assert np.isnan(vectors).all()
    assert errors == ["image 0: no image\ufffd"]


def test_an_endless_answer_and_a_slow_one_are_ended(answering):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            for _ in range(200):
                handler.wfile.write(bytes(1 << 20))

    def slow(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        with suppress(OSError):
            for _ in range(100):
                handler.wfile.write(b" ")
                time.sleep(0.1)

    with RemoteEncoder(answering.url, timeout_s=1, num_retries=0) as encoder:
        for answer in (endless, slow):
            answering.answer = answer
            start = time.monotonic()
            with pytest.raises(MioError, match="too long"):
                encoder.embed(IMAGE)
            assert time.monotonic() - start < 4


def test_a_busy_server_is_asked_again_after_the_pause_that_it_wants(answering):
    def busy(handler):
        if answering.num_posts < 3:
            handler.send(429, b'{"error": "full"}', Retry_After="1" if answering.num_posts == 1 else "99999")
        else:
            answer_of(GOOD, FINE)(handler)

    answering.answer = busy
    start = time.monotonic()
    with RemoteEncoder(answering.url, timeout_s=1.1) as encoder:
        encoder.embed(IMAGE)
    assert answering.num_posts == 3
    assert 2.0 < time.monotonic() - start < 5  # one second, then no longer than timeout_s
    answering.answer = lambda handler: handler.send(429, b'{"error": "full"}')
    with RemoteEncoder(answering.url, num_retries=1) as encoder, pytest.raises(MioError, match="full"):
        encoder.embed(IMAGE)
    assert answering.num_posts == 5


@pytest.mark.parametrize(
    ("status", "num_posts", "message"),
    [(400, 1, "said so"), (307, 1, "HTTP status 307"), (500, 1, "said so"), (502, 2, "said so"), (503, 2, "said so")],
)
def test_what_is_asked_again(answering, status, num_posts, message):
    content = b"" if status == 307 else b'{"error": "said so"}' if status != 502 else b"<html>"
    answering.answer = lambda handler: handler.send(status, content, Location="http://127.0.0.1:9/")
    message = "HTTP status 502" if status == 502 else message
    with RemoteEncoder(answering.url, num_retries=1) as encoder, pytest.raises(MioError, match=message):
        encoder.embed(IMAGE)
    assert answering.num_posts == num_posts


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {}},
        {"parameters": [1]},
        {"max_batch_size": 0},
        {"max_batch_size": "many"},
        {"input": []},
        {"output": [{"name": "embedding", "dims": [1 << 60]}]},
        {"output": [{"name": "logits", "dims": [2]}]},
    ],
)
def test_a_server_of_another_kind_is_told_apart(answering, change):
    answering.config = lambda model: config(model, **change)
    with pytest.raises(UsageError, match="publishes no embedding space: it was not started by mio serve or mio deploy"):
        RemoteEncoder(answering.url)
    answering.config = lambda model: [1]
    with pytest.raises(UsageError, match="publishes no embedding space"):
        RemoteEncoder(answering.url)


def test_two_models_of_two_encoders_are_refused(answering):
    other = {name: {"string_value": "b" * 64} for name in SAYS}
    answering.config = lambda model: config(model, **({"parameters": other} if model.endswith("_pixels") else {}))
    with pytest.raises(UsageError, match="publishes no embedding space"):
        RemoteEncoder(answering.url)


@pytest.mark.parametrize("fault", ["rows", "raw", "long"])
def test_a_wrong_answer_over_grpc_is_an_error(fault):
    def model_config(request, context):
        values = config(request.name)
        return message("ModelConfigResponse", config={**values, "parameters": entries(values["parameters"])})

    def infer(request, context):
        rows = 2 if fault == "rows" else 1
        outputs = [{"name": "embedding", "datatype": "FP32", "shape": [rows, 2]}]
        outputs += [{"name": "error", "datatype": "BYTES", "shape": [1, 1]}]
        raw = [bytes(8 * rows if fault != "long" else 70 << 20), pack([b""])]
        return message("ModelInferResponse", outputs=outputs, raw_output_contents=raw[: 1 if fault == "raw" else 2])

    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=message_class(f"{name}Request").FromString,
            response_serializer=message_class(f"{name}Response").SerializeToString,
        )
        for name, call in {"ModelConfig": model_config, "ModelInfer": infer}.items()
    }
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.max_send_message_length", -1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    expected = "larger than max" if fault == "long" else "the answer is not of the protocol"
    try:
        encoder = RemoteEncoder(f"grpc://127.0.0.1:{port}/encoder", num_retries=0)
        with encoder, pytest.raises(MioError, match=expected):
            encoder.embed(IMAGE)
    finally:
        server.stop(None).wait()
