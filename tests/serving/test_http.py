"""What the application answers over HTTP, good and bad; it runs in a thread of this process."""

import base64
import io
import json
import os
import signal
import socket
import threading
import time
import tracemalloc
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import urllib3
import uvicorn
from PIL import Image

from mio_export.bundle import load_bundle
from mio_export.runtimes import choose, open_runtime
from mio_export.serving.engine import Engine
from mio_export.serving.http import http_app
from mio_export.serving.metrics import Journal
from mio_export.serving.options import ServeOptions
from mio_export.serving.protocol import HEADER_LENGTH, RequestError, Served, join, split

POOL = urllib3.PoolManager(retries=False, timeout=30)
KEY = "a secret"


@contextmanager
def running(bundle, **options):
    """Serve a bundle in a thread; give its address and its engine."""
    options = ServeOptions(access_log=False, **options)
    journal = Journal(access_log=False)
    engine = Engine(bundle, choose(bundle, "onnxruntime"), options, journal)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(http_app(engine, options, journal), log_config=None, access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join()
            engine.close()


@pytest.fixture(scope="module")
def served(bundle):
    with running(bundle) as (url, engine):
        yield url, engine


@pytest.fixture(scope="module")
def url(served):
    return served[0]


def jpeg(crop):
    buffer = io.BytesIO()
    crop.save(buffer, "JPEG")
    return buffer.getvalue()


def infer(url, array, datatype="UINT8", model="encoder_pixels", **changes):
    """Send a binary request; the answer's status, document and outputs."""
    content = array if isinstance(array, bytes) else array.tobytes()
    tensor = {"name": "images", "datatype": datatype, "shape": list(getattr(array, "shape", (1, 1)))} | changes
    tensor["parameters"] = {"binary_data_size": len(content)}
    body, length = join({"id": "7", "inputs": [tensor], "parameters": {"binary_data_output": True}}, [content])
    return POOL.request("POST", f"{url}/v2/models/{model}/infer", body=body, headers={HEADER_LENGTH: str(length)})


def ask(url, document, path="/v2/models/encoder/infer", **headers):
    body = document if isinstance(document, bytes) else json.dumps(document)
    return POOL.request("POST", url + path, body=body, headers=headers)


def files(*items):
    data = [base64.b64encode(item).decode() for item in items]
    return {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [len(items), 1], "data": data}]}


def test_pixels_in_binary_and_files_in_json_give_the_runtime_s_vectors(url, bundle, photo_crops):
    data = [jpeg(crop) for crop in photo_crops[:3]]
    pixels = np.stack([bundle.manifest.preprocess.decode(item) for item in data])
    with open_runtime(bundle, "onnxruntime") as runtime:
        expected = runtime.embed(pixels)
    answer = infer(url, pixels)
    document = split(answer.data, int(answer.headers[HEADER_LENGTH]), "outputs")
    assert (document["id"], document["model_name"]) == ("7", "encoder_pixels")
    assert np.array_equal(np.frombuffer(document["outputs"][0]["data"], np.float32).reshape(expected.shape), expected)
    embedding, error = ask(url, files(data[0], b"", data[2])).json()["outputs"]
    rows = np.array(embedding["data"], dtype=float).reshape(3, -1)
    assert error["data"] == ["", "the file is empty", ""]
    assert np.isnan(rows[1]).all()
    assert np.allclose(rows[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)
    numbers = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": pixels[0].ravel().tolist()}
    (embedding,) = ask(
        url, {"inputs": [numbers], "outputs": [{"name": "embedding"}]}, "/v2/models/encoder_pixels/infer"
    ).json()["outputs"]
    assert np.allclose(embedding["data"], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datatype": "FP32"}, "images must be UINT8 of shape"),
        ({"shape": [1, 32, 31, 3]}, "images must be UINT8 of shape"),
        ({"shape": []}, "images must be UINT8 of shape"),
        ({"shape": "abc"}, "images must be UINT8 of shape"),
        ({"shape": [33, 32, 32, 3]}, "1 to 32 images"),
        ({"shape": [0, 32, 32, 3]}, "1 to 32 images"),
        ({"shape": [-1, 32, 32, 3]}, "1 to 32 images"),
        ({"shape": [True, 32, 32, 3]}, "images must be UINT8 of shape"),
        ({"shape": [2, 32, 32, 3]}, "cannot be read"),
        ({"shape": 5}, "images must be UINT8 of shape"),
        ({"datatype": None}, "images must be UINT8 of shape"),
        ({"name": "pixels"}, "takes one input"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(url, change, message):
    answer = infer(url, np.zeros((1, 32, 32, 3), np.uint8), **change)
    assert answer.status == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"inputs": null}',
        b'{"inputs": 5}',
        b'{"inputs": [5]}',
        b'{"inputs": [{}]}',
        b'{"inputs": []}',
        b'{"inputs": {"a": 1}}',
        b'{"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1, 1], "data": [5]}]}',
        b'{"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1, 1], "data": "!"}]}',
        b'{"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1, 1], "data": null}]}',
        b'{"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1, 1], "data": {"a": 1}}]}',
        b'{"inputs": [{"name": [], "datatype": "BYTES", "shape": [1, 1], "data": ["aa=="]}]}',
        b'{"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1, 1], "parameters": 1, "data": ["aa=="]}]}',
        b'{"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 9}}]}',
        b'{"inputs": [{"name": "images", "datatype": "\\ud800", "shape": [1, 1], "data": ["aa=="]}]}',
        b'{"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1, 1], "data": [{}]}]}',
        b'{"inputs": [], "outputs": 5}',
        b'{"inputs": [], "parameters": 5}',
        b"[" * 100_000,
        b'{"inputs": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"inputs": [' + b"1," * 3_000_000 + b"1]}",
    ],
)
def test_a_body_that_makes_no_sense_is_refused_without_a_trace(url, body):
    for path in ("/v2/models/encoder/infer", "/v1/embeddings"):
        answer = ask(url, body, path)
        assert answer.status in (400, 404), answer.data
        assert b"Traceback" not in answer.data
        assert answer.json()["error"]


