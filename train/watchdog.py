"""The watchdog: is the encoder collapsing, and how?"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mio_export.metrics import effective_rank
from mio_export.models import Encoder
from mio_export.preprocess import Pixels
from mio_export.train.module import SelfSupervised, project
from mio_export.train.objectives.minc import MINCLoss
from mio_export.train.objectives.norms import apply_norm
from mio_export.train.objectives.second_moment import SecondMomentGuard, second_moment_lag
from mio_export.train.views import two_views

NUM_CLEAN = 256
_VIEW_SEED = 20_210
_CONSTANT = 0.3
_NARROW = 0.2
_VANISHED = 1e-3
_STALE = 0.5


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
    second_moment_lag: float | None = None
    """ρ of MINC's Λ; see ``second_moment_lag``."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a look at an encoder in training gave."""

    health: Health
    alarm: str | None
    """The kind of collapse and the measure that shows it, in one line."""
    guard: str | None
    """What the guard of MINC's Λ did, in one line."""


class Watchdog:
    """Measures an encoder in training, compares it with its untrained self and names what goes wrong.

    Args:
        clean: training images, uint8, shape (N, H, W, C).
    """

    def __init__(self, clean: Pixels) -> None:
        self._clean = torch.from_numpy(clean)
        self._untrained: dict[str, Any] | None = None
        self._guard = SecondMomentGuard()

    def start(self, module: SelfSupervised) -> None:
        """Measure the untrained encoder, unless this run was begun before."""
        if self._untrained is None:
            self._untrained = asdict(self._measure(module))

    def look(self, module: SelfSupervised) -> Findings:
        """Measure, name a collapse if there is one, and let the guard act on Λ."""
        health = self._measure(module)
        assert self._untrained is not None  # started
        alarm = diagnosis(health, Health(**self._untrained), output_dim=module.recipe.output_dim)
        return Findings(health=health, alarm=alarm, guard=self._guarded(module, health))

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values."""
        return {"untrained": self._untrained, "num_above": self._guard.num_above}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._untrained, self._guard.num_above = state["untrained"], state["num_above"]

    def _guarded(self, module: SelfSupervised, health: Health) -> str | None:
        if health.second_moment_lag is None:
            return None
        loss = module.objective
        assert isinstance(loss, MINCLoss)  # the only loss with a lag
        if not self._guard.observe(loss, health.second_moment_lag):
            return None
        return (
            f"Λ was {health.second_moment_lag:.0%} away from the encoder's own second moment twice running;"
            f" its memory was halved, to {1 / (1 - float(loss.decay)):.3g} steps"
        )

    def _measure(self, module: SelfSupervised) -> Health:
        images = self._clean.to(module.device)
        clean = images.permute(0, 3, 1, 2).float()
        generator = torch.Generator(module.device).manual_seed(_VIEW_SEED)
        views = two_views(images, module.recipe.views, generator, size=module.view_size)
        clean = _resized(clean, views[0])
        encoder, head = module.online["encoder"], module.online["head"]
        assert isinstance(encoder, Encoder)  # ModuleDict forgets the type
        with _undisturbed(module.online), torch.no_grad():
            module.online.eval()
            features = encoder.embed_pixels(clean).float()
            projections = head(features).float()
            viewed = project(module.online, views[0]).float()
        return Health(
            effective_rank=effective_rank(features.cpu().numpy()),
            effective_rank_projections=effective_rank(projections.cpu().numpy()),
            spread=_spread(features),
            spread_projections=_spread(projections),
            norm_projections=float(projections.norm(dim=1).mean()),
            alignment=float((F.normalize(projections) - F.normalize(viewed)).square().sum(dim=1).mean()),
            uniformity=float(torch.pdist(F.normalize(projections)).square().mul(-2).exp().mean().log()),
            second_moment_lag=_lag(module, views),
        )


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
    if now.second_moment_lag is not None and not now.second_moment_lag <= _STALE:
        return (
            f"stale second moment: Λ is {now.second_moment_lag:.0%} away from the encoder's own;"
            " lower learning_rate or loss.second_moment_decay"
        )
    return None


def _spread(rows: Tensor) -> float:
    """Mean deviation of the L2-normalised rows' columns, times √d."""
    return float(F.normalize(rows, dim=1).std(dim=0).mean() * math.sqrt(rows.shape[1]))


def _lag(module: SelfSupervised, views: tuple[Tensor, Tensor]) -> float | None:
    """ρ of Λ on the views, with batch norm as in training, since that is where Λ comes from."""
    loss = module.objective
    if not isinstance(loss, MINCLoss) or module.target is None:
        return None
    with _undisturbed(module.target), torch.no_grad():
        module.target.train()
        phi = apply_norm(project(module.target, torch.cat(views)), loss.norm, loss.scale)
    halves = (phi[0::2], phi[1::2])  # different images: views of one follow the images of the other
    fresh = [half.T @ half / len(half) for half in halves]
    return second_moment_lag(loss.corrected_second_moment(phi.dtype), (fresh[0], fresh[1]))


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
