"""Killed again and again, repaired, or with nothing left to do: no work is lost, and none is done twice."""

import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mio_export.embedding import embed
from mio_export.store import load_embeddings, read_rows, shard_paths

OPTIONS = {"runtime": "onnxruntime", "decode": "full"}
COUNTING = """
import os, sys
from mio_export.runtimes.onnxruntime import OnnxRuntime
original, descriptor = OnnxRuntime._run, os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def run(self, images):
    os.write(descriptor, b"x" * len(images))
    return original(self, images)
OnnxRuntime._run = run
from mio_export.cli.main import main
main()
"""
"""``mio`` with a file that grows by one byte for each image that the runtime is given, whatever becomes of it."""


def state(out):
    return {path.name: path.read_bytes() for path in [*shard_paths(out), out / "store.json"]}


def write_images(folder, count, seed=0):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{index:05d}.png")
    return folder


def killed(command, out, num_shards, delay_s):
    """Run a command until a store has so many shards and a little longer, then send SIGKILL."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(shard_paths(out)) < num_shards and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    time.sleep(delay_s)
    process.kill()
    process.communicate()
    return process.returncode == -9


@pytest.mark.parametrize(
    ("num_images", "shard_size", "num_kills"),
    [(300, 25, 2), pytest.param(2000, 40, 20, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_it_ends_with_the_same_bytes_and_little_done_twice(
    bundle, tmp_path, num_images, shard_size, num_kills
):
    images = write_images(tmp_path / "images", num_images)
    options = {"shard_size": shard_size, "batch_size": 5, **OPTIONS}
    embed(bundle.path, images, tmp_path / "whole", **options)
    out, counter = tmp_path / "killed", tmp_path / "counter"
    arguments = ["embed", bundle.path, images, "-o", out, "--shard-size", shard_size, "--batch-size", 5]
    choices = ["--runtime", "onnxruntime", "--decode", "full"]
    command = [sys.executable, "-c", COUNTING, *map(str, [counter, *arguments, *choices])]
    draw = random.Random(num_images)
    num_shards = num_images // shard_size
    killed_halfway = 0
    for moment in sorted(draw.sample(range(1, num_shards - 3), num_kills)):
        was_killed = killed(command, out, max(moment, len(shard_paths(out)) + 1), draw.random() * 0.02)
        killed_halfway += was_killed and 0 < len(shard_paths(out)) < num_shards
    assert killed_halfway == num_kills
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert state(out) == state(tmp_path / "whole")
    again = counter.stat().st_size - num_images
    print(f"{again} images computed again after {num_kills} kills, shards of {shard_size}")  # noqa: T201
    # a kill may hit one shard on its way to the disk and the next half done; together they are a shard on average
    assert again <= num_kills * shard_size * (1 if num_kills >= 20 else 2)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert counter.stat().st_size == again + num_images  # nothing was left


def test_a_killed_prune_loses_nothing_and_mixes_nothing(bundle, tmp_path):
    images = write_images(tmp_path / "images", 120)
    out = tmp_path / "out"
    embed(bundle.path, images, out, shard_size=2, **OPTIONS)
    before = load_embeddings(out)
    vectors = dict(zip(before.keys, before.vectors, strict=True))
    for path in sorted(images.iterdir())[::2]:
        path.unlink()
    inodes = {path: path.stat().st_ino for path in shard_paths(out)}
    command = [sys.executable, "-c", COUNTING, tmp_path / "counter", "embed", bundle.path, images, "-o", out, "--prune"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and sum(path.stat().st_ino != inode for path, inode in inodes.items()) < 3:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -9
    left = load_embeddings(out)
    assert 60 < len(left.keys) < 120
    assert {path.name for path in images.iterdir()} <= set(left.keys)
    assert all((vectors[key] == vector).all() for key, vector in zip(left.keys, left.vectors, strict=True))
    assert embed(bundle.path, images, out, prune_vanished=True).num_embedded == 0
    assert load_embeddings(out).keys == sorted(path.name for path in images.iterdir())


def test_a_killed_retry_goes_on_and_ends_as_an_uninterrupted_one(bundle, tmp_path):
    images = write_images(tmp_path / "images", 60)
    names = sorted(path.name for path in images.iterdir())[::2]
    broken = shutil.copytree(images, tmp_path / "broken")
    for name in names:
        (broken / name).write_bytes(b"no image")
    for name in ("killed", "whole"):
        embed(bundle.path, broken, tmp_path / name, shard_size=2, batch_size=2, **OPTIONS)
    for name in names:
        shutil.copy2(images / name, broken / name)
    arguments = ["embed", bundle.path, broken, "-o", tmp_path / "killed", "--retry-failed"]
    command = [sys.executable, "-c", COUNTING, *map(str, [tmp_path / "counter", *arguments])]
    assert killed(command, tmp_path / "killed", 33, 0)
    embed(bundle.path, broken, tmp_path / "killed", retry_failed=True)
    embed(bundle.path, broken, tmp_path / "whole", retry_failed=True)
    assert state(tmp_path / "killed") == state(tmp_path / "whole")


def test_of_two_runs_at_once_one_is_refused_in_one_line(bundle, tmp_path):
    images, out = write_images(tmp_path / "images", 40), tmp_path / "out"
    command = [sys.executable, "-c", COUNTING, tmp_path / "counter", "embed", bundle.path, images, "-o", out]
    for more in (["--shard-size", "2", "--runtime", "onnxruntime", "--decode", "full"], ["--prune"]):
        runs = [subprocess.Popen([*map(str, [*command, *more])], stderr=subprocess.PIPE, text=True) for _ in range(2)]
        errors = [run.communicate(timeout=60)[1] for run in runs]
        for run, error in zip(runs, errors, strict=True):
            assert run.returncode in (0, 1)
            assert run.returncode == 0 or "is being written by another process" in error.splitlines()[-1]
        assert min(run.returncode for run in runs) == 0
        assert len(load_embeddings(out).keys) == len(list(images.iterdir()))
        next(images.iterdir()).unlink()
    assert (tmp_path / "counter").stat().st_size == 40  # nothing was computed twice


def test_of_repaired_files_only_those_are_tried_again_and_the_store_is_a_clean_one(bundle, tmp_path):
    images = write_images(tmp_path / "images", 100)
    embed(bundle.path, images, tmp_path / "clean", **OPTIONS)
    broken = shutil.copytree(images, tmp_path / "broken")
    names = random.Random(0).sample(sorted(path.name for path in images.iterdir()), 30)
    for name in names:  # of the same size and time, so that nothing but their row says that they are to be tried
        data, times = (broken / name).read_bytes(), (broken / name).stat()
        (broken / name).write_bytes(bytes(8) + data[8:])
        os.utime(broken / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    out = tmp_path / "out"
    result = embed(bundle.path, broken, out, **OPTIONS)
    assert (result.num_ok, result.num_failed) == (70, 30)
    assert {row.key for row in read_rows(out) if row.status == "failed"} == set(names)
    for name in names:
        shutil.copy2(images / name, broken / name)
    assert embed(bundle.path, broken, out).num_embedded == 0
    result = embed(bundle.path, broken, out, retry_failed=True)
    assert (result.num_embedded, result.num_ok, result.num_failed) == (30, 100, 0)
    clean, repaired = load_embeddings(tmp_path / "clean"), load_embeddings(out)
    assert clean.keys == repaired.keys
    assert np.abs(clean.vectors - repaired.vectors).max() <= 1e-5
