"""Many processes, one loss: what an objective needs so that R processes give what one gives on the joined batch.

DistributedDataParallel averages the gradients of R processes. So a process returns R times its own share of the joined
batch's loss; the average of these is the loss, and the average of their gradients its gradient.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightly.utils.dist import gather as gather_equal
from torch import Tensor

from mio_export.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class JoinedBatch:
    """How many images each process holds in this step."""

    sizes: tuple[int, ...]
    """Images of each process, in the order of their ranks."""
    rank: int
    """This process."""

    @classmethod
    def of(cls, local: Tensor) -> "JoinedBatch":
        """Ask all processes for the length of ``local``, the images of this one; alone, ask nobody."""
        if world_size() == 1:
            return cls(sizes=(len(local),), rank=0)
        mine = torch.tensor([len(local)], device=local.device)
        sizes = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(sizes, mine)
        return cls(sizes=tuple(int(size) for size in sizes), rank=dist.get_rank())

    @property
    def num_processes(self) -> int:
        """R."""
        return len(self.sizes)

    @property
    def num_images(self) -> int:
        """N, the images of all processes."""
        return sum(self.sizes)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, shape (N, D), in the order of their ranks; gradients flow back.

        Every process must go on to compute a loss from them: in the backward pass the gradients of all are summed.
        """
        if self.num_processes == 1:
            return rows
        longest = max(self.sizes)
        gathered = gather_equal(F.pad(rows, (0, 0, 0, longest - len(rows))))
        return torch.cat([part[:size] for part, size in zip(gathered, self.sizes, strict=True)])

    def share(self, local_sum: Tensor, count: int) -> Tensor:
        """Return what this process adds to a mean over ``count`` terms of all processes, times R."""
        return local_sum * (self.num_processes / count)


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def require_equal_batches(local: Tensor, objective: str) -> None:
    """Refuse a step in which the processes hold different numbers of images.

    Raises:
        UsageError: they do.
    """
    sizes = JoinedBatch.of(local).sizes
    if len(set(sizes)) > 1:
        raise UsageError(
            f"{objective} averages over each process on its own and needs as many images on every one,"
            f" got {', '.join(map(str, sizes))}; drop the last batch, or train with mio, minc or spectral"
        )


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, without a gradient."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values
