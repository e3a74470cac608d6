import pytest

from mio_export.console.progress import Progress
from mio_export.errors import MioError, UsageError
from mio_export.preprocess import Preprocess
from mio_export.train.data import load_images, mean_and_std, open_data, probe_geometry

FOUND = {
    "cifar10": ("cifar10", 32, 3, 10),
    "cifar100": ("cifar100", 32, 3, 100),
    "stl10": ("stl10", 96, 3, 10),
    "fashion-mnist": ("idx", 28, 1, 10),
    "tiny-imagenet": ("tiny-imagenet", 64, 3, 5),
    "imagefolder": ("folder", 48, 3, 4),
    "tar": ("tar", 40, 3, 5),
    "folder": ("folder", 36, 3, 0),
}
OWN_FOLDER = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "stl10": "stl10_binary"}


@pytest.mark.parametrize("kind", FOUND)
def test_every_format_is_known_by_its_files_and_can_be_used(fake_set, kind):
    data = open_data(fake_set(kind))
    found, size, channels, num_classes = FOUND[kind]
    assert (data.kind, len(data.class_names)) == (found, num_classes)
    assert len(data.labelled) + len(data.test) == 60
    if kind != "folder":
        assert (len(data.labelled), len(data.test)) == (40, 20)
    geometry = probe_geometry(data.train)
    assert (geometry.image_size, geometry.channels) == (size, channels)
    preprocess = Preprocess(image_size=size, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    for part in (data.train, data.labelled, data.test):
        assert len(set(part.keys)) == len(part)
        images = load_images(part, preprocess, Progress())
        assert images.pixels.shape == (len(part), size, size, channels)
        assert images.keys == tuple(part.keys)
        mean, std = mean_and_std(images)
        assert mean == pytest.approx(channels * (0.5,), abs=0.05)
        assert min(std) > 0.1


@pytest.mark.parametrize("kind", OWN_FOLDER)
def test_the_sets_own_folder_gives_the_same_as_the_root_above_it(fake_set, kind):
    root = fake_set(kind)
    above, own = open_data(root), open_data(root / OWN_FOLDER[kind])
    assert (above.kind, above.train.keys, above.notes) == (own.kind, own.train.keys, own.notes)


def test_a_root_with_two_sets_is_refused(fake_set):
    root = fake_set("cifar10")
    (root / "MNIST" / "raw").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"several data sets \(cifar-10-batches-py, MNIST/raw\); name one"):
        open_data(root)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("cifar10", "cifar-10-batches-py/batches.meta"),
        ("cifar100", "cifar-100-python/test"),
        ("stl10", "stl10_binary/test_y.bin"),
        ("fashion-mnist", "t10k-labels-idx1-ubyte.gz"),
        ("tiny-imagenet", "tiny-imagenet-200/wnids.txt"),
    ],
)
def test_a_missing_file_is_named(fake_set, kind, name):
    root = fake_set(kind)
    (root / name).unlink()
    with pytest.raises(MioError, match=f"has no file {name.rpartition('/')[2].removesuffix('.gz')}"):
        open_data(root)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a folder of images"):
        open_data(tmp_path / "nothing")
