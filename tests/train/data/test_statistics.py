import numpy as np
import pytest
from PIL import Image

from mio_export.sources import evenly_spaced
from mio_export.train.data import ImageSet, mean_and_std, open_data, probe_geometry
from mio_export.train.data.split import ArrayPart


def make(folder, num_images, mode, size):
    folder.mkdir()
    for index in range(num_images):
        Image.new(mode, size).save(folder / f"{index}.png")


def image_set(pixels):
    keys = tuple(map(str, range(len(pixels))))
    return ImageSet(pixels=pixels, labels=None, class_names=(), keys=keys, sha256="", failures=())


def test_geometry_is_read_off_the_images(tmp_path):
    make(tmp_path / "grey", 10, "L", (40, 28))
    make(tmp_path / "colour", 10, "RGB", (800, 600))
    grey, colour = (probe_geometry(open_data(tmp_path / name).train) for name in ("grey", "colour"))
    assert (grey.image_size, grey.channels) == (28, 1)
    assert (colour.image_size, colour.channels) == (224, 3)


@pytest.mark.parametrize(("shape", "expected"), [((3, 20, 30, 1), (20, 1)), ((3, 5, 7, 3), (8, 3))])
def test_geometry_of_bare_pixels_is_their_shape(shape, expected):
    images = np.zeros(shape, np.uint8)
    part = ArrayPart(keys=["a", "b", "c"], images=images, labels=None, class_names=(), fingerprint="")
    geometry = probe_geometry(part)
    assert (geometry.image_size, geometry.channels) == expected


def test_the_look_goes_on_until_an_image_can_be_read(tmp_path):
    make(tmp_path / "images", 450, "L", (24, 24))
    train = open_data(tmp_path / "images").train
    passed_over = next(index for index in range(len(train)) if index not in evenly_spaced(range(len(train)), 200))
    for index, key in enumerate(train.keys):
        if index != passed_over:
            (tmp_path / "images" / key).write_bytes(b"broken")
    assert probe_geometry(train).image_size == 24


def test_mean_and_std_are_those_of_the_pixels():
    pixels = np.random.default_rng(0).integers(0, 200, (40, 16, 16, 3), dtype=np.uint8)
    mean, std = mean_and_std(image_set(pixels))
    assert mean == pytest.approx(pixels.mean((0, 1, 2)) / 255, abs=1e-6)
    assert std == pytest.approx(pixels.std((0, 1, 2)) / 255, abs=1e-6)


def test_of_a_very_large_set_ten_thousand_images_are_counted(monkeypatch):
    constants = np.random.default_rng(0).integers(0, 256, 30_000, dtype=np.uint8)
    constants[15_000:] //= 2  # the spread must reach the end
    images = image_set(np.repeat(constants, 4).reshape(-1, 2, 2, 1))
    exact = mean_and_std(images)
    monkeypatch.setattr("mio_export.train.data.statistics._EXACT_BYTES", images.pixels.nbytes - 1)
    sampled = mean_and_std(images)
    assert sampled == mean_and_std(image_set(images.pixels[1::3]))
    assert sampled != exact
    np.testing.assert_allclose(sampled, exact, atol=0.01)
