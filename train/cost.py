"""What a training run will be and cost, before its first step: every ``auto`` settled, size, memory, steps."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mio_export.errors import UsageError
from mio_export.models import build_encoder
from mio_export.preprocess import Preprocess
from mio_export.train.data import Geometry
from mio_export.train.module import SelfSupervised
from mio_export.train.recipe import Recipe

_SMALL_IMAGE = 64
_STATES = {"adamw": 2, "sgd": 1, "lars": 1}
_PROBED_IMAGES = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that was not begun."""

    recipe: Recipe
    """With every ``auto`` settled."""
    embedding_dim: int
    """Width of the features, which are what is exported."""
    num_encoder_parameters: int
    num_head_parameters: int
    """Parameters of the projection head and the predictor."""
    model_bytes: int
    """Weights, gradients, optimiser state and target encoder."""
    activation_bytes: int
    """About what the backward pass needs of a step's views on one device, without the loss itself."""
    step_flops: int
    """Floating-point operations of a step, on all devices together."""
    num_images: int | None
    """Training images; None if no data was named."""
    steps_per_epoch: int | None
    num_steps: int | None
    num_views: int | None
    """Views that the encoder will have seen."""


def settled(recipe: Recipe, geometry: Geometry | None, accelerator: str) -> Recipe:
    """Turn every ``auto`` into a value.

    Raises:
        UsageError: there are no images to look at, and size or channels are left to them.
    """
    if geometry is None and (recipe.image_size is None or recipe.channels is None):
        raise UsageError("this recipe takes image_size and channels from the images; name them: --data DIR")
    size = recipe.image_size or (geometry.image_size if geometry else 0)
    channels = recipe.channels or (geometry.channels if geometry else 3)
    is_small = size <= _SMALL_IMAGE
    backbone = recipe.backbone if recipe.backbone != "auto" else ("small" if is_small else "torchvision/resnet18")
    small_stem = is_small and not backbone.startswith("timm/")
    stem = recipe.stem if recipe.stem != "auto" else ("small" if small_stem else "imagenet")
    precision = recipe.precision if recipe.precision != "auto" else _native_precision(accelerator)
    if precision == "fp16" and accelerator == "cpu":
        raise UsageError("precision fp16 needs a GPU; use bf16, fp32 or auto")
    return replace(recipe, image_size=size, channels=channels, backbone=backbone, stem=stem, precision=precision)


def contract(recipe: Recipe, mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.5,)) -> Preprocess:
    """Return the decode contract of a settled recipe's encoder."""
    assert recipe.image_size is not None  # settled
    assert recipe.channels is not None
    if len(mean) != recipe.channels:
        mean, std = mean * recipe.channels, std * recipe.channels
    return Preprocess(
        image_size=recipe.image_size, resize_size=recipe.stored_size, channels=recipe.channels, mean=mean, std=std
    )


def stored(preprocess: Preprocess) -> Preprocess:
    """Return the contract by which training images are held: as large as the views' crops may need them."""
    return replace(preprocess, image_size=preprocess.shorter_side, resize_size=preprocess.shorter_side)


def build_module(recipe: Recipe, preprocess: Preprocess, *, num_batches: int) -> SelfSupervised:
    """Return the untrained module of a settled recipe, from torch's global generator."""
    assert recipe.stem != "auto"  # settled
    encoder = build_encoder(recipe.backbone, preprocess, stem=recipe.stem)
    return SelfSupervised(encoder, recipe, num_batches=num_batches)


def plan(recipe: Recipe, *, num_images: int | None, num_devices: int = 1) -> Plan:
    """Work out what a settled recipe costs; nothing is trained, and no tensor of a batch's size is made."""
    with torch.random.fork_rng(devices=[]):
        module = build_module(recipe, contract(recipe), num_batches=1).to("meta")
    encoder = module.online.encoder
    size = {name: _num_parameters(part) for name, part in (("encoder", encoder), ("all", module.online))}
    predictor = _num_parameters(module.predictor)
    trained = size["all"] + predictor
    copies = 2 + _STATES[recipe.optimizer]
    batch_size = min(recipe.batch_size, num_images or recipe.batch_size)
    image_bytes, image_flops = _cost_of_an_image(module)
    scale = 0.5 if recipe.precision in ("bf16", "fp16") else 1.0
    steps = None if num_images is None else num_images // batch_size
    return Plan(
        recipe=recipe,
        embedding_dim=encoder.spec.embedding_dim,
        num_encoder_parameters=size["encoder"],
        num_head_parameters=trained - size["encoder"],
        model_bytes=4 * (copies * trained + (size["all"] if module.target is not None else 0)),
        activation_bytes=int(scale * image_bytes * batch_size / num_devices),
        step_flops=image_flops * batch_size,
        num_images=num_images,
        steps_per_epoch=steps,
        num_steps=None if steps is None else steps * recipe.epochs // recipe.accumulate,
        num_views=None if steps is None else 2 * steps * recipe.epochs * batch_size,
    )


def _cost_of_an_image(module: SelfSupervised) -> tuple[int, int]:
    """Bytes kept for the backward pass and operations of a whole step, for the two views of one image."""
    height, width, channels = module.online.encoder.preprocess.shape
    views = torch.empty(2 * _PROBED_IMAGES, channels, height, width, device="meta")
    held = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in held:
            held.add(id(tensor))
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as flops:
        module.predictor(module.online(views))
    passes = 3 if module.target is None else 4  # a backward pass costs two forward ones
    return sum(kept) // _PROBED_IMAGES, passes * flops.get_total_flops() // _PROBED_IMAGES


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _native_precision(accelerator: str) -> Literal["fp32", "bf16"]:
    """bf16 where it is computed natively and so pays, fp32 elsewhere."""
    if accelerator == "gpu":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu._is_avx512_bf16_supported())
    return "bf16" if native else "fp32"
