import numpy as np
import torch

from mio_export.train.loader import EpochBatches, batch_loader

PIXELS = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1).repeat(8, 1).repeat(8, 2)


def seen(loader):
    return [images[:, 0, 0, 0].tolist() for images, _ in loader]


def test_an_epoch_sees_each_image_once_but_for_the_ragged_rest():
    batches = EpochBatches(50, batch_size=8, seed=0)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) == 48
    assert len(batches) == 6


def test_epochs_and_seeds_have_orders_of_their_own():
    batches = EpochBatches(50, batch_size=8, seed=0)
    first = list(batches)
    batches.set_epoch(1)
    assert list(batches) != first
    batches.set_epoch(0)
    assert list(batches) == first
    assert list(EpochBatches(50, batch_size=8, seed=1)) != first


def test_an_epoch_can_be_entered_in_its_middle_and_the_next_one_is_whole():
    whole, resumed = (EpochBatches(50, batch_size=8, seed=0) for _ in range(2))
    whole.set_epoch(2)
    resumed.start_at(2, 4)
    resumed.set_epoch(2)  # Lightning says so again
    assert list(resumed) == list(whole)[4:]
    for batches in (whole, resumed):
        batches.set_epoch(3)
    assert list(resumed) == list(whole)


def test_a_batch_can_be_named_afterwards():
    batches = EpochBatches(50, batch_size=8, seed=0)
    batches.set_epoch(5)
    assert [batches.batch(5, number) for number in range(6)] == list(batches)


def test_workers_change_nothing():
    loaders = [batch_loader(PIXELS, EpochBatches(50, batch_size=8, seed=0), num_workers=n) for n in (0, 1)]
    assert seen(loaders[0]) == seen(loaders[1])


def test_a_batch_is_its_images_and_their_indices():
    images, rows = next(iter(batch_loader(PIXELS, EpochBatches(50, batch_size=8, seed=0))))
    assert images.dtype == torch.uint8
    assert images.shape == (8, 8, 8, 1)
    assert torch.equal(images[:, 0, 0, 0], rows.to(torch.uint8))
