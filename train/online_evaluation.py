"""A look at an encoder while it trains, which training does not notice."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mio_export.errors import UsageError
from mio_export.metrics import HEADLINE_K, knn_accuracy, retrieval_recall
from mio_export.models import Encoder
from mio_export.runtimes.devices import exact_float32
from mio_export.sources import evenly_spaced
from mio_export.train.data import ImageSet
from mio_export.train.evaluation import augmented_copies

_MAX_COPIES = 1_000


def online_scores(encoder: Encoder, images: ImageSet, *, held_out_of: int = 10) -> dict[str, float]:
    """Score an encoder on a fixed division of its own training images; the test set is never seen.

    Args:
        encoder: its modes, buffers and weights stay as they are, and so do the generators of torch, NumPy and Python.
        images: the training images; every ``held_out_of``-th is a query, the others are the bank.
        held_out_of: 2 or more.

    Returns:
        ``knn``, the accuracy of kNN with k = 20, if there are labels and a bank; ``copy_recall``, the share of queries
        (at most 1,000, evenly spread) that are nearest to their own augmented copy among all of these queries.

    Raises:
        UsageError: ``held_out_of`` is below 2.
    """
    if held_out_of < 2:
        raise UsageError(f"held_out_of must be 2 or more, got {held_out_of}")
    is_query = np.arange(len(images.pixels)) % held_out_of == 0
    copied = evenly_spaced(np.flatnonzero(is_query).tolist(), _MAX_COPIES)
    with undisturbed(encoder):
        features = encoder.embed(images.pixels)
        copies = encoder.embed(augmented_copies(images.pixels[copied]))
    scores = {}
    if images.labels is not None and not is_query.all():
        bank = (features[~is_query], images.labels[~is_query])
        scores["knn"] = knn_accuracy(*bank, features[is_query], images.labels[is_query], ks=(HEADLINE_K,))[HEADLINE_K]
    return scores | {"copy_recall": retrieval_recall(copies, features[copied], ks=(1,))[1]}


@contextmanager
def undisturbed(encoder: Encoder) -> Iterator[None]:
    """Compute in full float32, then put back each module's mode and the generators of torch, NumPy and Python."""
    device = encoder.mean.device
    modes = {module: module.training for module in encoder.modules()}
    states = random.getstate(), np.random.get_state()
    try:
        with exact_float32(device.type), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])


__all__ = ["online_scores", "undisturbed"]
