import numpy as np
import pytest
from PIL import Image

from mio_export.console.progress import Progress
from mio_export.errors import UsageError
from mio_export.preprocess import Preprocess
from mio_export.train.data import load_images, open_data


def load(part, **changes):
    return load_images(part, Preprocess(**changes), Progress())


def test_bare_pixels_are_what_their_image_files_would_be(fake_set, tmp_path):
    part = open_data(fake_set("cifar10")).train
    for index, key in enumerate(part.keys):
        path = tmp_path / "png" / "train" / f"{key.replace('/', '-')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(part.read(index)).save(path)
    (tmp_path / "png" / "test").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "png" / "test" / "0.png")
    files = open_data(tmp_path / "png").train
    grey = {"channels": 1, "mean": (0.5,), "std": (0.5,)}
    for changes in ({"image_size": 32}, {"image_size": 20}, {"image_size": 32, "resize_size": 40}, grey):
        settings = {"image_size": 48, **changes}
        np.testing.assert_array_equal(load(part, **settings).pixels, load(files, **settings).pixels)


def test_the_mean_of_the_contract_changes_no_pixel(fake_set):
    part = open_data(fake_set("cifar10")).test
    a, b = (load(part, image_size=32, mean=mean) for mean in ((0.5,) * 3, (0.1,) * 3))
    np.testing.assert_array_equal(a.pixels, b.pixels)
    assert a.sha256 == b.sha256


def test_images_that_do_not_fit_are_refused_without_a_scratch_folder(fake_set):
    part = open_data(fake_set("cifar10")).train
    with pytest.raises(UsageError, match=r"40 images of 32 px need 0\.0 GB in memory, .* choose a smaller image_size"):
        load_images(part, Preprocess(image_size=32), Progress(), memory_bytes=40 * 32 * 32 * 3 - 1)
    load_images(part, Preprocess(image_size=32), Progress(), memory_bytes=40 * 32 * 32 * 3)
