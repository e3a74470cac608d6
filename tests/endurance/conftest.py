"""A bundle of a tiny encoder whose contract refuses large images, and a store that it made."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from mio_export.embedding import embed
from mio_export.exporting import export
from mio_export.models import build_encoder
from mio_export.preprocess import Preprocess


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, photos):
    """A bundle with an ONNX artifact of 0.1 MB; images beyond 4 million pixels are refused."""
    torch.manual_seed(0)
    encoder = build_encoder("small", Preprocess(image_size=16, max_pixels=4_000_000), stem="small")
    path = tmp_path_factory.mktemp("tiny") / "tiny.mio"
    return export(encoder.eval(), path, formats=("onnx",), images=photos, max_batch=32, limit=24).bundle.path


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory, tiny, photos):
    """Its store of 24 photos."""
    out = tmp_path_factory.mktemp("tiny") / "store"
    embed(tiny, photos, out, runtime="onnxruntime", decode="full", shard_size=8)
    return out


@pytest.fixture
def memory_folder(tmp_path):
    """A folder in memory where there is one: the disk is not what is tried."""
    shared = Path("/dev/shm")
    folder = shared / f"mio-fuzz-{os.getpid()}" if shared.is_dir() else tmp_path / "fuzz"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
