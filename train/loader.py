"""Batches of images in memory, in an order that the seed, the epoch and the batch's number alone decide."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mio_export.preprocess import Pixels


class BatchSet(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory that are taken out a whole batch at a time, with their indices."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._pixels[indices]), torch.tensor(indices)


class EpochBatches(Sampler[list[int]]):
    """The batches of an epoch for one process of several; the ragged last one is left out.

    All processes draw the same order of all images and take turns in each batch, so that R processes see in a step what
    one process sees in a batch R times as large.

    Args:
        num_images: images of the set.
        batch_size: images in a step, over all processes; a multiple of their number.
        seed: of the order.
        num_processes: R.
        rank: this process.
    """

    def __init__(self, num_images: int, *, batch_size: int, seed: int, num_processes: int = 1, rank: int = 0) -> None:
        self.batch_size, self.num_processes, self.rank = batch_size, num_processes, rank
        self._num_images, self._seed = num_images, seed
        self._epoch = self._first_batch = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def start_at(self, epoch: int, batch: int) -> None:
        """Go on in the middle of an epoch: its first ``batch`` batches were seen."""
        self._epoch, self._first_batch = epoch, batch

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        if epoch != self._epoch:
            self.start_at(epoch, 0)

    def batch(self, epoch: int, number: int) -> list[int]:
        """Return the images of one batch, of all processes."""
        rows: list[int] = self._order(epoch)[number].tolist()
        return rows

    def __iter__(self) -> Iterator[list[int]]:
        mine = self._order(self._epoch)[self._first_batch :, self.rank :: self.num_processes]
        return iter(mine.tolist())

    def _order(self, epoch: int) -> Tensor:
        """All batches of an epoch, shape (batches, batch_size)."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(self._num_images, generator=generator)
        return order[: len(self) * self.batch_size].view(len(self), self.batch_size)

    def __len__(self) -> int:
        return self._num_images // self.batch_size


def batch_loader(pixels: Pixels, batches: EpochBatches, *, num_workers: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return a loader of uint8 batches, shape (N, H, W, C), with the images' indices, shape (N,).

    Images in memory need no workers; those mapped from a disk are read ahead by some, which changes only the speed.
    """
    return DataLoader(
        BatchSet(pixels),
        batch_sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=_as_it_is,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
