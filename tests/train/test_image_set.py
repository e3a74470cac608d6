import os

import numpy as np
import pytest
from PIL import Image

from mio_export.errors import MioError, UsageError
from mio_export.preprocess import Preprocess
from mio_export.progress import Progress
from mio_export.train.image_set import load_images, mean_and_std, probe_geometry, split_folder

GREY = Preprocess(image_size=16, channels=1, mean=(0.5,), std=(0.5,))


def make(folder, names, mode="L", size=(16, 16)):
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, index % 256 if mode == "L" else (index % 256, 0, 0)).save(path)


def load(files, split, preprocess=GREY):
    return load_images(files, split, preprocess, Progress())


def test_class_folders_give_labels_and_a_fifth_is_held_out(tmp_path):
    make(tmp_path, [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(100)])
    split = split_folder(tmp_path)
    assert split.class_names == ("cat", "dog")
    assert 25 <= len(split.test) <= 55
    assert {f.key for f in split.train}.isdisjoint(f.key for f in split.test)
    assert len(split.train) + len(split.test) == 200
    images = load(split.test, split)
    expected = [0 if file.key.startswith("cat") else 1 for file in split.test]
    assert images.labels.tolist() == expected
    assert [f.key for f in split_folder(tmp_path).test] == [f.key for f in split.test]  # the same every time


def test_train_and_test_folders_are_taken_as_they_are(tmp_path):
    make(tmp_path, [f"{part}/{name}/{i}.png" for part in ("train", "test") for name in ("a", "b") for i in range(3)])
    split = split_folder(tmp_path)
    assert (len(split.train), len(split.test), split.class_names) == (6, 6, ("a", "b"))
    assert load(split.test, split).labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_images_outside_train_and_test_are_named(tmp_path):
    make(tmp_path, ["train/a.png", "test/b.png", "val/c.png", "d.png"])
    split = split_folder(tmp_path)
    assert (len(split.train), len(split.test)) == (1, 1)
    assert split.notes == ("2 images outside train/ and test/ were left out",)


def test_val_stands_in_for_test(tmp_path):
    make(tmp_path, [f"{part}/{name}/{i}.png" for part in ("train", "val") for name in ("a", "b") for i in range(3)])
    split = split_folder(tmp_path)
    assert (len(split.train), len(split.test), split.class_names) == (6, 6, ("a", "b"))


def test_a_pipe_does_not_hang_the_look_at_the_images(tmp_path):
    make(tmp_path, ["train/a.png", "test/b.png"])
    os.mkfifo(tmp_path / "train" / "pipe.png")
    split = split_folder(tmp_path)
    assert probe_geometry(split.train).image_size == 16
    assert load(split.train, split).failures == ("train/pipe.png: not a regular file (named pipe)",)


def test_a_flat_folder_gives_no_labels(tmp_path):
    make(tmp_path, [f"{i}.png" for i in range(40)])
    split = split_folder(tmp_path)
    assert split.class_names == ()
    assert load(split.train, split).labels is None


def test_an_unreadable_image_is_left_out_and_named_never_replaced(tmp_path):
    make(tmp_path, [f"{part}/{name}/{i}.png" for part in ("train", "test") for name in ("a", "b") for i in range(3)])
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"broken")
    split = split_folder(tmp_path)
    images = load(split.train, split)
    assert images.failures == ("train/a/1.png: not an image that Pillow can read",)
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 2, 3, 4, 5]  # each image has its own label still


def test_the_hash_follows_the_bytes_and_the_names(tmp_path):
    make(tmp_path, [f"{i}.png" for i in range(40)])
    split = split_folder(tmp_path)
    before = load(split.train, split).sha256
    assert load(split.train, split).sha256 == before
    Image.new("L", (16, 16), 200).save(tmp_path / split.train[0].key)
    assert load(split.train, split).sha256 != before


def test_geometry_is_read_off_the_images(tmp_path):
    make(tmp_path / "grey", [f"{i}.png" for i in range(10)], size=(40, 28))
    make(tmp_path / "colour", [f"{i}.png" for i in range(10)], mode="RGB", size=(800, 600))
    grey, colour = (probe_geometry(split_folder(tmp_path / name).train) for name in ("grey", "colour"))
    assert (grey.image_size, grey.channels) == (28, 1)
    assert (colour.image_size, colour.channels) == (224, 3)


def test_mean_and_std_are_those_of_the_pixels(tmp_path):
    make(tmp_path, [f"{i}.png" for i in range(40)])
    split = split_folder(tmp_path)
    images = load(split.train, split)
    (mean,), (std,) = mean_and_std(images)
    assert mean == pytest.approx(images.pixels.mean() / 255, abs=1e-5)
    assert std == pytest.approx(np.std(images.pixels / 255), abs=1e-5)


def test_folders_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MioError, match="holds 0 images, too few to train and test on"):
        split_folder(tmp_path / "empty")
    make(tmp_path / "bad", [f"{i}.png" for i in range(40)])
    for path in (tmp_path / "bad").iterdir():
        path.write_bytes(b"x")
    split = split_folder(tmp_path / "bad")
    with pytest.raises(MioError, match="none of the training images can be read"):
        probe_geometry(split.train)
    with pytest.raises(MioError, match=r"none of \d+ images can be read; the first: "):
        load(split.train, split)
    monkeypatch.setattr("mio_export.train.image_set._available_bytes", lambda: 1000)
    with pytest.raises(UsageError, match="choose a smaller image_size or fewer images"):
        load(split.train, split)
