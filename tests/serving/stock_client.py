"""Embed images with the stock ``tritonclient``, in the environment that has it.

Arguments: HOST:PORT of HTTP, HOST:PORT of gRPC or ``-``, the name of the model, a file of images, a file for answers.
"""

import queue
import sys

import numpy as np
import tritonclient.grpc
import tritonclient.http

BATCH = 20


def batches(images):
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def tensor(module, images, **options):
    is_files = images.dtype == np.object_
    made = module.InferInput("images", list(images.shape), "BYTES" if is_files else "UINT8")
    made.set_data_from_numpy(images, **options)
    return [made]


def joined(answers):
    """Return all embeddings; none may have a reason why it failed."""
    assert not any(error for answer in answers for error in answer.as_numpy("error")[:, 0])
    return np.concatenate([answer.as_numpy("embedding") for answer in answers])


def over_http(place, name, files, pixels):
    module = tritonclient.http
    with module.InferenceServerClient(place, concurrency=4, network_timeout=60) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(name, "1")
        assert client.get_server_metadata()["name"]
        assert client.get_model_metadata(name)["inputs"] == [{"name": "images", "datatype": "BYTES", "shape": [-1, 1]}]
        assert client.get_model_config(name)["parameters"]["space"]["string_value"]
        for model, images in ((name, files), (f"{name}_pixels", pixels)):
            yield f"http {model}", joined([client.infer(model, tensor(module, part)) for part in batches(images)])
            calls = [client.async_infer(model, tensor(module, part), request_id="7") for part in batches(images)]
            yield f"http async {model}", joined([call.get_result() for call in calls])
        wanted = [module.InferRequestedOutput(output, binary_data=False) for output in ("embedding", "error")]
        parts = [tensor(module, part, binary_data=False) for part in batches(pixels)]
        yield "http JSON", joined([client.infer(f"{name}_pixels", part, outputs=wanted) for part in parts])


def over_grpc(place, name, files, pixels):
    module = tritonclient.grpc
    with module.InferenceServerClient(place) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(name, "1")
        assert client.get_server_metadata().name
        assert [tuple(i.shape) for i in client.get_model_metadata(f"{name}_pixels").inputs] == [(-1, *pixels.shape[1:])]
        assert client.get_model_config(name).config.parameters["space"].string_value
        for model, images in ((name, files), (f"{name}_pixels", pixels)):
            parts = [tensor(module, part) for part in batches(images)]
            yield f"grpc {model}", joined([client.infer(model, part, client_timeout=60) for part in parts])
            done = queue.Queue()
            for number, part in enumerate(parts):
                client.async_infer(
                    model, part, lambda result, error, done=done: done.put((result, error)), request_id=str(number)
                )
            yield f"grpc async {model}", joined(in_order(done, len(parts)))
            client.start_stream(lambda result, error, done=done: done.put((result, error)))
            for number, part in enumerate(parts):
                client.async_stream_infer(model, part, request_id=str(number))
            yield f"grpc stream {model}", joined(in_order(done, len(parts)))
            client.stop_stream()


def in_order(done, number):
    answers = {}
    for _ in range(number):
        result, error = done.get(timeout=60)
        assert error is None, error
        answers[int(result.get_response().id)] = result
    return [answers[index] for index in range(number)]


if __name__ == "__main__":
    http, grpc, name, source, target = sys.argv[1:]
    with np.load(source) as data:
        ends = np.cumsum(data["sizes"])
        content, pixels = data["content"].tobytes(), data["pixels"]
    files = [content[end - size : end] for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]
    files = np.array([[file] for file in files], dtype=np.object_)
    found = dict(over_http(http, name, files, pixels))
    if grpc != "-":
        found |= dict(over_grpc(grpc, name, files, pixels))
    np.savez(target, **found)
