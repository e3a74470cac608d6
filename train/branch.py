"""What is trained: an encoder with its projection head."""

from torch import Tensor, nn

from mio_export.models import Encoder


class Branch(nn.Module):
    """An encoder and its projection head; a run has an online one, and some objectives a target one beside it."""

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, views: Tensor) -> Tensor:
        """Return projections, shape (N, D), of views: float pixels in [0, 255], shape (N, C, H, W)."""
        projections: Tensor = self.head(self.encoder.embed_pixels(views))
        return projections
