"""Runs that are killed outright, in processes of their own, and resumed: the same bytes as if nothing had happened."""

import random
import signal
import subprocess
import sys

import pytest

from mio_export.sample import read_sample

NUM_KILLS, NUM_STEPS = 5, 36
CHILD = """
import os, signal, sys
from mio_export.train import recipe_from_dict, train, training
from mio_export.train.recorder import Recorder

objective, data, run, kill_at, resume = sys.argv[1:]
load, end_batch = training.load_images, Recorder.on_train_batch_end
training.load_images = lambda *a, **named: load(*a, **{**named, "memory_bytes": 0})  # mapped, so that workers read

def end_batch_or_die(self, trainer, *rest):
    end_batch(self, trainer, *rest)
    if trainer.global_step == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)

Recorder.on_train_batch_end = end_batch_or_die
recipe = recipe_from_dict({"objective": objective, "epochs": 9, "batch_size": 48, "hidden_dim": 64, "output_dim": 32})
train(recipe, data, run, resume=resume == "resume", checkpoint_steps=3)
"""
ARTIFACTS = ("encoder.safetensors", "projection_head.safetensors", "metrics.jsonl", "encoder.json", "report.html")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mio", "minc"])
def test_five_kills_leave_no_trace(objective, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for index, image in enumerate(read_sample("train", limit=260)):
        (data / f"{index:03d}.png").write_bytes(image)

    def child(run, kill_at, resume):
        arguments = [objective, data, tmp_path / run, str(kill_at), "resume" if resume else "begin"]
        return subprocess.run([sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, check=False)

    whole = child("whole", -1, False)
    assert whole.returncode == 0, whole.stderr
    steps = sorted(random.Random(objective).sample(range(4, NUM_STEPS), NUM_KILLS))
    for number, step in enumerate(steps):
        killed = child("run", step, number > 0)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = child("run", -1, True)
    assert last.returncode == 0, last.stderr
    for name in ARTIFACTS:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
