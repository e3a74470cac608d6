"""What a server does when it starts, is attacked, loses a process, and ends."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc
import numpy as np
import pytest
import urllib3

from mio_export.errors import GateError, UsageError
from mio_export.runtimes import open_runtime
from mio_export.serving import ServeOptions, Server
from mio_export.serving.messages import message
from tests.serving.conftest import children, free_ports, infer_http, infer_request, method

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def photo(photo_crops):
    buffer = io.BytesIO()
    photo_crops[0].save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def expected(bundle):
    with open_runtime(bundle, "onnxruntime") as runtime:
        return runtime.embed(PIXELS)


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield channel


def answered(connection):
    """Everything that comes until the connection is closed."""
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def test_both_protocols_give_the_embeddings_of_the_artifact(server, channel, expected, bundle, photo):
    infer = method(channel, "ModelInfer")
    answer = infer(infer_request(PIXELS, id="7"))
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "encoder_pixels", "1")
    vectors = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)
    with urllib3.PoolManager() as pool:
        status, vectors, errors = infer_http(pool, server.http, PIXELS)
    assert (status, errors) == (200, [""] * 3)
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)
    with open_runtime(bundle, "onnxruntime") as runtime:
        right = runtime.embed(bundle.manifest.preprocess.decode(photo)[None])[0]
    answer = infer(infer_request([photo, b"no image"], model="encoder"))
    vectors = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, -1)
    np.testing.assert_allclose(vectors[0], right, rtol=1e-5, atol=1e-6)
    assert np.isnan(vectors[1]).all()
    assert b"not an image" in answer.raw_output_contents[1]


def test_grpc_takes_typed_contents_and_gives_the_outputs_that_are_asked_for(channel, expected, photo):
    infer = method(channel, "ModelInfer")
    request = infer_request(PIXELS[:1], outputs=[{"name": "embedding"}])
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.uint_contents.extend(PIXELS[:1].ravel().tolist())
    answer = infer(request)
    assert [output.name for output in answer.outputs] == ["embedding"]
    vectors = np.frombuffer(answer.raw_output_contents[0], np.float32)
    np.testing.assert_allclose(vectors, expected[0], rtol=1e-5, atol=1e-6)
    request = infer_request([photo], model="encoder")
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.bytes_contents.append(photo)
    assert infer(request).raw_output_contents[1] == b"\0\0\0\0"


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (infer_request(PIXELS, model="nobody"), "NOT_FOUND", "unknown model 'nobody'"),
        (infer_request(PIXELS, model_version="2"), "NOT_FOUND", "version 1"),
        (infer_request(PIXELS, model="encoder"), "INVALID_ARGUMENT", "BYTES of shape"),
        (infer_request(PIXELS[:, :31]), "INVALID_ARGUMENT", "UINT8 of shape"),
        (infer_request(np.repeat(PIXELS, 11, axis=0)), "INVALID_ARGUMENT", "1 to 32 images, got 33"),
        (infer_request(PIXELS, outputs=[{"name": "bad"}]), "INVALID_ARGUMENT", "no output 'bad'"),
        (infer_request(PIXELS, model="x" * 100_000), "NOT_FOUND", "unknown model"),
        (
            message(
                "ModelInferRequest",
                model_name="encoder",
                inputs=[
                    {"name": "images", "datatype": "BYTES", "shape": [1, 1], "contents": {"uint_contents": [1]}},
                ],
            ),
            "INVALID_ARGUMENT",
            "has 0 elements",
        ),
    ],
)
def test_grpc_refuses_with_a_code_and_one_line(channel, request_, code, text):
    with pytest.raises(grpc.RpcError, match=text) as caught:
        method(channel, "ModelInfer")(request_)
    assert caught.value.code().name == code
    assert "Traceback" not in caught.value.details()


def test_bytes_that_are_no_message_are_refused_and_a_stream_goes_on(channel):
    infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.RpcError, match="no ModelInferRequest") as caught:
        infer(b"\xff" * 100)
    assert caught.value.code().name == "INVALID_ARGUMENT"
    stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    answers = list(stream(iter([b"\xff", infer_request(PIXELS).SerializeToString()])))
    assert b"no ModelInferRequest" in answers[0]
    assert b"embedding" in answers[1]


def test_a_stream_answers_each_request_in_order_and_goes_on_after_a_bad_one(channel):
    ask = method(channel, "ModelStreamInfer", kind="stream_stream")
    models = ["encoder_pixels", "nobody", "encoder_pixels"]
    answers = list(ask(infer_request(PIXELS, model=model, id=str(n)) for n, model in enumerate(models)))
    assert [answer.infer_response.id for answer in answers] == ["0", "", "2"]
    assert "unknown model" in answers[1].error_message


def test_start_up_says_what_is_served_and_where(server):
    text = server.log.read_text()
    for part in (server.http, server.grpc, "encoder.onnx (onnxruntime fp32 on cpu)", "proved on cpu: cosine 1.0000000"):
        assert part in text
    outside = socket.gethostbyname(socket.gethostname())
    with socket.socket() as other:
        other.settimeout(2)
        assert outside.startswith("127.") or other.connect_ex((outside, server.http_port)) != 0


def test_whoever_sends_too_slowly_is_refused_and_nobody_else(serve, bundle, tmp_path, expected):
    with serve(bundle.path, tmp_path, "--timeout-seconds", "0.6") as running, urllib3.PoolManager() as pool:
        with running.connect() as silent, running.connect() as slow, running.connect() as trickling:
            slow.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n")
            trickling.sendall(b"GET / HTTP/1.1\r\n")
            trickling.settimeout(0.1)
            answer, deadline = b"", time.monotonic() + 10
            while not answer and time.monotonic() < deadline:  # a line of the head now and then does not help
                trickling.sendall(b"A: b\r\n")
                with suppress(TimeoutError):
                    answer = trickling.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert infer_http(pool, running.http, PIXELS)[2] == [""] * 3
            assert answered(slow).startswith(b"HTTP/1.1 408 ")
            assert answered(silent) == b""
        with grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
            ask = method(channel, "ModelInfer", kind="stream_unary")
            with pytest.raises(grpc.RpcError, match=r"took more than 0.6 s") as caught:
                ask(iter(lambda: time.sleep(1), 0), timeout=10)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert running.is_ready()
        assert Counter(record["outcome"] for record in running.records())["too_slow"] == 3


@pytest.mark.parametrize("size", [1, 300])
def test_a_body_of_tiny_chunks_is_refused_early_and_one_of_small_chunks_is_not(server, size):
    """A million chunks of a byte killed the server that this one replaces."""
    head = b"POST /v2/models/encoder_pixels/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n" % (size, b"x" * size)
    with server.connect() as connection:
        sender = threading.Thread(target=lambda: sent(connection, head + chunk * 4000 + b"0\r\n\r\n"))
        sender.start()
        start = time.monotonic()
        answer = connection.recv(65536)
        while b"}" not in answer:
            answer += connection.recv(65536)
        sender.join()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert (b"cannot be read" in answer) == (size == 300)  # it was read as a whole, and is no JSON
    assert time.monotonic() - start < 5
    assert server.is_ready()


def sent(connection, data):
    try:
        connection.sendall(data)
    except OSError:
        return


def test_half_closed_connections_are_answered(server, photo):
    uri = f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"
    body = json.dumps({"model": "encoder", "input": [uri] * 20}).encode()
    with server.connect() as connection:
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        connection.shutdown(socket.SHUT_WR)
        answer = answered(connection)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b'"index"') == 20
    with server.connect() as connection:
        connection.sendall(b"POST /v2/models/encoder/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        connection.shutdown(socket.SHUT_WR)
        answer = answered(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"cut off" in answer


@pytest.mark.parametrize("endless", [b"A: %b\r\n" % (b"x" * 1000), b"x" * 1000], ids=["headers", "one header"])
def test_an_endless_head_is_refused(server, endless):
    with server.connect() as connection:
        sender = threading.Thread(target=lambda: sent(connection, b"GET / HTTP/1.1\r\nA: " + endless * 5000))
        sender.start()
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
        sender.join()


def test_who_takes_a_long_answer_late_is_served_on(serve, bundle, tmp_path, photo):
    image = base64.b64encode(photo).decode()
    with (
        serve(bundle.path, tmp_path, "--timeout-seconds=1") as running,
        urllib3.HTTPConnectionPool("127.0.0.1", running.http_port, retries=False, timeout=15) as pool,
    ):

        def ask(number):
            body = json.dumps({"model": "encoder", "input": [image] * number})
            return pool.request("POST", "/v1/embeddings", body=body, preload_content=False, retries=False)

        answer = ask(2000)
        time.sleep(0.3)
        assert len(answer.read()) > 5_000_000
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert len(ask(1).read()) > 1000
        assert pool.num_connections == 1


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\nab", [b"413"]),
        (b"\0garbage", [b"400"]),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n" * 3 + b"\0garbage", []),
    ],
)
def test_a_request_has_one_answer_and_a_refused_connection_no_trace(server, data, statuses):
    with server.connect() as connection:
        connection.sendall(data)
        time.sleep(0.1)
        connection.shutdown(socket.SHUT_WR)
        assert [part[:3] for part in answered(connection).split(b"HTTP/1.1 ")[1:]] == statuses
    assert "Traceback" not in server.log.read_text()


def test_who_speaks_something_else_and_goes_is_refused_once_and_leaves_no_trace(server):
    refused = 'mio_requests_total{model="",outcome="invalid",protocol="http"}'

    def number():
        return sum(float(line.split()[1]) for line in server.metrics().splitlines() if line.startswith(refused))

    before, said = number(), server.log.read_text()
    with server.connect() as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")  # gRPC at the port of HTTP
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
    deadline = time.monotonic() + 5
    while number() == before:
        assert time.monotonic() < deadline
    assert number() == before + 1
    assert server.log.read_text() == said


def test_one_connection_too_many_is_told_to_come_again(server):
    many = [server.connect() for _ in range(1024)]
    with server.connect() as last:
        answer = answered(last)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 1\r\n" in answer
    for connection in many:
        connection.close()
    deadline = time.monotonic() + 5
    while not server.is_ready():
        assert time.monotonic() < deadline


def test_a_killed_worker_is_replaced_and_every_answer_is_right(serve, bundle, tmp_path, expected):
    with serve(bundle.path, tmp_path) as running, urllib3.PoolManager(retries=False) as pool:
        (worker,) = running.workers()
        decoders = children(worker)
        assert decoders
        os.kill(worker, signal.SIGKILL)
        start = time.monotonic()
        while not running.is_ready(5):
            assert time.monotonic() - start < 5
        assert time.monotonic() - start < 5
        status, vectors, _ = infer_http(pool, running.http, PIXELS)
        assert status == 200
        np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)
        assert running.workers() not in ([worker], [])
        assert "ended: signal SIGKILL; another starts" in running.log.read_text()
        time.sleep(0.2)
        assert not any(alive(pid) for pid in decoders)


def alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and "Z" not in state


def test_a_killed_decoder_is_replaced_before_the_next_file(server, photo):
    (worker,) = server.workers()
    decoders = children(worker)
    for pid in decoders:
        os.kill(pid, signal.SIGKILL)
    while any(map(alive, decoders)):
        time.sleep(0.01)
    with urllib3.PoolManager(retries=False) as pool:
        status, vectors, errors = infer_http(pool, server.http, [photo] * 4, model="encoder")
    assert (status, errors) == (200, [""] * 4)
    assert np.isfinite(vectors).all()
    assert server.workers() == [worker]
    assert not set(children(worker)) & set(decoders)


def test_a_server_that_is_killed_leaves_no_process(serve, bundle, tmp_path):
    with serve(bundle.path, tmp_path, "--workers", "2") as running:
        workers = running.workers()
        assert len(workers) == 2
        running.process.kill()
        deadline = time.monotonic() + 5
        while any(map(alive, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm_under_unbroken_traffic_cuts_no_request(serve, bundle, tmp_path, photo, workers):
    found, stop = Counter(), threading.Event()

    def over_http(images, model, keep_alive):
        with urllib3.PoolManager(retries=False, timeout=20) as pool:
            headers = None if keep_alive else {"Connection": "close"}
            while not stop.is_set():
                try:
                    found["http", infer_http(pool, running.http, images, model=model, headers=headers)[0]] += 1
                except urllib3.exceptions.NewConnectionError:
                    found["refused"] += 1
                    return
                except urllib3.exceptions.HTTPError as error:
                    found[repr(error)] += 1

    def over_grpc(images, model):
        with grpc.insecure_channel(
            f"127.0.0.1:{running.grpc_port}", options=[("grpc.use_local_subchannel_pool", 1)]
        ) as own:
            infer = method(own, "ModelInfer")
            while not stop.is_set():
                try:
                    infer(infer_request(images, model=model), timeout=20)
                    found["grpc"] += 1
                except grpc.RpcError as error:
                    if error.code() == grpc.StatusCode.UNAVAILABLE:
                        found["refused"] += 1
                        return
                    found[error.code().name, error.details()] += 1

    kinds = [(PIXELS, "encoder_pixels"), ([photo], "encoder")]
    with serve(bundle.path, tmp_path, "--workers", str(workers)) as running, ThreadPoolExecutor(8) as pool:
        for images, model in kinds:
            for keep_alive in (True, False):
                pool.submit(over_http, images, model, keep_alive)
            for _ in range(2):
                pool.submit(over_grpc, images, model)
        time.sleep(1.5)
        running.process.terminate()
        status = running.process.wait(20)
        stop.set()
    assert found.pop("refused") == 8
    assert set(found) == {("http", 200), "grpc"}, found
    assert status == 0, running.log.read_text()
    assert "server stopped; all open requests were answered" in running.log.read_text()


def test_what_is_not_answered_in_time_is_said(serve, bundle, tmp_path):
    with serve(bundle.path, tmp_path, "--timeout-seconds", "0.7") as running, ThreadPoolExecutor(1) as threads:
        endless = b"P3\n6000 6000\n255\n" + b"1 2 3 " * 4_000_000  # Pillow reads it for many seconds
        with urllib3.PoolManager(retries=False) as pool:
            asked = threads.submit(infer_http, pool, running.http, [endless], model="encoder")
            time.sleep(0.5)
            running.process.terminate()
            assert running.process.wait(20) == 1, asked.result()
            assert isinstance(asked.exception(), urllib3.exceptions.HTTPError), asked.result()
        assert "mio: 1 open requests were not answered within 0.7 s" in running.log.read_text()
        assert running.workers() == []


def test_a_changed_bundle_is_refused_before_anything_listens(bundle, tmp_path, mio):
    path = tmp_path / "encoder.mio"
    shutil.copytree(bundle.path, path)
    file = path / "encoder.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    result = mio("serve", path)
    assert result.code == 3
    assert "encoder.onnx: sha256 is" in result.err
    with pytest.raises(GateError, match="is not served"):
        Server(path)


def test_an_artifact_that_becomes_another_is_not_started_again(serve, bundle, tmp_path):
    path = tmp_path / "encoder.mio"
    shutil.copytree(bundle.path, path)
    with serve(path, tmp_path) as running:
        file = path / "encoder.onnx"
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
        os.kill(running.workers()[0], signal.SIGKILL)
        assert running.process.wait(20) == 3
        assert "is not the file that was proved" in running.log.read_text()
        assert running.log.read_text().count("another starts") == 1, "the one that was killed"
        assert running.workers() == []


def test_what_was_not_proved_is_not_served(bundle, tmp_path, forge):
    path = tmp_path / "encoder.mio"
    shutil.copytree(bundle.path, path)
    (artifact,) = (artifact for artifact in bundle.manifest.artifacts if artifact.format == "onnx")
    report = path / artifact.parity.report
    report.write_text(report.read_text().replace('"proved"', '"refused"'))
    forge(path)
    with pytest.raises(GateError, match="is refused"):
        Server(path, ServeOptions(runtime="onnxruntime"))


def test_a_taken_port_is_refused_by_its_option(bundle, server, mio):
    http_port, grpc_port = free_ports(2)
    for taken, option in (
        ({"http_port": server.http_port, "grpc_port": grpc_port}, "--http-port"),
        ({"http_port": http_port, "grpc_port": server.grpc_port}, "--grpc-port"),
    ):
        with (
            pytest.raises(UsageError, match=f"port [0-9]+: Address already in use; choose another {option}"),
            Server(bundle, ServeOptions(runtime="onnxruntime", **taken)),
        ):
            pass
    with socket.create_connection(("127.0.0.1", server.http_port)):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 33}, "max_batch must be 1 to 32"),
        ({"host": "no.such.host.invalid"}, "--host"),
        ({"api_key": "key "}, "without spaces at its ends"),
        ({"runtime": "torch"}, "no proved artifact"),
        ({"tls_cert": "/nowhere", "tls_key": "/nowhere"}, "no certificate and its key"),
    ],
)
def test_options_that_this_bundle_or_machine_does_not_allow_are_refused(bundle, options, message):
    with pytest.raises(UsageError, match=message):
        Server(bundle, ServeOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas=2"], "need --engine ray"),
        (["--address=auto"], "need --engine ray"),
        (["--workers=0"], "--workers must be 1 to 256, got 0"),
        (["--max-queue=0"], "--max-queue must be 1 to 1000000, got 0"),
        (["--max-wait-seconds=nan"], "--max-wait-seconds must be 0.01 to 3600, got nan"),
        (["--allow-url-host="], "a host's name alone, without port; got ''"),
        (["--allow-url-host=::1", "--allow-url-host=a.example:80"], "got 'a.example:80'"),
        (["--allow-url-host=https://a.example"], "got 'https://a.example'"),
    ],
)
def test_a_wrong_option_is_named_as_it_was_given(server, bundle, mio, options, message):
    taken = f"--http-port={server.http_port}"  # so that nothing starts
    result = mio("serve", bundle.path, "--runtime=onnxruntime", taken, *options)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", key, "-out", cert),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def test_tls_and_a_key_hold_for_both_protocols(serve, bundle, tmp_path, certificate):
    cert, key = certificate
    with (
        serve(bundle.path, tmp_path, "--tls-cert", cert, "--tls-key", key, MIO_API_KEY="a secret") as running,
        urllib3.PoolManager(ca_certs=str(cert)) as pool,
        grpc.secure_channel(
            f"127.0.0.1:{running.grpc_port}", grpc.ssl_channel_credentials(cert.read_bytes())
        ) as channel,
    ):
        assert "a secret" not in running.log.read_text()
        url = running.http.replace("http", "https")
        assert pool.request("GET", url.replace("/encoder", "/v2/health/ready")).status == 200
        assert infer_http(pool, url, PIXELS)[0] == 401
        assert infer_http(pool, url, PIXELS, headers={"Authorization": "Bearer a secret"})[0] == 200
        assert method(channel, "ServerReady")(message("ServerReadyRequest")).ready
        infer = method(channel, "ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            infer(infer_request(PIXELS))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        infer(infer_request(PIXELS), metadata=[("authorization", "Bearer a secret")])
        with running.connect() as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b"200" not in plain.recv(100)
        with running.connect():  # no handshake at all
            running.process.terminate()
            assert running.process.wait(20) == 0
