import io
import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pytriton", reason="the server has an environment of its own: make test builds it")

import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, shared_memory

from mio_export.errors import GateError, MioError, SpaceError, UsageError
from mio_export.runtimes import open_runtime
from mio_export.serving import RemoteEncoder, ServeOptions, Server

BOTH = pytest.mark.parametrize("protocol", ["http", "grpc"])


def bomb():
    """A few kilobytes that are 81 million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


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
    with RemoteEncoder(getattr(server, protocol)) as encoder:
        assert encoder.space == bundle.manifest.space
        vectors = encoder.embed(pixels)
        assert vectors.dtype == np.float32
        assert vectors.shape == expected.shape
        assert cosine(vectors, expected) >= 0.99999
        vectors, errors = encoder.embed_files(files)
        assert errors == [None] * 200
        assert cosine(vectors, expected) >= 0.99999


@BOTH
def test_a_bad_image_answers_for_itself_and_its_neighbours_are_untouched(server, photo_crops, protocol):
    good = jpegs(photo_crops, 3)
    png = io.BytesIO()
    Image.new("RGB", (1, 1), (9, 99, 199)).save(png, "PNG")
    with RemoteEncoder(getattr(server, protocol)) as encoder:
        expected, _ = encoder.embed_files(good)
        vectors, errors = encoder.embed_files([good[0], b"", good[1], good[1][:200], bomb(), b"text", good[2]])
        one, fine = encoder.embed_files([png.getvalue()])
    assert [error is None for error in errors] == [True, False, True, False, False, False, True]
    assert errors[1] == "image 1: the file is empty"
    assert errors[3].startswith("image 3: ")
    assert errors[4] == "image 4: 9000x9000 is more than 50,000,000 pixels (decompression bomb)"
    assert errors[5] == "image 5: not an image that Pillow can read"
    assert np.isnan(vectors[[1, 3, 4, 5]]).all()
    assert cosine(vectors[[0, 2, 6]], expected) >= 0.999999
    assert fine == [None]  # an image of one pixel is an image
    assert np.isfinite(one).all()


def infer(server, protocol, array, datatype, model="encoder"):
    module = getattr(tritonclient, protocol)
    with module.InferenceServerClient(f"127.0.0.1:{server.ports[protocol]}") as client:
        tensor = module.InferInput("images", list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        return client.infer(model, [tensor])


@BOTH
@pytest.mark.parametrize(
    ("array", "datatype", "model", "message"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), "FP32", "encoder", "expects 'UINT8'"),
        (np.zeros((1, 32, 31, 3), np.uint8), "UINT8", "encoder", "unexpected shape for input 'images'"),
        (np.zeros((1, 3, 32, 32), np.uint8), "UINT8", "encoder", "unexpected shape for input 'images'"),
        (np.zeros((32, 32, 3), np.uint8), "UINT8", "encoder", "unexpected shape for input 'images'"),
        (np.zeros((33, 32, 32, 3), np.uint8), "UINT8", "encoder", "batch-size must be <= 32"),
        (np.full((33, 1), b"x", object), "BYTES", "encoder_jpeg", "batch-size must be <= 32"),
        (np.full((1, 2), b"x", object), "BYTES", "encoder_jpeg", "unexpected shape for input 'images'"),
    ],
)
def test_a_wrong_dtype_shape_or_size_is_refused(server, protocol, array, datatype, model, message):
    with pytest.raises(InferenceServerException, match=message) as caught:
        infer(server, protocol, array, datatype, model)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert "Traceback" not in str(caught.value)
    assert "/" not in str(caught.value).replace("NOTE", "")


def test_bytes_that_are_no_tensor_are_refused_without_a_trace(server):
    header = {
        "inputs": [{"name": "images", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}}]
    }
    head = json.dumps(header).encode()
    request = urllib.request.Request(
        server.http.replace("encoder", "v2/models/encoder_jpeg/infer"),
        head + b"\xff\xff\xff\x7fxx",
        {"Inference-Header-Content-Length": str(len(head))},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert 400 <= caught.value.code < 500
    assert b"Traceback" not in caught.value.read()


def test_shared_memory_is_taken_as_input(server, bundle):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    with open_runtime(bundle, "onnxruntime") as runtime:
        expected = runtime.embed(images)
    handle = shared_memory.create_shared_memory_region("images", "/mio-test-images", images.nbytes)
    try:
        shared_memory.set_shared_memory_region(handle, [images])
        with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.ports['http']}") as client:
            client.register_system_shared_memory("images", "/mio-test-images", images.nbytes)
            tensor = tritonclient.http.InferInput("images", list(images.shape), "UINT8")
            tensor.set_shared_memory("images", images.nbytes)
            vectors = client.infer("encoder", [tensor]).as_numpy("embedding")
            client.unregister_system_shared_memory("images")
    finally:
        shared_memory.destroy_shared_memory_region(handle)
    assert cosine(vectors, expected) >= 0.99999


def test_a_client_cannot_change_the_server(server, tmp_path):
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.ports['http']}") as client:
        with pytest.raises(InferenceServerException):
            client.update_log_settings({"log_file": str(tmp_path / "log")})
        with pytest.raises(InferenceServerException):
            client.unload_model("encoder")
    assert server.is_ready()


def test_another_space_is_refused(server):
    with pytest.raises(SpaceError, match="another embedding space"):
        RemoteEncoder(server.http, space="0" * 64)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://127.0.0.1/encoder", "http://127.0.0.1:8000", "http:///encoder"]
)
def test_a_wrong_url_is_a_usage_error(url):
    with pytest.raises(UsageError, match="http://HOST:PORT/NAME"):
        RemoteEncoder(url)


def test_an_unknown_model_and_a_silent_server_are_said(server):
    with pytest.raises(UsageError, match="unknown model"):
        RemoteEncoder(server.http + "s")
    start = time.monotonic()
    with pytest.raises(MioError, match="refused"):
        RemoteEncoder("http://127.0.0.1:9/encoder", num_retries=2)
    assert time.monotonic() - start > 0.1  # it came again


@BOTH
def test_a_live_server_is_held_to_the_gate(server, bundle, photos, mio, protocol):
    result = mio("verify", bundle.path, "--server", getattr(server, protocol), "--images", photos)
    assert result.code == 0, result.err
    assert "proved" in result.out
    assert "from pixels and from encoded images" in result.out


def test_a_server_of_another_encoder_is_refused(server, run_folder, tmp_path, photos, mio):
    from mio_export.exporting import export
    from mio_export.models import load_encoder

    other = load_encoder(run_folder)
    with __import__("torch").no_grad():
        next(other.parameters()).add_(0.5)
    path = tmp_path / "other.mio"
    export(other, path, formats=("onnx",), images=photos, max_batch=4)
    result = mio("verify", path, "--server", server.http, "--images", photos)
    assert result.code == 4
    assert "another embedding space" in result.err


def test_a_server_that_errs_is_refused(server, bundle, photos, monkeypatch):
    from mio_export.serving import verify_server

    right = RemoteEncoder.embed_files

    def swapped(self, files):
        vectors, errors = right(self, files)
        return vectors[::-1], errors

    monkeypatch.setattr(RemoteEncoder, "embed_files", swapped)
    report = verify_server(bundle.path, server.http, images=photos)
    assert not report.passed
    assert any("preprocessing: golden image colour" in problem for problem in report.problems)


def test_start_up_says_what_is_served_and_where(server):
    text = server.log.read_text()
    for part in (server.http, server.grpc, "encoder.onnx (onnxruntime fp32 on cpu)", "proved on cpu: cosine 1.0000000"):
        assert part in text
    with socket.socket() as other:
        other.settimeout(2)
        assert other.connect_ex((socket.gethostbyname(socket.gethostname()), server.ports["http"])) or (
            socket.gethostbyname(socket.gethostname()).startswith("127.")
        )


def test_no_request_lies_while_every_client_waits(server):
    """A queue with a limit does that in this Triton: one request in eight took half a second."""
    image = np.zeros((1, 32, 32, 3), np.uint8)

    def ask(_):
        start = time.perf_counter()
        with lock:
            encoder = idle.pop() if idle else RemoteEncoder(server.grpc)
        encoder.embed(image)
        with lock:
            idle.append(encoder)
        return time.perf_counter() - start

    idle, lock = [], threading.Lock()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(16)))
        seconds = list(pool.map(ask, range(600)))
    for encoder in idle:
        encoder.close()
    assert np.percentile(seconds, 97) <= 15 * np.median(seconds)


def test_metrics_count_requests_failures_batches_and_times(server, photo_crops):
    with RemoteEncoder(server.http) as encoder:
        encoder.embed_files([jpegs(photo_crops, 1)[0], b"", bomb()])
    text = server.metrics()
    for name in (
        'mio_images{model="encoder_decode",result="not_decoded"}',
        'mio_images{model="encoder_decode",result="too_many_pixels"}',
        'mio_images{model="encoder",result="ok"}',
        'mio_batch_images_bucket{model="encoder",le="1"}',
        'mio_decode_seconds_count{model="encoder_decode"}',
        'mio_inference_seconds_count{model="encoder"}',
        'nv_inference_request_success{model="encoder",version="1"}',
        'nv_inference_queue_duration_us{model="encoder",version="1"}',
    ):
        assert name in text


@pytest.mark.parametrize("model", ["encoder", "encoder_decode"])
def test_a_dead_worker_turns_readiness_off(serve, bundle, tmp_path, model):
    with serve(bundle.path, tmp_path / "log") as running:
        assert running.is_ready()
        pid = next(pid for pid, name in running.workers().items() if name == model)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 2
        while running.is_ready():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert running.process.wait(10) == 1
        assert f"a worker of the server (process {pid}) died" in running.log.read_text()
        assert running.workers() == {}
    assert not list(Path("/dev/shm").glob(f"mio-{running.process.pid}-*"))


def test_sigterm_answers_open_requests_first(serve, bundle, tmp_path, photo_crops):
    photo = io.BytesIO()
    photo_crops[0].resize((6000, 6000)).save(photo, "JPEG")
    files = [photo.getvalue()] * 16  # a second of decoding or more
    found = {}
    with serve(bundle.path, tmp_path / "log") as running:

        def embed():
            with RemoteEncoder(running.grpc, num_retries=0) as encoder:
                found["connected"] = True
                found["answer"] = encoder.embed_files(files)

        ask = threading.Thread(target=embed)
        ask.start()
        while "connected" not in found:
            time.sleep(0.01)
        time.sleep(0.3)
        assert ask.is_alive()
        running.process.terminate()
        ask.join(60)
        assert running.process.wait(60) == 0
    assert found["answer"][1] == [None] * 16
    assert "the server has ended" in running.log.read_text()
    assert not list(Path("/dev/shm").glob(f"mio-{running.process.pid}-*"))


def test_a_changed_bundle_is_not_served(bundle, tmp_path, mio):
    path = tmp_path / "encoder.mio"
    shutil.copytree(bundle.path, path)
    file = path / "encoder.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    result = mio("serve", path)
    assert result.code == 3
    assert "encoder.onnx: sha256 is" in result.err
    with pytest.raises(GateError, match="is not served"):
        Server(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"http_port": 70000}, "http_port must be 1 to 65535"),
        ({"http_port": 8001}, "three different"),
        ({"max_pixels": 0}, "max_pixels must be 1 or more"),
        ({"timeout_s": 0}, "timeout_s must be"),
    ],
)
def test_wrong_options_are_usage_errors(options, message):
    with pytest.raises(UsageError, match=message):
        ServeOptions(**options)


def test_a_batch_that_nobody_proved_and_a_taken_port_are_refused(bundle, server):
    with pytest.raises(UsageError, match="max_batch must be 1 to 32"):
        Server(bundle, ServeOptions(max_batch=33))
    with pytest.raises(UsageError, match="choose another --http-port"):
        Server(bundle, ServeOptions(http_port=server.ports["http"]))
