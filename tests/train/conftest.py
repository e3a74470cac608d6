"""Tiny fake data sets, each in the files of its own format: ``fake_set("cifar10")`` returns the folder."""

import gzip
import io
import json
import pickle
import tarfile
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

NUM_TRAIN, NUM_TEST = 40, 20


def fake_images(num_images, size, channels, *, num_classes, seed):
    """Return noisy gradients, uint8 (N, size, size, channels), and labels; each class has its own direction."""
    generator = np.random.default_rng(seed)
    labels = np.arange(num_images) % num_classes
    y, x = np.meshgrid(*2 * [np.linspace(-1, 1, size)], indexing="ij")
    angles = 2 * np.pi * labels[:, None, None] / num_classes
    gradients = 128 + 70 * (np.cos(angles) * x + np.sin(angles) * y)
    noise = generator.normal(0, 20, (num_images, size, size, channels))
    return np.clip(gradients[..., None] + noise, 0, 255).astype(np.uint8), labels


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2's ``cPickle`` wrote, as the CIFAR files hold it: strings as bytes, numpy by its old name."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        short = len(data) < 256
        self.write((pickle.SHORT_BINSTRING + bytes([len(data)])) if short else b"T" + len(data).to_bytes(4, "little"))
        self.write(data)
        self.memoize(value)

    def save_global(self, value, name=None):
        if getattr(value, "__name__", "") != "_reconstruct":
            return super().save_global(value, name)
        self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
        return self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string
    dispatch[type(lambda: None)] = dispatch[type(len)] = save_global


def write_python2_pickle(path, values):
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(values)


