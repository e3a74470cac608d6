"""Real photos, tiny real encoders and the command line, for all tests."""

import json
import os
import signal
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image

from mio_export.bundle import WEIGHTS, load_bundle, save_manifest, space_fingerprint
from mio_export.exporting import export
from mio_export.files import sha256_file
from mio_export.models import build_encoder, save_encoder
from mio_export.preprocess import Preprocess
from mio_export.runtimes.devices import limit_threads, num_threads
from mio_export.sample import read_sample
from mio_export.train import recipe_from_dict, train

# measure time, start Ray or servers, or use every core: not two of them at once
NEED_THE_MACHINE = ("embedding/test_inference_queue", "embedding/test_ray", "embedding/test_scale", "serving/")


def pytest_configure(config):
    """Give each worker its share of the cores: two that use all of them slow each other sixfold."""
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        limit_threads(max(1, num_threads() // int(workers)))


def pytest_collection_modifyitems(config, items):
    """Group tests for ``--dist loadgroup``: by file, because files share fixtures, or by what they need."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        file = item.nodeid.partition("::")[0]
        alone = file.removeprefix("tests/").startswith(NEED_THE_MACHINE)
        item.add_marker(pytest.mark.xdist_group("machine" if alone else file))


@pytest.fixture(scope="session")
def photo_crops():
    """24 crops, 160 px, of the two colour photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    return [
        Image.fromarray(photo[top : top + 160, left : left + 160])
        for photo in load_sample_images().images
        for top in (0, 120, 240)
        for left in (0, 160, 320, 480)
    ]


@pytest.fixture(scope="session")
def photos(tmp_path_factory, photo_crops):
    """A folder of 24 colour photos in two class folders."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for index, crop in enumerate(photo_crops):
        path = folder / ("temple" if index < 12 else "flower") / f"{index:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, quality=95)
    return folder


@pytest.fixture(scope="session")
def encoder(photo_crops):
    """A small colour encoder, 32 px, whose batch norms have seen photos and have weights of their own."""
    torch.manual_seed(0)
    encoder = build_encoder("small", Preprocess(image_size=32, resize_size=36), stem="small")
    images = torch.stack([torch.from_numpy(encoder.preprocess.pixels(crop)) for crop in photo_crops])
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(10):
            encoder(images)
    return encoder.eval()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, encoder, photos):
    """Its bundle, with an ONNX and a TorchScript artifact; read only."""
    path = tmp_path_factory.mktemp("bundle") / "encoder.mio"
    return export(encoder, path, formats=("onnx", "torchscript"), images=photos, max_batch=32).bundle


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, encoder):
    """What ``mio export`` needs of a training run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_encoder(folder, encoder)
    return folder


@pytest.fixture(scope="session")
def greys(tmp_path_factory):
    """A folder of 200 images of the sample, 28 px, without labels."""
    folder = tmp_path_factory.mktemp("data") / "greys"
    folder.mkdir()
    for index, image in enumerate(read_sample("train", limit=200)):
        (folder / f"{index:03d}.png").write_bytes(image)
    return folder


@pytest.fixture(scope="session")
def ordered_run(tmp_path_factory, greys):
    """A run of ordered MINC, one epoch, with 32 projections; read only."""
    folder = tmp_path_factory.mktemp("runs") / "ordered"
    values = {"objective": "minc", "loss": {"ordered": True}, "epochs": 1, "batch_size": 32}
    train(recipe_from_dict({**values, "hidden_dim": 64, "output_dim": 32}), greys, folder)
    return folder


@pytest.fixture(scope="session")
def unordered_run(tmp_path_factory, greys):
    """The same of MIO, whose projections have no order; read only."""
    folder = tmp_path_factory.mktemp("runs") / "unordered"
    values = {"objective": "mio", "epochs": 1, "batch_size": 32, "hidden_dim": 64, "output_dim": 32}
    train(recipe_from_dict(values), greys, folder)
    return folder


@pytest.fixture(scope="session")
def forge():
    """Hash everything in a bundle again, its evidence too, so that only a comparison can find what was changed."""

    def forged(row, path):
        artifact_sha256, name = sha256_file(path / row.file), path / row.parity.report
        report = json.loads(name.read_text())
        report["evidence"] |= {"artifact_sha256": artifact_sha256, "weights_sha256": sha256_file(path / WEIGHTS)}
        name.write_text(json.dumps(report))
        return replace(row, sha256=artifact_sha256, parity=replace(row.parity, report_sha256=sha256_file(name)))

    def run(path):
        manifest = load_bundle(path).manifest
        weights = sha256_file(path / WEIGHTS)
        space = space_fingerprint(weights_sha256=weights, encoder=manifest.encoder, preprocess=manifest.preprocess)
        artifacts = tuple(forged(row, path) for row in manifest.artifacts)
        save_manifest(path, replace(manifest, artifacts=artifacts, weights_sha256=weights, space=space))

    return run


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


@pytest.fixture
def mio(monkeypatch, capfd):
    """Run the command line in this process: ``mio("embed", bundle, photos, "-o", out)``."""

    def run(*arguments):
        from mio_export.cli.main import main

        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["mio", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as leave:
            code = leave.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capfd.readouterr()
        return Finished(code, captured.out, captured.err)

    return run


@pytest.fixture
def forwards(monkeypatch):
    """How many images were given to ONNX Runtime, call by call."""
    from mio_export.runtimes.onnxruntime import OnnxRuntime

    counted = []
    original = OnnxRuntime._run

    def run(self, images):
        counted.append(len(images))
        return original(self, images)

    monkeypatch.setattr(OnnxRuntime, "_run", run)
    return counted
