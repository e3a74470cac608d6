"""``kill -9`` while a bundle is being replaced: what lies there is always whole, the old one or the new."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mio_export.bundle import load_bundle
from mio_export.parity import verify


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_export_leaves_a_whole_bundle(run_folder, photos, tmp_path, num_kills):
    path = tmp_path / "encoder.mio"
    command = [Path(sys.executable).parent / "mio", "export", run_folder, "-o", path, "--images", photos]
    draw = random.Random(num_kills)

    def start(max_batch):
        return subprocess.Popen([*command, "--max-batch", str(max_batch)], stdout=subprocess.DEVNULL)

    began = time.monotonic()
    assert start(4).wait() == 0
    duration = time.monotonic() - began
    left = []
    for number in range(num_kills):
        process = start(5 + number)
        time.sleep(draw.uniform(0.4, 1.05) * duration)
        process.kill()
        process.wait()
        bundle = load_bundle(path)
        assert verify(path).passed
        assert bundle.manifest.max_batch in (*left[-1:], 4, 5 + number)
        left.append(bundle.manifest.max_batch)
    long_ago = time.time() - 2 * 24 * 3600
    for found in [*tmp_path.rglob("*"), *tmp_path.iterdir()]:
        os.utime(found, (long_ago, long_ago))
    assert start(4).wait() == 0
    assert [found.name for found in tmp_path.iterdir()] == [
        "encoder.mio"
    ]  # what the killed left is cleared after a day
