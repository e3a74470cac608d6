import os

import numpy as np
import pytest
from PIL import Image

from mio_export.console.progress import Progress
from mio_export.errors import MioError
from mio_export.preprocess import Preprocess
from mio_export.train.data import load_images, open_data, probe_geometry

GREY = Preprocess(image_size=16, channels=1, mean=(0.5,), std=(0.5,))


def make(folder, names, mode="L", size=(16, 16)):
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, index % 256 if mode == "L" else (index % 256, 0, 0)).save(path)


def load(part, preprocess=GREY):
    return load_images(part, preprocess, Progress())


def test_class_folders_give_labels_and_a_fifth_is_held_out(tmp_path):
    make(tmp_path, [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(100)])
    data = open_data(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert 25 <= len(data.test) <= 55
    assert set(data.train.keys).isdisjoint(data.test.keys)
    assert len(data.train) + len(data.test) == 200
    images = load(data.test)
    assert images.labels.tolist() == [0 if key.startswith("cat") else 1 for key in data.test.keys]
    assert open_data(tmp_path).test.keys == data.test.keys  # the same every time


def test_train_and_test_folders_are_taken_as_they_are(tmp_path):
    make(tmp_path, [f"{part}/{name}/{i}.png" for part in ("train", "test") for name in ("a", "b") for i in range(3)])
    data = open_data(tmp_path)
    assert (len(data.train), len(data.test), data.class_names) == (6, 6, ("a", "b"))
    assert load(data.test).labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_images_outside_train_and_test_are_named(tmp_path):
    make(tmp_path, ["train/a.png", "test/b.png", "val/c.png", "d.png"])
    data = open_data(tmp_path)
    assert (len(data.train), len(data.test)) == (1, 1)
    assert data.notes == ("2 images outside train/ and test/ were left out",)


def test_val_stands_in_for_test(tmp_path):
    make(tmp_path, [f"{part}/{name}/{i}.png" for part in ("train", "val") for name in ("a", "b") for i in range(3)])
    data = open_data(tmp_path)
    assert (len(data.train), len(data.test), data.class_names) == (6, 6, ("a", "b"))


PAIR = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(20)]
HELD_OUT = "train/ has no test/ or val/ beside it: a fifth of its images is held out to test on"


