import gzip
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from mio_export.console.progress import Progress
from mio_export.errors import MioError
from mio_export.preprocess import Preprocess
from mio_export.train.data import load_images, open_data, probe_geometry

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
GREY = Preprocess(image_size=28, channels=1, mean=(0.5,), std=(0.5,))


def unzip(folder):
    for path in folder.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()


def test_gz_and_plain_files_give_the_same_images_and_the_same_hash(fake_set):
    folder = fake_set("fashion-mnist")
    zipped = load_images(open_data(folder).train, GREY, Progress())
    unzip(folder)
    plain = load_images(open_data(folder).train, GREY, Progress())
    np.testing.assert_array_equal(plain.pixels, zipped.pixels)
    assert (plain.sha256, plain.keys) == (zipped.sha256, zipped.keys)
    assert plain.labels.tolist() == 4 * list(range(10))


def test_images_labels_and_names_are_torchvisions(fake_set, tmp_path):
    folder = fake_set("fashion-mnist")
    unzip(folder)
    (tmp_path / "FashionMNIST").mkdir()
    folder.rename(tmp_path / "FashionMNIST" / "raw")
    data = open_data(tmp_path)
    for part, is_train in ((data.train, True), (data.test, False)):
        theirs = datasets.FashionMNIST(tmp_path, train=is_train)
        np.testing.assert_array_equal(part.images[..., 0], theirs.data.numpy())
        assert part.labels.tolist() == theirs.targets.tolist()
    assert list(data.class_names) == datasets.FashionMNIST.classes


def test_classes_are_clothes_only_if_the_folder_says_so(fake_set, tmp_path):
    folder = fake_set("fashion-mnist")
    assert open_data(folder).class_names[0] == "T-shirt/top"
    folder.rename(tmp_path / "mnist")
    assert open_data(tmp_path / "mnist").class_names == tuple("0123456789")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: gzip.compress(data)[:-30], "ended before the end-of-stream marker"),
        (lambda data: b"no gzip", "Not a gzipped file"),
        (lambda data: gzip.compress(data)[:60] + bytes(60), "Error -3|CRC|invalid"),
        (lambda data: gzip.compress(data[:-1]), "31,360 bytes announced, 31,359 found"),
        (lambda data: gzip.compress(data + b"x"), "31,360 bytes announced, more found"),
        (lambda data: gzip.compress(data[:8]), "no header of 3-dimensional bytes"),
        (lambda data: gzip.compress(b"\0\0\x0d" + data[3:]), "no header of 3-dimensional bytes"),
        (lambda data: gzip.compress(data[:4] + 12 * b"\xff" + data[16:]), ""),
        (lambda data: gzip.compress(data[:4] + 4 * b"\0" + data[8:16]), "40 labels for 0 images"),
    ],
)
def test_a_damaged_file_is_named(fake_set, damage, reason):
    folder = fake_set("fashion-mnist")
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    with pytest.raises(MioError, match=rf"ubyte.gz is damaged or cut off \(.*({reason})") as raised:
        open_data(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_whole_of_debians_fashion_mnist_is_read():
    data = open_data(DEBIAN)
    assert (len(data.train), len(data.test), data.class_names[9]) == (60_000, 10_000, "Ankle boot")
    assert np.bincount(data.train.labels).tolist() == 10 * [6_000]
    assert (probe_geometry(data.train).image_size, probe_geometry(data.train).channels) == (28, 1)
    images = load_images(data.test, GREY, Progress())
    assert images.pixels.shape == (10_000, 28, 28, 1)
    assert images.labels[:5].tolist() == [9, 2, 1, 1, 6]
