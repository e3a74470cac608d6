"""A recipe: everything that decides what a training run becomes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from mio_export.errors import UsageError
from mio_export.schema import InvalidValueError, validated
from mio_export.settings import did_you_mean
from mio_export.train.objectives.registry import OBJECTIVES
from mio_export.train.views import ViewConfig, view_values


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training run; on a CPU the same recipe, data and machine give the same weights."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    objective: str = "mio"
    """Which system: mio, minc, spectral, simclr, byol, linear-byol or simsiam."""
    loss: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments of the loss that differ from the objective's defaults, such as temperature."""
    backbone: str = "auto"
    """A backbone's name; auto: small up to 64 px, torchvision/resnet18 above."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """First layers of a ResNet; auto: small up to 64 px."""
    image_size: int | None = None
    """Side of the images in pixels; None: the images' own typical shorter side, at most 224."""
    stored_size: int | None = None
    """Side at which images are held, from which crops of ``image_size`` are taken; None: ``image_size``."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; None: 1 if all images are grey."""
    hidden_dim: int = 1024
    """Width of the projection head's hidden layers."""
    output_dim: int = 512
    """D, width of the projections."""
    num_layers: int = 2
    """Linear layers of the projection head."""
    head_norm: bool = True
    """Whether the projection head ends in batch norm; false where the size of projections carries meaning, as in MINC's
    ordered form with norm none."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """How views are drawn."""
    epochs: int = 36
    """Passes over the training images."""
    batch_size: int = 128
    """Images in a step, over all devices together; fewer if there are fewer training images."""
    accumulate: int = 1
    """Batches whose gradients are added before a step; only where the loss looks at one image at a time."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """What takes the steps; batch norm and biases have no decay, and with lars no layer-wise rate either."""
    learning_rate: float = 2e-3
    """Peak rate."""
    momentum: float = 0.9
    """Momentum of sgd and lars."""
    weight_decay: float = 0.05
    """Weight decay; decoupled in adamw, an L2 term in sgd and lars."""
    warmup_share: float = 0.1
    """Share of the steps in which the rate rises linearly; it falls on a cosine afterwards."""
    schedule_epochs: int | None = None
    """Epochs over which the cosine is laid out, if training is to stop before its end; None: ``epochs``."""
    floor_learning_rate: float = 0.0
    """Rate from which the warm-up starts and at which the cosine ends."""
    target_momentum: float = 0.98
    """γ, rate of the target encoder's moving average (minc, byol, linear-byol)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; auto: bf16 where the processor or GPU computes it natively."""
    seed: int = 0
    """Seed of weights, order and views."""

    def __post_init__(self) -> None:
        positive = (
            "epochs",
            "batch_size",
            "accumulate",
            "hidden_dim",
            "output_dim",
            "num_layers",
            "learning_rate",
        )
        checks = [(getattr(self, name) > 0, f"{name} must be above 0, got {getattr(self, name)}") for name in positive]
        checks += [
            (self.objective in OBJECTIVES, f"objective must be one of {', '.join(OBJECTIVES)}; got {self.objective!r}"),
            (self.image_size is None or self.image_size >= 8, f"image_size must be 8 or more, got {self.image_size}"),
            (
                self.stored_size is None or (self.image_size is not None and self.stored_size >= self.image_size),
                f"stored_size must be at least image_size ({self.image_size}), got {self.stored_size}",
            ),
            (0 <= self.warmup_share < 1, f"warmup_share must be in [0, 1), got {self.warmup_share}"),
            (0 <= self.target_momentum < 1, f"target_momentum must be in [0, 1), got {self.target_momentum}"),
            (0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}"),
            (
                0 <= self.floor_learning_rate <= self.learning_rate,
                f"floor_learning_rate must be 0 to learning_rate, got {self.floor_learning_rate}",
            ),
            (
                self.schedule_epochs is None or self.schedule_epochs >= self.epochs,
                f"schedule_epochs must be at least epochs ({self.epochs}), got {self.schedule_epochs}",
            ),
            (
                self.optimizer != "lars" or self.weight_decay > 0,
                "lars needs weight_decay above 0: layers without decay get no layer-wise rate",
            ),
            (self.weight_decay >= 0, f"weight_decay must be 0 or more, got {self.weight_decay}"),
            (self.seed >= 0, f"seed must be 0 or more, got {self.seed}"),
        ]
        for holds, message in checks:
            if not holds:
                raise UsageError(message)
        if self.accumulate > 1:
            _check_accumulation(self.objective)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from text that came from outside, strictly; the preset of its views fills in what they leave out.

    Raises:
        UsageError: a key is unknown (its nearest name is given), or a value is not allowed.
    """
    values = dict(values)
    if isinstance(values.get("views"), Mapping):
        values["views"] = view_values(values["views"])
    try:
        return validated(values, Recipe)
    except InvalidValueError as error:
        if error.kind in ("unexpected_keyword_argument", "extra_forbidden"):
            known = [f.name for f in fields(Recipe)] + [f"views.{f.name}" for f in fields(ViewConfig)]
            raise UsageError(f"recipe: unknown setting {error.where!r}{did_you_mean(error.where, known)}") from None
        raise UsageError(f"recipe: {error}") from None


def _check_accumulation(objective: str) -> None:
    """Refuse to add gradients over batches where that is another loss."""
    spec = OBJECTIVES[objective]
    if not spec.per_image:
        per_image = ", ".join(name for name, spec in OBJECTIVES.items() if spec.per_image)
        raise UsageError(
            f"accumulate would change the loss of {objective}, which {spec.looks_at}; use a larger batch_size or more"
            f" devices (accumulate is exact for {per_image})"
        )