def test_train_without_a_test_part_has_its_class_folders_as_labels(tmp_path):
    make(tmp_path, [f"train/{name}" for name in PAIR])
    data = open_data(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [int("dog" in key) for key in data.train.keys]
    assert len(data.train) + len(data.test) == 40
    assert 2 <= len(data.test) <= 16
    assert data.notes == (HELD_OUT,)


@pytest.mark.parametrize("name", ["unlabelled", "unlabeled", "Unlabelled"])
def test_a_folder_of_unlabelled_images_is_no_class(tmp_path, name):
    beside = ["flat.png", *(f"{name}/{i}.png" for i in range(8))]
    make(tmp_path / "parts", [*(f"train/{image}" for image in PAIR), *beside])
    data = open_data(tmp_path / "parts")
    assert (data.class_names, len(data.train) + len(data.test)) == (("cat", "dog"), 40)
    assert data.notes == (HELD_OUT, "9 images outside train/ were left out")
    make(tmp_path / "classes", [*PAIR, *(f"{name}/{i}.png" for i in range(9))])
    data = open_data(tmp_path / "classes")
    assert (data.class_names, len(data.train) + len(data.test)) == (("cat", "dog"), 40)
    assert data.notes == ("9 images in unlabelled folders were left out",)


def test_where_nothing_has_a_label_unlabelled_images_are_taken(tmp_path):
    make(tmp_path, [f"unlabelled/{i}.png" for i in range(40)])
    data = open_data(tmp_path)
    assert (data.class_names, len(data.train) + len(data.test)) == ((), 40)
    assert data.notes == ("all images lie in one folder, unlabelled/, and one class is none: no label is used",)


def test_train_may_be_a_class_among_others(tmp_path):
    make(tmp_path, [f"{name}/{i}.png" for name in ("train", "bus", "car") for i in range(20)])
    assert open_data(tmp_path).class_names == ("bus", "car", "train")


def test_a_validation_part_alone_has_its_class_folders_as_labels(tmp_path):
    make(tmp_path, [f"validation/{name}" for name in PAIR])
    assert open_data(tmp_path).class_names == ("cat", "dog")


def test_images_without_a_class_folder_among_others_are_counted(tmp_path):
    make(tmp_path, [*PAIR, "flat.png"])
    data = open_data(tmp_path)
    assert data.class_names == ()
    assert data.notes == ("1 of 41 images lie in no class folder; no label is used",)


def test_a_pipe_does_not_hang_the_look_at_the_images(tmp_path):
    make(tmp_path, ["train/a.png", "test/b.png"])
    os.mkfifo(tmp_path / "train" / "pipe.png")
    data = open_data(tmp_path)
    assert probe_geometry(data.train).image_size == 16
    assert load(data.train).failures == ("train/pipe.png: not a regular file (named pipe)",)


def test_a_broken_link_is_called_so(tmp_path):
    make(tmp_path, ["train/a.png", "test/b.png"])
    (tmp_path / "train" / "link.png").symlink_to(tmp_path / "gone.png")
    failures = load(open_data(tmp_path).train).failures
    assert failures == ("train/link.png: broken link (No such file or directory)",)


def test_a_flat_folder_gives_no_labels(tmp_path):
    make(tmp_path, [f"{i}.png" for i in range(40)])
    data = open_data(tmp_path)
    assert data.class_names == ()
    assert load(data.train).labels is None


def test_an_unreadable_image_is_left_out_and_named_never_replaced(tmp_path):
    make(tmp_path, [f"{part}/{name}/{i}.png" for part in ("train", "test") for name in ("a", "b") for i in range(3)])
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"broken")
    images = load(open_data(tmp_path).train)
    assert images.failures == ("train/a/1.png: not an image that Pillow can read",)
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 2, 3, 4, 5]  # each image has its own label still


def test_the_hash_follows_the_bytes_and_the_names(tmp_path):
    make(tmp_path, [f"{i}.png" for i in range(40)])
    train = open_data(tmp_path).train
    before = load(train).sha256
    assert load(train).sha256 == before
    Image.new("L", (16, 16), 200).save(tmp_path / train.keys[0])
    assert load(train).sha256 != before
    (tmp_path / train.keys[0]).unlink()
    assert load(open_data(tmp_path).train).sha256 != before


def test_any_size_from_8_pixels_grey_or_colour(tmp_path):
    make(tmp_path / "grey", [f"{i}.png" for i in range(40)], size=(8, 8))
    make(tmp_path / "odd", [f"{i}.png" for i in range(40)], mode="RGB", size=(37, 53))
    for name, size, channels in (("grey", 8, 1), ("odd", 37, 3)):
        train = open_data(tmp_path / name).train
        geometry = probe_geometry(train)
        assert (geometry.image_size, geometry.channels) == (size, channels)
        preprocess = Preprocess(image_size=size, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
        images = load(train, preprocess)
        assert images.pixels.shape == (len(train), size, size, channels)
        assert np.unique(images.pixels[:, 0, 0, 0]).size == len(train)


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MioError, match="holds 0 images, too few to train and test on"):
        open_data(tmp_path / "empty")
    make(tmp_path / "bad", [f"{i}.png" for i in range(40)])
    for path in (tmp_path / "bad").iterdir():
        path.write_bytes(b"x")
    train = open_data(tmp_path / "bad").train
    with pytest.raises(MioError, match="none of the training images can be read"):
        probe_geometry(train)
    with pytest.raises(MioError, match=r"none of \d+ images can be read; the first: "):
        load(train)