@pytest.mark.parametrize("outputs", [[{"name": "embedding", "parameters": 5}], [{"name": 5}, {"name": "x"}], [{}]])
def test_outputs_that_make_no_sense_are_refused(url, photo_crops, outputs):
    answer = ask(url, files(jpeg(photo_crops[0])) | {"outputs": outputs})
    assert answer.status == 400, answer.data


@pytest.mark.parametrize("number", ["256", "-1", "0.5", "NaN", "null", '"a"', str(10**30), "[0]"])
def test_numbers_that_are_no_pixels_are_refused(url, number):
    data = '"data": [' + "0, " * 3071 + number + "]"
    body = '{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], ' + data + "}]}"
    answer = ask(url, body.encode(), "/v2/models/encoder_pixels/infer")
    assert answer.status == 400, answer.data


def test_a_long_string_among_pixels_takes_no_more_memory_than_it_has(bundle):
    served = Served.of(bundle, choose(bundle, "onnxruntime"), decode="full", max_batch=1)
    tracemalloc.start()
    with pytest.raises(RequestError, match="cannot be read"):
        served.images("encoder_pixels", [("images", "UINT8", [1, 32, 32, 3], ["a" * 10_000, *["0"] * 3071])])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10_000_000


@pytest.mark.parametrize("length", ["-1", "x", "99999999", "1e3", "", "9" * 5000])
def test_a_wrong_header_length_is_refused(url, length):
    answer = ask(url, b"{}", **{HEADER_LENGTH: length})
    assert answer.status == 400


def test_unknown_models_outputs_and_encodings_are_said(url, photo_crops):
    assert ask(url, b"{}", "/v2/models/other/infer").status == 404
    assert POOL.request("GET", f"{url}/v2/models/other").status == 404
    assert POOL.request("GET", f"{url}/v3").json() == {"error": "GET /v3 is not served; see /docs"}
    assert POOL.request("GET", f"{url}/v1/embeddings").status == 405
    wrong = files(jpeg(photo_crops[0])) | {"outputs": [{"name": "logits"}]}
    assert "no output 'logits'" in ask(url, wrong).json()["error"]
    assert ask(url, b"{}", **{"Content-Encoding": "gzip"}).status == 415


