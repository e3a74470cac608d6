"""What needs a CUDA device: ``make gpu``."""

import numpy as np
import pytest
from PIL import Image

from mio_export.embedding import embed
from mio_export.embedding.throughput import measure
from mio_export.exporting import export
from mio_export.models import build_encoder
from mio_export.parity import verify
from mio_export.preprocess import Preprocess
from mio_export.runtimes.devices import has_cuda
from mio_export.sample import extract_sample
from mio_export.store import load_embeddings
from mio_export.train import evaluate, recipe_from_dict, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="no CUDA device is visible")]


@pytest.mark.parametrize("objective", ["mio", "minc"])
def test_train_export_prove_and_embed_on_cuda(tmp_path, objective):
    images = tmp_path / "images"
    extract_sample(images)
    recipe = recipe_from_dict({"objective": objective, "epochs": 3})
    result = train(recipe, images, tmp_path / "run", device="cuda")
    assert np.isfinite(result.metrics["loss"])
    path = tmp_path / "sample.mio"
    export(tmp_path / "run", path, formats=("onnx", "torchscript"), images=images / "test")
    verification = verify(path, images=images / "test", limit=1_000, device="cuda")
    for report in verification.reports:
        worst = min(comparison.min_cosine for comparison in report.comparisons)
        print(f"{report.artifact} on {report.device}: min cosine {worst:.8f}, {report.problems}")  # noqa: T201
    assert verification.passed
    for device in ("cuda", "cpu"):
        embed(path, images / "test", tmp_path / device, device=device)
    a, b = (load_embeddings(tmp_path / device).vectors for device in ("cuda", "cpu"))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() >= 0.99999


def test_scores_on_cuda_are_those_on_the_cpu(tmp_path):
    images = tmp_path / "images"
    extract_sample(images)
    train(recipe_from_dict({"epochs": 1}), images, tmp_path / "run", device="cuda")
    on_cuda, on_cpu = (evaluate(tmp_path / "run", images, device=device) for device in ("cuda", "cpu"))
    assert (on_cuda.device, on_cpu.device) == ("cuda", "cpu")
    for name, scores in on_cpu.scores.items():
        assert on_cuda.scores[name].knn == pytest.approx(scores.knn, abs=3 / 1000)
        assert on_cuda.scores[name].copy_recall == pytest.approx(scores.copy_recall, abs=5 / 1000)


def test_embedding_keeps_up_with_the_slower_of_decoding_and_resnet50(tmp_path):
    """End to end against min(decoding alone, the model alone), and the batch that was found."""
    files = tmp_path / "files"
    files.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2_000):
        small = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(files / f"{index:04d}.jpg", quality=90)
    encoder = build_encoder("resnet50", Preprocess(image_size=224)).eval()
    bundle = export(encoder, tmp_path / "resnet50.mio", formats=("onnx",), max_batch=256).bundle
    assert verify(bundle.path, images=files, limit=64, device="cuda").passed
    info = embed(bundle.path, files, tmp_path / "store", device="cuda").info
    result = measure(bundle.path, files, batch_size=info.batch_size, device="cuda")
    print(f"batches of {info.batch_size}; " + "; ".join(result.lines()))  # noqa: T201
    assert result.share >= 0.9