def cifar_rows(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def write_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = b"airplane automobile bird cat deer dog frog horse ship truck".split()
    write_python2_pickle(folder / "batches.meta", {b"num_cases_per_batch": 8, b"label_names": names, b"num_vis": 3072})
    images, labels = fake_images(NUM_TRAIN, 32, 3, num_classes=10, seed=0)
    parts = {f"data_batch_{n + 1}": (images[8 * n : 8 * n + 8], labels[8 * n : 8 * n + 8]) for n in range(5)}
    for name, (x, y) in {**parts, "test_batch": fake_images(NUM_TEST, 32, 3, num_classes=10, seed=1)}.items():
        filenames = [f"{label}_s_{index:06d}.png" for index, label in enumerate(y)]
        batch = {"batch_label": name, "labels": y.tolist(), "data": cifar_rows(x), "filenames": filenames}
        write_python2_pickle(folder / name, batch)


def write_cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    fine, coarse = ([f"{kind}{n}" for n in range(count)] for kind, count in (("fine", 100), ("coarse", 20)))
    write_python2_pickle(folder / "meta", {"fine_label_names": fine, "coarse_label_names": coarse})
    for name, count, seed in (("train", NUM_TRAIN, 0), ("test", NUM_TEST, 1)):
        images, labels = fake_images(count, 32, 3, num_classes=10, seed=seed)
        batch = {"filenames": [f"{n}.png" for n in range(count)], "batch_label": name, "data": cifar_rows(images)}
        batch |= {"fine_labels": (labels * 10).tolist(), "coarse_labels": labels.tolist()}
        write_python2_pickle(folder / name, batch)


def write_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    for seed, (name, count) in enumerate((("train", NUM_TRAIN), ("test", NUM_TEST), ("unlabeled", NUM_TRAIN))):
        images, labels = fake_images(count, 96, 3, num_classes=10, seed=seed)
        images.transpose(0, 3, 2, 1).tofile(folder / f"{name}_X.bin")  # planes, column by column
        if name != "unlabeled":
            (labels + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_fashion_mnist(root):
    folder = root / "fashion-mnist"
    folder.mkdir(parents=True)
    for part, count, seed in (("train", NUM_TRAIN, 0), ("t10k", NUM_TEST, 1)):
        images, labels = fake_images(count, 28, 1, num_classes=10, seed=seed)
        for name, array in ((f"{part}-images-idx3-ubyte", images[..., 0]), (f"{part}-labels-idx1-ubyte", labels)):
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    return folder


def encoded(pixels, format="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, format, **({"quality": 95} if format == "JPEG" else {}))
    return buffer.getvalue()


def write_tiny_imagenet(root):
    folder = root / "tiny-imagenet-200"
    wnids = [f"n0144353{n}" for n in range(5)]
    train, val = (fake_images(n, 64, 3, num_classes=5, seed=seed) for seed, n in enumerate((NUM_TRAIN, NUM_TEST)))
    for wnid in wnids:
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    for part in ("val", "test"):
        (folder / part / "images").mkdir(parents=True)
    for n, (image, label) in enumerate(zip(*train, strict=True)):
        (folder / "train" / wnids[label] / "images" / f"{wnids[label]}_{n}.JPEG").write_bytes(encoded(image))
    rows = []
    for n, (image, label) in enumerate(zip(*val, strict=True)):
        (folder / "val" / "images" / f"val_{n}.JPEG").write_bytes(encoded(image))
        (folder / "test" / "images" / f"test_{n}.JPEG").write_bytes(encoded(image))
        rows.append(f"val_{n}.JPEG\t{wnids[label]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("\n".join(reversed(wnids)) + "\n")
    (folder / "words.txt").write_text("".join(f"{wnid}\tfish {wnid[-1]}, Carassius\n" for wnid in [*wnids, "n1"]))


def write_imagefolder(root):
    for part, count, seed in (("train", NUM_TRAIN, 0), ("val", NUM_TEST, 1)):
        images, labels = fake_images(count, 48, 3, num_classes=4, seed=seed)
        for n, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / part / f"n0{label}" / f"{n:03d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_shards(root):
    """Two shards to train on, labels in ``.cls`` in one and in ``.json`` in the other; one to test on."""
    train, test = (fake_images(n, 40, 3, num_classes=5, seed=seed) for seed, n in enumerate((NUM_TRAIN, NUM_TEST)))

    def members(images, labels, start, label_format):
        for n, (image, label) in enumerate(zip(images, labels, strict=True), start):
            yield f"{n:04d}.jpg", encoded(image)
            text = str(label) if label_format == "cls" else json.dumps({"label": int(label), "caption": "a gradient"})
            yield f"{n:04d}.{label_format}", text.encode()

    half = NUM_TRAIN // 2
    write_tar(root / "fake-train-000000.tar", members(train[0][:half], train[1][:half], 0, "cls"))
    write_tar(root / "fake-train-000001.tar", members(train[0][half:], train[1][half:], half, "json"))
    write_tar(root / "fake-val-000000.tar", members(*test, 0, "cls"))


def write_folder(root):
    """Images of one folder, without parts or classes."""
    root.mkdir(parents=True)
    images, _ = fake_images(NUM_TRAIN + NUM_TEST, 36, 3, num_classes=10, seed=0)
    for n, image in enumerate(images):
        (root / f"{n:03d}.png").write_bytes(encoded(image, "PNG"))


WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "stl10": write_stl10,
    "fashion-mnist": write_fashion_mnist,
    "tiny-imagenet": write_tiny_imagenet,
    "imagefolder": write_imagefolder,
    "tar": write_shards,
    "folder": write_folder,
}


@pytest.fixture
def fake_set(tmp_path):
    """Write a data set of 40 training and 20 test images (of a plain folder: 60) and return the folder to open.

    For torchvision's sets it is the root above their own folder; STL-10 has 40 unlabelled images more.
    """

    def write(kind):
        root = tmp_path / kind
        return WRITERS[kind](root) or root

    return write


@pytest.fixture
def tar_writer():
    """``write(path, [(name, bytes), …])`` writes a tar file."""
    return write_tar
