import random

import numpy as np
import pytest
import torch

from mio_export.errors import UsageError
from mio_export.metrics import knn_accuracy, retrieval_recall
from mio_export.train.data import ImageSet
from mio_export.train.evaluation import augmented_copies
from mio_export.train.online_evaluation import online_scores


class Drawing(torch.nn.Module):
    """A layer that draws from every generator, in eval mode too."""

    def forward(self, features):
        random.random()
        np.random.random()
        return features + 0 * torch.rand(1)


def names(number):
    return tuple(f"{index}.png" for index in range(number))


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (4, 1, 1, 3))
    labels = np.arange(205) % 4
    noise = rng.integers(-40, 40, (205, 32, 32, 3))
    pixels = (colours[labels] + noise).clip(0, 255).astype(np.uint8)
    return ImageSet(
        pixels=pixels, labels=labels, class_names=("a", "b", "c", "d"), keys=names(205), sha256="", failures=()
    )


@pytest.fixture
def training(encoder):
    """The encoder in training, but for one frozen batch norm."""
    encoder.train()
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    norms[0].eval()
    yield encoder
    encoder.eval()


def states():
    name, keys, *rest = np.random.get_state()
    return torch.random.get_rng_state().tolist(), (name, keys.tolist(), *rest), random.getstate()


def test_every_tenth_image_is_a_query_and_the_others_are_the_bank(encoder, images):
    is_query = np.arange(205) % 10 == 0
    features = encoder.embed(images.pixels)
    knn = knn_accuracy(features[~is_query], images.labels[~is_query], features[is_query], images.labels[is_query])
    copies = encoder.embed(augmented_copies(images.pixels[is_query]))
    assert online_scores(encoder, images) == {
        "knn": knn[20],
        "copy_recall": retrieval_recall(copies, features[is_query])[1],
    }
    assert knn[20] > 0.5


def test_training_does_not_notice(training, images):
    hook = training.backbone.register_forward_hook(lambda module, inputs, output: Drawing()(output))
    modes = [module.training for module in training.modules()]
    before = {name: value.numpy().tobytes() for name, value in training.state_dict().items()}
    untouched = states()
    online_scores(training, images)
    hook.remove()
    assert states() == untouched
    assert [module.training for module in training.modules()] == modes
    assert not all(modes)
    assert {name: value.numpy().tobytes() for name, value in training.state_dict().items()} == before


def test_autocast_does_not_reach_it(encoder, images):
    scores = online_scores(encoder, images)
    seen = []
    hook = encoder.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert online_scores(encoder, images) == scores
    hook.remove()
    assert set(seen) == {torch.float32}


def test_without_labels_there_is_copy_recall_alone_on_at_most_a_thousand(encoder, images):
    unlabelled = ImageSet(
        pixels=np.tile(images.pixels[:, :8, :8], (20, 1, 1, 1)),
        labels=None,
        class_names=(),
        keys=names(4_100),
        sha256="",
        failures=(),
    )
    sizes = []
    hook = encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    assert list(online_scores(encoder, unlabelled, held_out_of=2)) == ["copy_recall"]
    hook.remove()
    assert sum(sizes) == 4_100 + 1_000


def test_a_division_without_a_bank_is_refused(encoder, images):
    with pytest.raises(UsageError, match="held_out_of must be 2 or more, got 1"):
        online_scores(encoder, images, held_out_of=1)