def test_a_model_says_what_it_serves(url, bundle):
    config = POOL.request("GET", f"{url}/v2/models/encoder/config").json()
    says = {name: value["string_value"] for name, value in config["parameters"].items()}
    assert says["space"] == bundle.manifest.space
    assert (says["decode"], says["runtime"], says["precision"]) == ("full", "onnxruntime", "fp32")
    assert json.loads(says["versions"])["pillow"]
    (artifact,) = [row for row in bundle.manifest.artifacts if row.format == "onnx"]
    assert says["artifact_sha256"] == artifact.sha256
    metadata = POOL.request("GET", f"{url}/v2/models/encoder_pixels/versions/1").json()
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]


def test_openai_s_interface(url, bundle, photo_crops):
    from openai import BadRequestError, NotFoundError, OpenAI

    space = bundle.manifest.space
    data = [base64.b64encode(jpeg(crop)).decode() for crop in photo_crops[:2]]
    with open_runtime(bundle, "onnxruntime") as runtime:
        pixels = np.stack([bundle.manifest.preprocess.decode(base64.b64decode(item)) for item in data])
        expected = runtime.embed(pixels)
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for form in ("float", "base64"):
            answer = client.embeddings.create(
                model="encoder", input=data * 20, encoding_format=form
            )  # more than a batch
            assert answer.model == space
            rows = [
                np.frombuffer(base64.b64decode(row.embedding), np.float32) if form == "base64" else row.embedding
                for row in answer.data
            ]
            assert np.allclose(rows, np.tile(expected, (20, 1)), rtol=1e-4, atol=1e-5)
        one = client.embeddings.create(model=space, input="data:image/jpeg;base64," + data[0])
        assert np.allclose(one.data[0].embedding, expected[0], rtol=1e-4, atol=1e-5)
        assert {model.id for model in client.models.list()} == {"encoder", space}
        with pytest.raises(NotFoundError, match="the model here is 'encoder'"):
            client.embeddings.create(model="0" * 64, input=data)
        for wrong, message in (
            ([data[0], "aGFsbG8="], "input 1: not an image"),
            ("data:image/png,xyz", "input 0: a data URI"),
            ("a cat", "input 0: an image must be base64"),
            ("http://127.0.0.1:9/x.jpg", "fetches no URL of that host"),
            ("file:///etc/passwd", "input 0: an image must be base64"),
            ([[1, 2]], "input 0 must be a string"),
            ([], "input must be a string or a list"),
        ):
            with pytest.raises(BadRequestError, match=message):
                client.embeddings.create(model="encoder", input=wrong)
        with pytest.raises(BadRequestError, match="dimensions must be"):
            client.embeddings.create(model="encoder", input=data, dimensions=5)


