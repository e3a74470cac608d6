import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mio_export.console.progress import Progress
from mio_export.errors import MioError, UsageError
from mio_export.files import sha256_file
from mio_export.models import load_encoder
from mio_export.sample import read_sample
from mio_export.train import recipe_from_dict, train, train_seeds
from mio_export.train.checkpoints import Checkpoints
from mio_export.train.objectives.registry import OBJECTIVES
from mio_export.train.watchdog import Health

TINY = {"epochs": 3, "batch_size": 64, "hidden_dim": 64, "output_dim": 32}
ARTIFACTS = ("encoder.safetensors", "projection_head.safetensors", "metrics.jsonl", "encoder.json", "recipe.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "data"
    folder.mkdir()
    for index, image in enumerate(read_sample("train", limit=260)):
        (folder / f"{index:03d}.png").write_bytes(image)
    return folder


class Said(Progress):
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def one_epoch(data, tmp_path_factory):
    """A finished run of one epoch, not to be changed."""
    run = tmp_path_factory.mktemp("one") / "run"
    train(recipe_from_dict({**TINY, "epochs": 1}), data, run)
    return run


def weights(run):
    return (run / "encoder.safetensors").read_bytes(), (run / "projection_head.safetensors").read_bytes()


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def contents(run):
    return {name: (run / name).read_bytes() for name in ARTIFACTS}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_seed_gives_the_same_weights_twice_and_another_seed_gives_others(data, tmp_path, objective):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recipe = {**TINY, "epochs": 1, "objective": objective, "seed": seed}
        train(recipe_from_dict(recipe), data, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["encoder.safetensors"] != contents(tmp_path / "c")["encoder.safetensors"]


def test_a_run_holds_what_it_promises(data, tmp_path):
    result = train(recipe_from_dict(TINY), data, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    keys = {"step", "loss", "mutual_information", "learning_rate", "alarm", "guard", *(f.name for f in fields(Health))}
    assert all(keys <= line.keys() for line in lines)
    assert lines[-1] == result.metrics
    assert lines[-1]["loss"] < lines[0]["loss"]
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]
    assert (stored["image_size"], stored["channels"], stored["backbone"]) == (28, 1, "small")
    encoder = load_encoder(tmp_path / "run")
    images = np.zeros((2, 28, 28, 1), np.uint8)
    np.testing.assert_array_equal(encoder.embed(images), result.encoder.embed(images))


def test_training_moves_the_weights_and_leaves_torchs_generator_alone(data, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    result = train(recipe_from_dict({**TINY, "epochs": 1}), data, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)
    fresh = result.encoder.untrained().backbone.state_dict()
    assert any(not torch.equal(value, fresh[name]) for name, value in result.encoder.backbone.state_dict().items())


def train_until(stop, recipe, data, run, monkeypatch, *, checkpoint_steps=2):
    """Train until the end of a batch of an epoch (both from 0), then stop as a kill would."""
    from mio_export.train.recorder import Recorder

    end_batch = Recorder.on_train_batch_end

    def end_batch_and_stop(self, trainer, module, outputs, images, batch_idx):
        end_batch(self, trainer, module, outputs, images, batch_idx)
        if (trainer.current_epoch, batch_idx) == stop:
            raise ZeroDivisionError

    monkeypatch.setattr(Recorder, "on_train_batch_end", end_batch_and_stop)
    with pytest.raises(ZeroDivisionError):
        train(recipe, data, run, checkpoint_steps=checkpoint_steps)
    monkeypatch.undo()


@pytest.mark.parametrize(("checkpoint_steps", "kept"), [(1000, 6), (2, 8)], ids=["after an epoch", "within an epoch"])
@pytest.mark.parametrize("objective", ["mio", "minc"])
def test_an_interrupted_run_resumes_to_the_same_weights(data, tmp_path, objective, checkpoint_steps, kept, monkeypatch):
    recipe = recipe_from_dict({**TINY, "objective": objective})
    train(recipe, data, tmp_path / "whole", evaluate_every=1)
    train_until((2, 1), recipe, data, tmp_path / "run", monkeypatch, checkpoint_steps=checkpoint_steps)
    newest = Checkpoints(tmp_path / "run").latest(Progress())
    assert newest.state["global_step"] == kept
    train(recipe, data, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    plain = [{k: v for k, v in line.items() if k != "copy_recall"} for line in metrics(tmp_path / "whole")]
    assert metrics(tmp_path / "run") == plain  # nor does an evaluation on the way change anything
    before = contents(tmp_path / "run")
    train(recipe, data, tmp_path / "run", resume=True)  # a finished run is left as it is
    assert contents(tmp_path / "run") == before


def as_first_written(state):
    """A checkpoint's state as version 0.1.0 wrote it; its weights are held to the names that they had there."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layers = ["0.weight", "3.weight", *(f"{layer}.{name}" for layer in (1, 4) for name in norm)]
    names = {f"{branch}.head.layers.{layer}" for branch in ("online", "target") for layer in layers}
    names |= {f"objective.{name}" for name in ("second_moment", "weight", "decay")}
    backbone = {name for name in state["state_dict"] if name.startswith(("online.encoder.", "target.encoder."))}
    assert state["state_dict"].keys() - backbone == names
    assert "online.encoder.backbone.blocks.0.0.weight" in backbone
    (recorder,) = state["callbacks"].values()
    health = {field.name: recorder["watchdog"]["untrained"][field.name] for field in fields(Health)}
    watchdog = {"untrained": {**health, "second_moment_lag": 1.0}, "num_above": 0}
    return {**state, "callbacks": {"Recorder": {**recorder, "watchdog": watchdog}}}


def test_a_checkpoint_of_the_first_version_is_resumed(data, tmp_path, monkeypatch):
    recipe = recipe_from_dict({**TINY, "objective": "minc"})
    train(recipe, data, tmp_path / "whole")
    train_until((2, 1), recipe, data, tmp_path / "run", monkeypatch)
    checkpoints = Checkpoints(tmp_path / "run")
    newest = checkpoints.latest(Progress())
    checkpoints.clear()
    torch.save(as_first_written(newest.state), newest.path)
    newest.path.rename(newest.path.with_name(f"step-000000008-{sha256_file(newest.path)[:16]}.ckpt"))
    train(recipe, data, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(data, tmp_path, monkeypatch):
    recipe = recipe_from_dict(TINY)
    train(recipe, data, tmp_path / "whole")
    train_until((2, 1), recipe, data, tmp_path / "run", monkeypatch)
    _, newer = sorted((tmp_path / "run" / "checkpoints").iterdir())
    newer.write_bytes(newer.read_bytes()[:-1000])
    said = Said()
    train(recipe, data, tmp_path / "run", resume=True, progress=said)
    assert f"{newer.name} is damaged and passed over" in said.lines
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_only_the_last_two_checkpoints_are_kept(data, tmp_path):
    train(recipe_from_dict(TINY), data, tmp_path / "run", checkpoint_steps=1)
    kept = sorted(path.name[:14] for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000000008", "step-000000009"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"epochs": 2}, r"\(epochs: 1 there, 2 now\)"),
        ({"seed": 1}, r"\(seed: 0 there, 1 now\)"),
        ({"loss": {"temperature": 0.3}}, r"\(loss.temperature: None there, 0.3 now\)"),
        ({"views": {"jitter_probability": 0.8}}, r"\(views.jitter_probability: 0.4 there, 0.8 now\)"),
    ],
)
def test_another_recipe_is_not_resumed(one_epoch, data, change, difference):
    with pytest.raises(UsageError, match=f"another recipe {difference}"):
        train(recipe_from_dict({**TINY, "epochs": 1, **change}), data, one_epoch, resume=True)


def test_a_run_is_neither_begun_twice_nor_resumed_out_of_nothing(one_epoch, data, tmp_path):
    with pytest.raises(UsageError, match="holds a run already; go on with it: --resume"):
        train(recipe_from_dict({**TINY, "epochs": 1}), data, one_epoch)
    with pytest.raises(UsageError, match="holds no run to resume"):
        train(recipe_from_dict(TINY), data, tmp_path / "nowhere", resume=True)


def test_other_images_are_not_resumed_on(one_epoch, data, tmp_path):
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(data.iterdir())[:200]:
        os.link(path, fewer / path.name)
    with pytest.raises(UsageError, match=r"started on other images \(\d+ then, \d+ now"):
        train(recipe_from_dict({**TINY, "epochs": 1}), fewer, one_epoch, resume=True)


def test_images_mapped_from_the_disk_and_workers_give_the_same_weights(data, tmp_path, monkeypatch):
    from mio_export.train import training

    recipe = recipe_from_dict({**TINY, "epochs": 2})
    train(recipe, data, tmp_path / "memory")
    load = training.load_images
    monkeypatch.setattr(training, "load_images", lambda *a, **named: load(*a, **{**named, "memory_bytes": 0}))
    train(recipe, data, tmp_path / "mapped")
    assert contents(tmp_path / "mapped") == contents(tmp_path / "memory")
    assert not (tmp_path / "mapped" / "images").exists()


def test_gradients_are_added_up_before_a_step(data, tmp_path):
    settings = {**TINY, "epochs": 1, "batch_size": 32, "objective": "byol"}
    plain = train(recipe_from_dict(settings), data, tmp_path / "plain")
    added = train(recipe_from_dict({**settings, "accumulate": 2}), data, tmp_path / "added")
    assert plain.metrics["step"] == 2 * added.metrics["step"] == 6
    assert added.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=0.3)  # a mean over batches, not a share


def test_training_gives_the_callers_threads_back(data, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        train(recipe_from_dict({**TINY, "epochs": 1}), data, tmp_path / "run")
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


def test_fp16_is_for_gpus(data, tmp_path):
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        train(recipe_from_dict({**TINY, "precision": "fp16"}), data, tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"num_devices": 0}, "devices must be 1 or more, got 0"),
        ({"num_devices": 3}, "batch_size 64 cannot be shared equally by 3 processes"),
        ({"evaluate_every": -1}, "evaluate_every must be 0 or more, got -1"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be 1 or more, got 0"),
        ({"on_collapse": "panic"}, "on_collapse must be warn or stop, got 'panic'"),
    ],
)
def test_arguments_out_of_range_are_refused(data, tmp_path, argument, message):
    with pytest.raises(UsageError, match=message):
        train(recipe_from_dict(TINY), data, tmp_path / "run", **argument)


def test_two_processes_train_through_the_command_line(data, tmp_path):
    settings = [f"--set={key}={value}" for key, value in {**TINY, "epochs": 1, "objective": "minc"}.items()]
    command = [Path(sys.executable).parent / "mio", "train", "--device=cpu", "--devices=2", *settings]
    result = subprocess.run(
        [*command, f"--data={data}", f"--out={tmp_path / 'run'}"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("next:  mio evaluate") == 1  # one process speaks
    (line,) = metrics(tmp_path / "run")
    assert (line["step"], line["epoch"]) == (3, 1)
    load_encoder(tmp_path / "run")


def test_seeds_lie_side_by_side_and_are_taken_up_again(data, tmp_path):
    recipe = recipe_from_dict({**TINY, "epochs": 1})
    runs = train_seeds(recipe, data, tmp_path / "runs", num_seeds=2)
    assert [result.run.name for result in runs] == ["seed-0", "seed-1"]
    assert weights(runs[0].run) != weights(runs[1].run)
    train(replace(recipe, seed=1), data, tmp_path / "alone")
    assert weights(tmp_path / "alone") == weights(runs[1].run)
    before = weights(runs[0].run)
    again = train_seeds(recipe, data, tmp_path / "runs", num_seeds=3, resume=True)
    assert len(again) == 3
    assert weights(runs[0].run) == before


def test_ctrl_c_leaves_a_run_that_can_be_resumed(data, tmp_path):
    command = [sys.executable, "-c", "from mio_export.cli.main import main; main()", "train"]
    settings = [f"--set={key}={value}" for key, value in {**TINY, "epochs": 500}.items()]
    arguments = ["--data", str(data), "-o", str(tmp_path / "run"), *settings]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/step-*.ckpt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("mio: interrupted")
    assert "Traceback" not in errors
    epochs = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    newest = Checkpoints(tmp_path / "run").latest(Progress())
    assert newest.state["epoch"] + 1 in (epochs, epochs - 1)
    load_encoder(tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    with pytest.raises(MioError, match=r"not finite in epoch 1, batch \d \(\d+\.png, .* and 61 others\)"):
        train(recipe_from_dict({**TINY, "learning_rate": 1e30}), data, tmp_path / "run")


def test_photos_train_in_colour(photos, tmp_path):
    recipe = recipe_from_dict({**TINY, "epochs": 1, "image_size": 32, "objective": "minc"})
    result = train(recipe, photos, tmp_path / "run")
    assert result.recipe.channels == 3
    assert result.encoder.preprocess.shape == (32, 32, 3)


def test_an_unreadable_image_is_named(photos, tmp_path):
    for index, path in enumerate(sorted(photos.rglob("*.jpg"))):
        target = tmp_path / "data" / ("train" if index % 3 else "test") / f"{index}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
    (tmp_path / "data" / "train" / "zz.jpg").write_bytes(b"x")
    recipe = recipe_from_dict({**TINY, "epochs": 1, "image_size": 32})
    result = train(recipe, tmp_path / "data", tmp_path / "run")
    assert result.failures == ("train/zz.jpg: not an image that Pillow can read",)


def test_a_single_image_is_not_enough(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "data" / part).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / part / "a.png")
    with pytest.raises(MioError, match="an objective needs at least two"):
        train(recipe_from_dict(TINY), tmp_path / "data", tmp_path / "run")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_seeds": 0}, "seeds must be 1 or more, got 0"),
        ({"num_seeds": 2, "num_devices": 2}, "train them one by one"),
    ],
)
def test_seeds_that_cannot_be_trained_are_refused(data, tmp_path, how, message):
    with pytest.raises(UsageError, match=message):
        train_seeds(recipe_from_dict(TINY), data, tmp_path / "runs", **how)
