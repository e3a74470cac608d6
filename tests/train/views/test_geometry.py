import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, ks_2samp
from torchvision.transforms import v2

from mio_export.train.views import ViewConfig, random_view
from mio_export.train.views.geometry import crop_and_flip, crop_boxes

NUM_DRAWS = 3000
SIDE = 32


def ramps():
    """Images whose red rises from left to right and whose green from top to bottom, by one a pixel."""
    steps = torch.arange(SIDE, dtype=torch.float32) + 0.5
    one = torch.stack([steps.expand(SIDE, SIDE), steps.view(-1, 1).expand(SIDE, SIDE), torch.zeros(SIDE, SIDE)])
    return one.repeat(NUM_DRAWS, 1, 1, 1)


def measured(views):
    """Return left, top, width and height of the crops and whether they are flipped, read off views of ramps."""
    at = SIDE // 4, 3 * SIDE // 4 - 1  # far enough from the border, where a view is linear
    span = (at[1] - at[0]) / SIDE
    across = views[:, 0, SIDE // 2, at] / SIDE
    down = views[:, 1, at, SIDE // 2] / SIDE
    width, height = (across[:, 1] - across[:, 0]) / span, (down[:, 1] - down[:, 0]) / span
    middle = (across.mean(dim=1), down.mean(dim=1))
    return middle[0] - width.abs() / 2, middle[1] - height / 2, width.abs(), height, width < 0


def torchvisions_boxes(config, height, width, num_draws=NUM_DRAWS):
    """The same from torchvision, on an image so large that its rounding to whole pixels does not matter."""
    transform = v2.RandomResizedCrop(SIDE, scale=config.crop_area, ratio=config.crop_aspect)
    image = torch.empty(1, height, width)
    torch.manual_seed(0)
    drawn = [transform.make_params([image]) for _ in range(num_draws)]
    boxes = torch.tensor([[p["left"], p["top"], p["width"], p["height"]] for p in drawn]).double()
    return (boxes / torch.tensor([width, height, width, height])).unbind(dim=1)


def assert_same_distribution(ours, theirs):
    for name, of in {
        "area": lambda left, top, width, height: width * height,
        "aspect": lambda left, top, width, height: width / height,
        "left": lambda left, top, width, height: (left / (1 - width))[width < 0.99],
        "top": lambda left, top, width, height: (top / (1 - height))[height < 0.99],
    }.items():
        assert ks_2samp(of(*ours).numpy(), of(*theirs).numpy()).pvalue > 0.01, name


@pytest.mark.parametrize(
    ("area", "aspect"),
    [
        ((0.08, 1.0), (3 / 4, 4 / 3)),
        ((0.4, 1.0), (3 / 4, 4 / 3)),
        ((0.8, 1.0), (3 / 4, 4 / 3)),
        ((0.4, 1.0), (0.99, 1.01)),  # nearly all large crops fit, so that the upper end of the areas is seen
    ],
)
def test_views_are_cropped_as_torchvision_crops(area, aspect, generator):
    config = ViewConfig(
        crop_area=area, crop_aspect=aspect, flip_probability=0.3, jitter_probability=0, grayscale_probability=0
    )
    *boxes, flipped = measured(random_view(ramps(), config, generator))
    assert_same_distribution(boxes, torchvisions_boxes(config, 2000, 2000))
    assert binomtest(int(flipped.sum()), NUM_DRAWS, 0.3).pvalue > 0.01


@pytest.mark.parametrize("shape", [(2000, 1400), (1400, 2000)])
def test_crops_that_do_not_fit_are_drawn_again_as_torchvision_draws_them(shape, generator):
    config = ViewConfig(crop_area=(0.3, 1.0), crop_aspect=(0.5, 2.0))
    boxes = crop_boxes(NUM_DRAWS, *shape, config, generator)
    assert_same_distribution(boxes.unbind(dim=1), torchvisions_boxes(config, *shape))


@pytest.mark.parametrize("shape", [(400, 1000), (1000, 400), (500, 500)])
def test_where_no_crop_fits_it_is_torchvisions_central_one(shape, generator):
    config = ViewConfig(crop_area=(0.99, 1.0), crop_aspect=(0.75, 0.8) if shape == (500, 500) else (3 / 4, 4 / 3))
    ours = crop_boxes(50, *shape, config, generator)
    theirs = torch.stack(torchvisions_boxes(config, *shape, num_draws=50), dim=1)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-3)


def test_crop_areas_lie_in_their_range_and_inside_the_image(generator):
    boxes = crop_boxes(1000, 48, 48, ViewConfig(crop_area=(0.3, 0.6)), generator)
    area = boxes[:, 2] * boxes[:, 3]
    assert area.min() >= 0.3 - 1e-6
    assert area.max() <= 0.6 + 1e-6
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 1 + 1e-6


def test_a_flip_mirrors_the_chosen_images_only(pixels):
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(24, 1)
    flips = torch.arange(24) % 2 == 1
    views = crop_and_flip(pixels, whole, flips, height=48, width=48)
    torch.testing.assert_close(views[0::2], pixels[0::2], rtol=0, atol=1e-2)
    torch.testing.assert_close(views[1::2], pixels[1::2].flip(3), rtol=0, atol=1e-2)


def test_a_crop_is_torchvisions_crop_resized(pixels):
    box = torch.tensor([[12 / 48, 6 / 48, 24 / 48, 30 / 48]]).repeat(24, 1)
    views = crop_and_flip(pixels, box, torch.zeros(24, dtype=torch.bool), height=48, width=48)
    expected = v2.functional.resized_crop(pixels, 6, 12, 30, 24, [48, 48], antialias=True)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # borders see pixels beyond the crop
    assert (views[inner] - expected[inner]).abs().max() < 0.01


@pytest.mark.parametrize(("height", "width"), [(48, 48), (60, 30), (9, 13)])
@pytest.mark.parametrize("edges", [(5.3, 2.1, 44.6, 47.9), (20.2, 30.5, 28.9, 36.1)])
def test_a_crop_is_pillows_of_any_size_without_aliasing(pixels, edges, height, width):
    left, top, right, bottom = edges
    box = torch.tensor([[left, top, right - left, bottom - top]]) / 48
    grey = pixels[:1, :1]
    image = Image.fromarray(grey[0, 0].numpy())
    expected = image.resize((width, height), Image.Resampling.BILINEAR, box=edges)
    view = crop_and_flip(grey, box, torch.tensor([False]), height=height, width=width)[0, 0]
    assert np.abs(view.numpy() - np.asarray(expected)).max() < 0.01
