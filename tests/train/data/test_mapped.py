import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mio_export.console.progress import Progress
from mio_export.errors import UsageError
from mio_export.preprocess import Preprocess
from mio_export.train.data import load_images, open_data
from mio_export.train.data.shards import TarPart

CONTRACT = Preprocess(image_size=24)


class Counting(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.said = []

    def line(self, text):
        self.said.append(text)

    def task(self, description, total, *, unit="images"):
        self.said.append(f"{description} {total}")
        return super().task(description, total, unit=unit)


@pytest.fixture
def shards(fake_set, tar_writer):
    """A tar set with two broken images among 40."""
    folder = fake_set("tar")
    path = folder / "fake-train-000000.tar"
    data = bytearray(path.read_bytes())
    part = open_data(folder).train
    for index in (3, 9):
        data[part.members[index].offset : part.members[index].offset + 200] = bytes(200)
    path.write_bytes(data)
    return folder


def mapped(folder, scratch, preprocess=CONTRACT, progress=None):
    progress = progress or Counting()
    part = open_data(folder).train
    images = load_images(part, preprocess, progress, scratch=scratch, memory_bytes=0)
    return images, progress.said


def assert_equal(images, others):
    np.testing.assert_array_equal(images.pixels, others.pixels)
    np.testing.assert_array_equal(images.labels, others.labels)
    assert images.pixels.dtype == np.uint8
    assert (images.keys, images.failures, images.sha256) == (others.keys, others.failures, others.sha256)


def test_mapped_images_equal_those_in_memory_and_are_decoded_once(shards, tmp_path):
    memory = load_images(open_data(shards).train, CONTRACT, Progress())
    assert (len(memory.pixels), len(memory.failures)) == (38, 2)
    first, said = mapped(shards, tmp_path / "scratch")
    assert said == ["decoding 40"]
    assert_equal(first, memory)
    second, said = mapped(shards, tmp_path / "scratch", Preprocess(image_size=24, mean=(0.1, 0.2, 0.3)))
    assert said == []
    assert_equal(second, memory)
    assert isinstance(second.pixels.base.base if second.pixels.base.base is not None else second.pixels.base, np.memmap)
    torch.from_numpy(second.pixels)  # without a warning


@pytest.mark.parametrize("kind", ["cifar10", "stl10", "fashion-mnist", "tiny-imagenet", "folder"])
def test_every_kind_of_part_can_be_mapped_and_known_again(fake_set, tmp_path, kind):
    folder = fake_set(kind)
    first, said = mapped(folder, tmp_path / "scratch")
    again, nothing = mapped(folder, tmp_path / "scratch")
    assert (len(said), nothing) == (1, [])
    assert again.sha256 == first.sha256
    np.testing.assert_array_equal(first.pixels, load_images(open_data(folder).train, CONTRACT, Progress()).pixels)


def test_an_unfinished_or_broken_file_is_built_again(shards, tmp_path):
    scratch = tmp_path / "scratch"
    expected, _ = mapped(shards, scratch)
    (path,), (sidecar,) = scratch.glob("*.npy"), scratch.glob("*.json")
    whole, text = path.read_bytes(), sidecar.read_text()
    for break_it in (
        sidecar.unlink,
        path.unlink,
        lambda: path.write_bytes(whole[:-1]),
        lambda: path.write_bytes(b"no numpy"),
        lambda: sidecar.write_text(text[:40]),
        lambda: sidecar.write_text(text.replace('"identity": "', '"identity": "0')),
    ):
        break_it()
        images, said = mapped(shards, scratch)
        assert said == ["decoding 40"]
        assert_equal(images, expected)
    assert sorted(file.suffix for file in scratch.iterdir()) == [".json", ".lock", ".npy"]


def test_changed_images_and_another_contract_are_decoded_for_themselves(fake_set, tmp_path):
    folder = fake_set("folder")
    before, _ = mapped(folder, tmp_path / "scratch")
    smaller, said = mapped(folder, tmp_path / "scratch", Preprocess(image_size=16))
    assert (smaller.pixels.shape[1:], said) == ((16, 16, 3), [f"decoding {len(before.pixels)}"])
    path = folder / before.keys[0]
    status = path.stat()
    path.write_bytes((folder / before.keys[1]).read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after, said = mapped(folder, tmp_path / "scratch")
    assert len(said) == 1
    np.testing.assert_array_equal(after.pixels[0], before.pixels[1])
    assert after.sha256 != before.sha256


def test_who_comes_while_another_decodes_waits_and_decodes_nothing(shards, tmp_path, monkeypatch):
    begun, go_on, read = threading.Event(), threading.Event(), TarPart.read

    def slow_read(part, index):
        begun.set()
        assert go_on.wait(60)
        return read(part, index)

    monkeypatch.setattr(TarPart, "read", slow_read)
    waiting = "another process is decoding the same images; waiting for it"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(mapped, shards, tmp_path / "scratch")
        assert begun.wait(60)
        second = pool.submit(mapped, shards, tmp_path / "scratch", progress=(told := Counting()))
        while waiting not in told.said:
            assert not second.done()
        go_on.set()
        (images, said), (others, nothing) = first.result(), second.result()
    assert (said, nothing) == (["decoding 40"], [waiting])
    assert_equal(images, others)


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_is_taken_for_finished(shards, tmp_path):
    code = f"""
import os
from pathlib import Path
from mio_export.preprocess import Preprocess
from mio_export.console.progress import Progress
from mio_export.train.data import load_images, open_data
from mio_export.train.data.shards import TarPart
read = TarPart.read
TarPart.read = lambda self, index: os._exit(9) if index == 20 else read(self, index)
load_images(open_data({str(shards)!r}).train, Preprocess(image_size=24), Progress(),
            scratch=Path({str(tmp_path / "scratch")!r}), memory_bytes=0)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert list((tmp_path / "scratch").glob(".*.tmp"))
    images, said = mapped(shards, tmp_path / "scratch")
    assert said == ["decoding 40"]
    assert_equal(images, load_images(open_data(shards).train, CONTRACT, Progress()))
    assert not list((tmp_path / "scratch").glob(".*.tmp"))


@pytest.mark.slow
def test_of_two_processes_at_once_one_decodes_and_the_other_waits(shards, tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from mio_export.preprocess import Preprocess
from mio_export.console.progress import PlainProgress
from mio_export.train.data import load_images, open_data
from mio_export.train.data.shards import TarPart
read = TarPart.read
TarPart.read = lambda self, index: (time.sleep(0.1), read(self, index))[1]
images = load_images(open_data({str(shards)!r}).train, Preprocess(image_size=24), PlainProgress(),
                     scratch=Path({str(tmp_path / "scratch")!r}), memory_bytes=0)
print(images.sha256, len(images.pixels), int(images.pixels.sum()))
"""
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    (out_a, err_a), (out_b, err_b) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [0, 0], err_a + err_b
    assert out_a == out_b
    said = sorted([err_a, err_b])
    assert said[0] == "another process is decoding the same images; waiting for it\n"
    assert said[1].startswith("decoding: 40 of 40 images")


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(shards, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = 40 * 24 * 24 * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, needed - 1))
    with pytest.raises(UsageError, match=r"need 0\.0 GB in .*scratch, 0\.0 GB are free there; choose a smaller"):
        mapped(shards, tmp_path / "scratch")
    assert not list((tmp_path / "scratch").glob("*.npy"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, needed + 4096))
    assert len(mapped(shards, tmp_path / "scratch")[0].pixels) == 38


def test_a_disk_that_fills_up_meanwhile_is_an_error_not_a_crash(shards, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UsageError, match="are free there"):
        mapped(shards, tmp_path / "scratch")
    assert [file.suffix for file in (tmp_path / "scratch").iterdir()] == [".lock"]
