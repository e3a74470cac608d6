"""Clients that others wrote, unchanged: ``tritonclient`` over HTTP and gRPC, and ``openai``."""

import base64
import json
import subprocess
from pathlib import Path

import numpy as np
import openai
import pytest

from mio_export import embed, load_embeddings
from mio_export.serving.messages import message_class

ROOT = Path(__file__).parents[2]
STOCK_PYTHON = ROOT / ".venv-triton/bin/python"
STOCK_CLIENT = Path(__file__).with_name("stock_client.py")
needs_stock = pytest.mark.skipif(not STOCK_PYTHON.exists(), reason="`make test` builds the environment .venv-triton")


def assert_same(found, expected, what=""):
    """Two decode modes are 1e-3 apart here, which a cosine alone would not show."""
    norms = np.linalg.norm(expected, axis=1)
    assert found.shape == expected.shape
    assert ((found * expected).sum(axis=1) / np.linalg.norm(found, axis=1) / norms).min() >= 0.99999, what
    assert (np.linalg.norm(found - expected, axis=1) / norms).max() < 1e-4, what


@pytest.fixture(scope="module")
def folder(photo_crops, tmp_path_factory):
    """200 different JPEGs, in several sizes, all of them large enough to be decoded scaled."""
    folder = tmp_path_factory.mktemp("stock") / "images"
    folder.mkdir()
    for index in range(200):
        image = photo_crops[index % len(photo_crops)].rotate(index).resize((150 + index, 180))
        image.save(folder / f"{index:03d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def files(folder):
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def embedded(bundle, folder, tmp_path_factory):
    """What ``mio embed`` makes of them, by decode mode."""

    def run(decode):
        out = tmp_path_factory.mktemp("embedded") / "store"
        embed(bundle.path, folder, out, runtime="onnxruntime", precision="fp32", decode=decode)
        store = load_embeddings(out)
        assert list(store.keys) == sorted(path.name for path in folder.iterdir())
        return store.vectors

    return {decode: run(decode) for decode in ("full", "scaled")}


@pytest.fixture(
    scope="module", params=["full", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("scaled", "ray"))]
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def decode(kind):
    return "scaled" if kind == "scaled" else "full"


@pytest.fixture(scope="module")
def running(kind, request, serve, bundle, tmp_path_factory):
    """A server of each kind."""
    if kind == "full":
        yield request.getfixturevalue("server")
        return
    options = ["--decode=scaled"] if kind == "scaled" else ["--engine=ray", "--replicas=2", "--grpc-port=8001"]
    with serve(bundle.path, tmp_path_factory.mktemp(kind), *options) as started:
        yield started


@needs_stock
def test_tritonclient_gets_what_mio_embed_writes(running, kind, decode, bundle, files, embedded, tmp_path):
    scaled = decode == "scaled"
    pixels = np.stack([bundle.manifest.preprocess.decode(file, scaled=scaled) for file in files])
    content = np.frombuffer(b"".join(files), np.uint8)
    np.savez(tmp_path / "images.npz", content=content, sizes=[len(file) for file in files], pixels=pixels)
    places = [f"127.0.0.1:{running.http_port}", "-" if kind == "ray" else f"127.0.0.1:{running.grpc_port}"]
    command = [STOCK_PYTHON, STOCK_CLIENT, *places, "encoder", tmp_path / "images.npz", tmp_path / "answers.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "answers.npz") as answers:
        assert len(answers.files) == (5 if kind == "ray" else 11)
        for name in answers.files:
            assert_same(answers[name], embedded[decode], name)
    with pytest.raises(AssertionError):
        assert_same(embedded["full"], embedded["scaled"])


def test_openai_gets_what_mio_embed_writes(running, decode, bundle, files, embedded):
    uris = ["data:image/jpeg;base64," + base64.b64encode(file).decode() for file in files]
    url = running.http.replace("/encoder", "/v1")
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
        assert {model.id for model in client.models.list()} == {"encoder", bundle.manifest.space}
        answers = [client.embeddings.create(model=bundle.manifest.space, input=uris)]  # its own choice, base64
        answers.append(client.embeddings.create(model="encoder", input=uris, encoding_format="float"))
        one = client.embeddings.create(model="encoder", input=base64.b64encode(files[7]).decode())
        with pytest.raises(openai.NotFoundError, match="the model here is"):
            client.embeddings.create(model="0" * 64, input=uris[0])
        with pytest.raises(openai.BadRequestError, match="input 1: "):
            client.embeddings.create(model="encoder", input=[uris[0], "bm8gaW1hZ2U="])
    for answer in answers:
        assert answer.model == bundle.manifest.space
        assert [row.index for row in answer.data] == list(range(200))
        assert_same(np.array([row.embedding for row in answer.data]), embedded[decode])
    assert_same(np.array([one.data[0].embedding]), embedded[decode][7:8])


DESCRIBE = """
import json
from tritonclient.grpc import model_config_pb2, service_pb2

def kind(field):
    own = field.message_type or field.enum_type
    if field.message_type and field.message_type.GetOptions().map_entry:
        return ["map", *kind(field.message_type.fields_by_name["value"])]
    return [field.type, own and own.name]

messages, enums = {}, {}
def note_enums(found):
    for enum in found:  # two of one name have other values
        enums.setdefault(enum.name, {}).update({value.name: value.number for value in enum.values})

def note(message):
    messages[message.name] = {field.name: [field.number, field.is_repeated, *kind(field)] for field in message.fields}
    note_enums(message.enum_types)
    for nested in message.nested_types:
        note(nested)

for file in (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR):
    note_enums(file.enum_types_by_name.values())
    for message in file.message_types_by_name.values():
        note(message)
print(json.dumps([service_pb2.DESCRIPTOR.package, messages, enums]))
"""


def ours(field):
    """Describe the type of a field as ``DESCRIBE`` does; a map is declared as its entries here."""
    own = field.message_type or field.enum_type
    if own and own.name.endswith("Entry"):
        assert {entry.name: entry.number for entry in own.fields} == {"key": 1, "value": 2}
        return ["map", *ours(own.fields_by_name["value"])]
    return [field.type, own and own.name]


@needs_stock
def test_our_messages_are_those_of_the_stock_client():
    done = subprocess.run([STOCK_PYTHON, "-c", DESCRIBE], capture_output=True, text=True, check=True, timeout=60)
    package, messages, enums = json.loads(done.stdout)
    file = message_class("ModelInferRequest").DESCRIPTOR.file
    assert file.package == package == "inference"
    names = [name for name in file.message_types_by_name if not name.endswith("Entry")]
    assert len(names) >= 35
    for name in names:
        for field in file.message_types_by_name[name].fields:
            expected = messages[name].get(field.name)
            assert [field.number, field.is_repeated, *ours(field)] == expected, f"{name}.{field.name}"
    for name, enum in file.enum_types_by_name.items():
        assert {value.name: value.number for value in enum.values}.items() <= enums[name].items()
