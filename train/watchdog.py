"""The watchdog: is the encoder collapsing, and how?"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mio_export.metrics import effective_rank
from mio_export.preprocess import Pixels
from mio_export.train.module import SelfSupervised
from mio_export.train.objectives import Monitor
from mio_export.train.views import two_views

NUM_CLEAN = 256
_VIEW_SEED = 20_210
_CONSTANT = 0.3
_NARROW = 0.2
_VANISHED = 1e-3


@dataclass(frozen=True, kw_only=True)
class Health:
    """Measures on a fixed subset of clean training images, in eval mode; each is cheap beside a hundred steps."""

    effective_rank: float
    """RankMe of the features: about how many directions they use."""
    effective_rank_projections: float
    """RankMe of the projections."""
    spread: float
    """Deviation of the L2-normalised features over 1/√d: 0 is one point, 1 is all directions alike."""
    spread_projections: float
    """The same of the projections."""
    norm_projections: float
    """Mean L2 norm of the projections."""
    alignment: float
    """Mean squared distance of an image's normalised projection from that of a view of it (Wang and Isola 2020)."""
    uniformity: float
    """Log of the mean Gaussian potential of pairs of normalised projections (Wang and Isola 2020); low is spread."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a look at an encoder in training gave."""

    health: Health
    measures: Mapping[str, float]
    """What the objective's monitor measured."""
    alarm: str | None
    """The kind of collapse and the measure that shows it, in one line."""
    guard: str | None
    """What the objective's monitor did about its measures, in one line."""


class Watchdog:
    """Measures an encoder in training, compares it with its untrained self and names what goes wrong.

    Args:
        clean: training images, uint8, shape (N, H, W, C).
        monitor: the objective's own.
    """

    def __init__(self, clean: Pixels, monitor: Monitor) -> None:
        self._clean = torch.from_numpy(clean)
        self._monitor = monitor
        self._untrained: dict[str, Any] | None = None

    def start(self, module: SelfSupervised) -> None:
        """Measure the untrained encoder, unless this run is resumed."""
        if self._untrained is None:
            self._untrained = asdict(self._health(module, *self._images(module)))

    def look(self, module: SelfSupervised) -> Findings:
        """Measure, name a collapse if there is one, and let the monitor act on the objective."""
        assert self._untrained is not None  # started
        clean, views = self._images(module)
        health, measures = self._health(module, clean, views), self._measures(module, views)
        untrained = Health(**{field.name: self._untrained[field.name] for field in fields(Health)})
        alarm = diagnosis(health, untrained, output_dim=module.recipe.output_dim)
        return Findings(
            health=health,
            measures=measures,
            alarm=alarm or self._monitor.alarm(measures),
            guard=self._monitor.intervene(measures),
        )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values."""
        return {"untrained": self._untrained, **self._monitor.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._untrained = state["untrained"]
        self._monitor.load(state)

    def _images(self, module: SelfSupervised) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The clean images and two views of each, float pixels in [0, 255], shape (N, C, H, W)."""
        images = self._clean.to(module.device)
        generator = torch.Generator(module.device).manual_seed(_VIEW_SEED)
        views = two_views(images, module.recipe.views, generator, size=module.view_size)
        return _resized(images.permute(0, 3, 1, 2).float(), views[0]), views

    def _health(self, module: SelfSupervised, clean: Tensor, views: tuple[Tensor, Tensor]) -> Health:
        with _undisturbed(module.online), torch.no_grad():
            module.online.eval()
            features = module.online.encoder.embed_pixels(clean).float()
            projections = module.online.head(features).float()
            viewed = module.online(views[0]).float()
        return Health(
            effective_rank=effective_rank(features.cpu().numpy()),
            effective_rank_projections=effective_rank(projections.cpu().numpy()),
            spread=_spread(features),
            spread_projections=_spread(projections),
            norm_projections=float(projections.norm(dim=1).mean()),
            alignment=float((F.normalize(projections) - F.normalize(viewed)).square().sum(dim=1).mean()),
            uniformity=float(torch.pdist(F.normalize(projections)).square().mul(-2).exp().mean().log()),
        )

    def _measures(self, module: SelfSupervised, views: tuple[Tensor, Tensor]) -> dict[str, float]:
        """What the monitor measures, with batch norm as in training, since that is what the objective sees."""
        if not module.objective.monitored:
            return {}
        branch = module.online if module.target is None else module.target
        with _undisturbed(branch), torch.no_grad():
            branch.train()
            return self._monitor.measure(branch(torch.cat(views)))


def diagnosis(now: Health, untrained: Health, *, output_dim: int) -> str | None:
    """Return the kind of collapse and the measure that shows it, in one line; None if there is none.

    Spread and rank are compared with what is possible, not with the untrained encoder, whose projections lie close
    together: measured on digits and Fashion-MNIST, MIO and MINC keep a spread above 0.7 and as many directions in the
    projections as a third of those in the features; MINC with a centred Λ and BYOL without its predictor fall below
    0.25.
    """
    if not now.norm_projections > _VANISHED * untrained.norm_projections:
        return (
            f"zero norm: projections shrank to {now.norm_projections:.2g} (untrained"
            f" {untrained.norm_projections:.2g}); lower learning_rate or weight_decay"
        )
    if now.spread_projections < _CONSTANT:
        return (
            "constant collapse: projections of all images point the same way"
            f" (spread {now.spread_projections:.2g} of 1); nothing holds them apart"
        )
    rank, possible = now.effective_rank_projections, min(now.effective_rank, output_dim)
    if rank < max(2.0, _NARROW * possible):
        return (
            f"dimensional collapse: projections use {rank:.1f} directions of {possible:.1f} that features and width"
            " allow; lower learning_rate, or take a larger batch_size"
        )
    return None


def _spread(rows: Tensor) -> float:
    """Mean deviation of the L2-normalised rows' columns, times √d."""
    return float(F.normalize(rows, dim=1).std(dim=0).mean() * math.sqrt(rows.shape[1]))


@contextmanager
def _undisturbed(branch: nn.Module) -> Iterator[None]:
    """Leave mode and buffers (batch norm's statistics) as they were."""
    mode, buffers = branch.training, [(buffer, buffer.clone()) for buffer in branch.buffers()]
    try:
        yield
    finally:
        branch.train(mode)
        for buffer, before in buffers:
            buffer.copy_(before)


def _resized(clean: Tensor, like: Tensor) -> Tensor:
    """Stored images at the size of their views."""
    if clean.shape == like.shape:
        return clean
    return F.interpolate(clean, size=like.shape[-2:], mode="bilinear", antialias=True)