def test_urls_of_allowed_hosts_are_fetched_and_lead_nowhere_else(bundle, photo_crops):
    photo = jpeg(photo_crops[0])

    class Host(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("Location", "http://localhost:9/")
            self.end_headers()
            self.wfile.write(b"" if self.path == "/moved" else photo if self.path == "/photo" else bytes(40_000))

        def log_message(self, *arguments):
            pass

    host = HTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{host.server_port}"
    with running(bundle, allow_url_hosts=("127.0.0.1",), max_file_bytes=30_000, max_body_bytes=100_000) as (url, _):

        def embed(image):
            return ask(url, {"model": "encoder", "input": image}, "/v1/embeddings")

        assert embed(f"{base}/photo").status == 200
        assert "status 302" in embed(f"{base}/moved").json()["error"]["message"]
        assert "30,001 bytes, more than the limit" in embed(f"{base}/long").json()["error"]["message"]
        assert "no URL of that host" in embed(f"http://localhost:{host.server_port}/photo").json()["error"]["message"]
        hidden = embed(f"http://localhost:{host.server_port}\\@127.0.0.1/photo")
        assert "no URL of that host" in hidden.json()["error"]["message"]
        assert embed([f"{base}/long"] * 4).status == 413
        assert (
            "no URL of that host" in embed(f"http://127.0.0.1@localhost:{host.server_port}/").json()["error"]["message"]
        )
    host.shutdown()
    host.server_close()


def test_a_key_is_asked_for_everywhere_but_at_health_and_documentation(bundle):
    with running(bundle, api_key=KEY) as (url, _):
        for path in ("/v2", "/v2/models/encoder", "/v2/models/encoder/config", "/v1/models", "/metrics"):
            assert POOL.request("GET", url + path).status == 401
            assert POOL.request("GET", url + path, headers={"Authorization": "Bearer wrong"}).status == 401
            for right in (f"Bearer {KEY}", f"bearer  {KEY} "):
                assert POOL.request("GET", url + path, headers={"Authorization": right}).status == 200
        assert ask(url, b"{}").status == 401
        assert ask(url, b"{}", "/v1/embeddings").json()["error"]["code"] == "unauthorized"
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/encoder/ready", "/docs", "/openapi.json"):
            assert POOL.request("GET", url + path).status == 200


def test_long_and_slow_bodies_are_refused(bundle):
    with running(bundle, max_body_bytes=10_000, timeout_s=0.5) as (url, _):
        assert ask(url, bytes(10_001)).status == 413
        assert POOL.request("POST", f"{url}/v2/models/encoder/infer", body=iter([bytes(9000)] * 2)).status == 413
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            start = time.monotonic()
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
            assert time.monotonic() - start < 2


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(bundle, photo_crops):
    big = io.BytesIO()
    photo_crops[0].resize((5000, 5000)).save(big, "JPEG")
    with running(bundle, max_queue=8) as (url, engine):
        answers = []
        busy = threading.Thread(target=lambda: answers.append(ask(url, files(*[big.getvalue()] * 8))))
        busy.start()
        while not engine.num_open:
            time.sleep(0.01)
        start = time.monotonic()
        refused = infer(url, np.zeros((1, 32, 32, 3), np.uint8))
        assert time.monotonic() - start < 0.5
        assert refused.status == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert busy.is_alive()
        busy.join()
        assert answers[0].json()["outputs"][1]["data"] == [""] * 8
        assert infer(url, np.zeros((1, 32, 32, 3), np.uint8)).status == 200


def test_who_waits_too_long_is_told_and_a_wait_that_is_foreseen_is_refused(bundle, photo_crops):
    big = io.BytesIO()
    photo_crops[0].resize((5000, 5000)).save(big, "JPEG")
    with running(bundle, max_wait_s=0.3) as (url, engine):
        answer = ask(url, files(*[big.getvalue()] * 32))
        assert answer.status == 503
        assert "waited for more than 0.3 s" in answer.json()["error"]
        while engine.num_open:
            time.sleep(0.01)
        assert infer(url, np.zeros((1, 32, 32, 3), np.uint8)).status == 200


def test_metrics_count_every_end(url, photo_crops):
    ask(url, files(jpeg(photo_crops[0]), b""))
    ask(url, b"{}")
    ask(url, b"{}", "/v2/models/nobody-s/infer")
    text = POOL.request("GET", f"{url}/metrics").data.decode()
    for line in (
        'mio_requests_total{model="encoder",outcome="ok",protocol="http"}',
        'mio_requests_total{model="encoder",outcome="invalid",protocol="http"}',
        'mio_requests_total{model="",outcome="not_found",protocol="http"}',
        'mio_images_total{result="not_decoded"}',
        'mio_images_total{result="ok"}',
        'mio_batch_images_bucket{le="1.0"}',
        "mio_decode_seconds_count",
        "mio_inference_seconds_count",
        "mio_queue_seconds_count",
        "mio_queue_images 0.0",
    ):
        assert line in text, line
    assert "nobody-s" not in text


def test_an_ending_server_is_not_ready_and_still_answers(bundle):
    with running(bundle) as (url, engine):
        assert POOL.request("GET", f"{url}/v2/health/ready").status == 200
        engine.end()
        assert POOL.request("GET", f"{url}/v2/health/ready").status == 503
        assert POOL.request("GET", f"{url}/v2/health/live").status == 200
        answer = infer(url, np.zeros((1, 32, 32, 3), np.uint8))
        assert (answer.status, answer.headers["Connection"]) == (200, "close")


def test_a_client_that_goes_leaves_the_queue(bundle, photo_crops):
    big = io.BytesIO()
    photo_crops[0].resize((5000, 5000)).save(big, "JPEG")
    body = json.dumps(files(*[big.getvalue()] * 32)).encode()
    with running(bundle) as (url, engine):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v2/models/encoder/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            while not engine.num_open:
                time.sleep(0.01)
        deadline = time.monotonic() + 2
        while engine.num_open:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        text = POOL.request("GET", f"{url}/metrics").data.decode()
        assert 'mio_requests_total{model="encoder",outcome="cancelled",protocol="http"} 1.0' in text
        assert "failed" not in text


@pytest.mark.parametrize("reader", ["gone", "asleep"])
def test_no_request_and_no_end_waits_for_who_reads_the_access_log(monkeypatch, reader, capfd):
    read, write = os.pipe()
    if reader == "gone":
        os.close(read)
    with suppress(BrokenPipeError), os.fdopen(write, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        journal = Journal(access_log=True)
        start = time.monotonic()
        for _ in range(12_000):
            journal.refused(protocol="http", client="", reason="invalid")
        journal.close()
        assert time.monotonic() - start < 5
        if reader == "asleep":
            os.close(read)
        journal._log._thread.join(5)
    assert capfd.readouterr().err == ""


def test_an_image_survives_the_process_that_decodes_it(bundle, photo_crops):
    big = io.BytesIO()
    photo_crops[0].resize((5000, 5000)).save(big, "JPEG")
    with running(bundle) as (url, engine):
        answers = []
        asking = threading.Thread(target=lambda: answers.append(ask(url, files(big.getvalue()))))
        asking.start()
        while not (busy := list(engine._decoder._busy)):
            time.sleep(0.001)
        os.kill(busy[0]._process.pid, signal.SIGKILL)
        asking.join()
        assert answers[0].json()["outputs"][1]["data"] == [""]


def test_a_runtime_that_fails_is_a_server_s_error_without_a_trace(bundle, monkeypatch, capfd):
    with running(bundle) as (url, engine):
        monkeypatch.setattr(engine._runtime, "_run", lambda images: 1 / 0)
        answer = infer(url, np.zeros((1, 32, 32, 3), np.uint8))
        assert (answer.status, answer.json()) == (500, {"error": "the server failed to embed the images"})
        assert "ZeroDivisionError" in capfd.readouterr().err
        monkeypatch.undo()
        assert infer(url, np.zeros((1, 32, 32, 3), np.uint8)).status == 200


def test_an_image_whose_vector_is_not_finite_fails_alone(bundle, monkeypatch):
    with running(bundle) as (url, engine):
        right = engine._runtime._run

        def spoiled(images):
            vectors = right(images)
            vectors[images[:, 0, 0, 0] == 255] = np.inf
            return vectors

        monkeypatch.setattr(engine._runtime, "_run", spoiled)
        images = np.zeros((3, 32, 32, 3), np.uint8)
        images[1, 0, 0, 0] = 255
        answer = infer(url, images)
        document = split(answer.data, int(answer.headers[HEADER_LENGTH]), "outputs")
        rows = np.frombuffer(document["outputs"][0]["data"], np.float32).reshape(3, -1)
        assert [np.isfinite(row).all() for row in rows] == [True, False, True]
        assert b"not finite" in document["outputs"][1]["data"].tobytes()


def test_a_scaled_server_says_so_and_gives_other_vectors(bundle, photo_crops):
    large = jpeg(photo_crops[0].resize((640, 480), Image.Resampling.BICUBIC))
    preprocess = load_bundle(bundle.path).manifest.preprocess
    with running(bundle, decode="scaled") as (url, engine), open_runtime(bundle, "onnxruntime") as runtime:
        assert engine.served.parameters["decode"] == "scaled"
        row = np.array(ask(url, files(large)).json()["outputs"][0]["data"], np.float32)
        scaled, full = (runtime.embed(preprocess.decode(large, scaled=way)[None])[0] for way in (True, False))
    assert np.allclose(row, scaled, rtol=1e-4, atol=1e-5)
    assert not np.allclose(row, full, rtol=1e-4, atol=1e-5)


def test_each_request_is_a_line_of_json_however_it_ends(capsys):
    journal = Journal(access_log=True)
    with journal.request(protocol="grpc", model="encoder", client="127.0.0.1") as record:
        record.count(["", "not an image", ""])
    with pytest.raises(RequestError), journal.request(protocol="http", model="", client="::1"):
        raise RequestError("queue_full", "come again")
    journal.close()
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["outcome"], first["images"], first["failed"], first["client"]) == ("ok", 3, 1, "127.0.0.1")
    assert (second["outcome"], second["protocol"], second["images"]) == ("queue_full", "http", 0)
