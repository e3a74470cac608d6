import pytest

from mio_export.console.progress import Progress
from mio_export.errors import MioError
from mio_export.preprocess import Preprocess
from mio_export.train.data import load_images, open_data


@pytest.fixture
def folder(fake_set):
    return fake_set("tiny-imagenet") / "tiny-imagenet-200"


def test_training_labels_are_the_folders_and_validation_labels_the_tables(folder):
    data = open_data(folder)
    assert data.class_names == tuple(f"fish {n}, Carassius" for n in range(5))
    assert [int(key.split("/")[1][-1]) for key in data.train.keys] == data.train.labels.tolist()
    expected = [int(key.rpartition("_")[2].removesuffix(".JPEG")) % 5 for key in data.test.keys]
    assert data.test.labels.tolist() == expected
    assert len(set(expected)) == 5


def test_the_unlabelled_test_images_are_left_out_and_it_is_said(folder):
    assert open_data(folder).notes == ("20 images without a label were left out, such as test/images/test_0.JPEG",)


def test_validation_images_sorted_into_class_folders_keep_their_labels(folder):
    before = {key.rpartition("/")[2]: label for key, label in labels_of(folder).items()}
    table = folder / "val" / "val_annotations.txt"
    for name, wnid in (line.split("\t")[:2] for line in table.read_text().splitlines()):
        target = folder / "val" / wnid / name
        target.parent.mkdir(exist_ok=True)
        (folder / "val" / "images" / name).rename(target)
    table.unlink()
    assert {key.rpartition("/")[2]: label for key, label in labels_of(folder).items()} == before


def labels_of(folder):
    part = open_data(folder).test
    return dict(zip(part.keys, part.labels.tolist(), strict=True))


def test_without_words_that_tell_classes_apart_they_have_their_numbers(folder):
    numbers = tuple(f"n0144353{n}" for n in range(5))
    (folder / "words.txt").write_text("".join(f"{number}\tcrane\n" for number in numbers))
    assert open_data(folder).class_names == numbers
    (folder / "words.txt").unlink()
    assert open_data(folder).class_names == numbers


def test_a_validation_image_that_the_table_does_not_name_is_left_out_and_a_broken_one_is_named(folder):
    table = folder / "val" / "val_annotations.txt"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[1:]))
    (folder / "val" / "images" / "val_7.JPEG").write_bytes(b"broken")
    data = open_data(folder)
    assert data.notes[0].startswith("21 images without a label were left out")
    images = load_images(data.test, Preprocess(image_size=64), Progress())
    assert images.failures == ("val/images/val_7.JPEG: not an image that Pillow can read",)
    assert [int(key.rpartition("_")[2].removesuffix(".JPEG")) % 5 for key in images.keys] == images.labels.tolist()
    assert len(images.pixels) == 18


def test_damaged_tables_and_empty_parts_are_named(folder):
    table = folder / "val" / "val_annotations.txt"
    text = table.read_text()
    table.write_text("val_0.JPEG\n")
    with pytest.raises(MioError, match=r"val_annotations.txt is damaged or cut off \(a line without a class\)"):
        open_data(folder)
    table.unlink()
    with pytest.raises(MioError, match="no labelled images in train/ or in val/"):
        open_data(folder)
    assert text
