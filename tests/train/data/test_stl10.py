import numpy as np
import pytest
from torchvision import datasets

from mio_export.console.progress import Progress
from mio_export.errors import MioError
from mio_export.preprocess import Preprocess
from mio_export.train.data import load_images, open_data


def read_all(part):
    return np.stack([part.read(index) for index in range(len(part))])


def test_images_and_labels_are_torchvisions(fake_set, monkeypatch):
    root = fake_set("stl10")
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)  # knows the real set's hashes
    data = open_data(root)
    for name, part in (("train", data.labelled), ("test", data.test)):
        theirs = datasets.STL10(root, split=name)
        np.testing.assert_array_equal(read_all(part), theirs.data.transpose(0, 2, 3, 1))
        assert part.labels.tolist() == theirs.labels.tolist()
        assert list(data.class_names) == theirs.classes


def test_images_stand_upright(fake_set):
    image = open_data(fake_set("stl10")).labelled.read(0).astype(float)  # class 0: brighter to the right
    left, right, top, bottom = image[:, :48].mean(), image[:, 48:].mean(), image[:48].mean(), image[48:].mean()
    assert right - left > 50
    assert abs(bottom - top) < 5


def test_an_objective_trains_on_the_unlabelled_images_too_and_the_bank_keeps_its_labels(fake_set):
    data = open_data(fake_set("stl10"))
    assert (len(data.train), len(data.labelled)) == (80, 40)
    assert data.train.labels is None
    assert data.notes == ("training on 40 unlabelled and 40 labelled images",)
    np.testing.assert_array_equal(data.train.read(79), data.labelled.read(39))
    images = load_images(data.train, Preprocess(image_size=96), Progress())
    np.testing.assert_array_equal(images.pixels[40:], read_all(data.labelled))
    assert images.keys[39:41] == ("unlabeled_X.bin/00039", "train_X.bin/00000")


def test_without_the_unlabelled_file_the_labelled_images_are_all(fake_set):
    root = fake_set("stl10")
    (root / "stl10_binary" / "unlabeled_X.bin").unlink()
    data = open_data(root)
    assert data.train is data.labelled
    assert data.notes == ("unlabeled_X.bin is not there: training on the 40 labelled images only",)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("unlabeled_X.bin", bytes(27_647), "27,647 bytes are not a number of images of 27,648 bytes"),
        ("train_X.bin", b"", "0 bytes are not a number of images"),
        ("test_y.bin", bytes([1] * 19), "19 labels for 20 images"),
        ("test_y.bin", bytes([0] * 20), "a label outside 1 to 10"),
        ("class_names.txt", b"cat dog", "2 names for 10 classes"),
    ],
)
def test_a_damaged_file_is_named(fake_set, name, content, reason):
    root = fake_set("stl10")
    (root / "stl10_binary" / name).write_bytes(content)
    with pytest.raises(MioError, match=rf"{name} is damaged or cut off \({reason}"):
        open_data(root)
