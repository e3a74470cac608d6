"""The encoder itself, in eager PyTorch."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mio_export.preprocess import Pixels
from mio_export.runtimes.base import Embeddings, Runtime
from mio_export.runtimes.devices import num_threads, torch_threads


class TorchRuntime(Runtime):
    """Anything of torch that takes uint8 (N, H, W, C) and gives float32 (N, D), on the CPU or a GPU."""

    def __init__(
        self,
        module: Callable[[torch.Tensor], torch.Tensor],
        *,
        image_shape: tuple[int, int, int],
        embedding_dim: int,
        device: str,
    ) -> None:
        super().__init__(image_shape=image_shape, embedding_dim=embedding_dim, device=device)
        self._module = module.to(device) if isinstance(module, torch.nn.Module) else module

    @torch.inference_mode()
    def _run(self, images: Pixels) -> Embeddings:
        # TF32 keeps 10 bits of mantissa; float32 must not be computed with it
        with torch_threads(num_threads()), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            embeddings: Embeddings = self._module(torch.from_numpy(images).to(self.device)).cpu().numpy()
        return embeddings


def open_torch(
    bundle: Path, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str, options: Mapping[str, str]
) -> TorchRuntime:
    """Load the encoder of a bundle from its weights; there are no options."""
    del options
    from mio_export.models import load_encoder

    return TorchRuntime(load_encoder(bundle), image_shape=image_shape, embedding_dim=embedding_dim, device=device)
