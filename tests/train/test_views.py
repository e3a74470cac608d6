import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from mio_export.train.views import ViewConfig, crop_and_flip, crop_boxes, jitter, random_view, two_views


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos(photo_crops):
    return torch.stack([torch.from_numpy(np.array(crop.resize((48, 48)))) for crop in photo_crops])


def pixels(photos):
    return photos.permute(0, 3, 1, 2).float()


def test_two_views_of_a_batch_differ_from_each_other_and_between_images(photos):
    same = photos[:1].repeat(8, 1, 1, 1)
    first, second = two_views(same, ViewConfig(), generator())
    assert first.shape == second.shape == (8, 3, 48, 48)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 255
    views = torch.cat([first, second])
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + 1e9 * torch.eye(16)
    assert distances.min() > 100  # every view has parameters of its own


def test_the_generator_alone_decides(photos):
    first, again = (two_views(photos, ViewConfig(), generator(7))[0] for _ in range(2))
    other = two_views(photos, ViewConfig(), generator(8))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_view_without_augmentation_is_the_image(photos):
    still = ViewConfig(
        crop_area=(1, 1), crop_aspect=(1, 1), flip_probability=0, jitter_probability=0, grayscale_probability=0
    )
    torch.testing.assert_close(random_view(pixels(photos), still, generator()), pixels(photos), rtol=0, atol=1e-2)


def test_a_flip_mirrors_the_chosen_images_only(photos):
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(24, 1)
    flips = torch.arange(24) % 2 == 1
    views = crop_and_flip(pixels(photos), whole, flips)
    torch.testing.assert_close(views[0::2], pixels(photos)[0::2], rtol=0, atol=1e-2)
    torch.testing.assert_close(views[1::2], pixels(photos)[1::2].flip(3), rtol=0, atol=1e-2)


def test_a_crop_is_torchvisions_crop_resized(photos):
    box = torch.tensor([[12 / 48, 6 / 48, 24 / 48, 30 / 48]]).repeat(24, 1)
    views = crop_and_flip(pixels(photos), box, torch.zeros(24, dtype=torch.bool))
    expected = v2.functional.resized_crop(pixels(photos), 6, 12, 30, 24, [48, 48], antialias=False)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # borders see pixels beyond the crop
    assert (views[inner] - expected[inner]).abs().max() < 0.5


def test_crop_areas_lie_in_their_range_and_inside_the_image(photos):
    config = ViewConfig(crop_area=(0.3, 0.6))
    boxes = crop_boxes(pixels(photos).repeat(50, 1, 1, 1), config, generator())
    area = boxes[:, 2] * boxes[:, 3]
    assert area.min() >= 0.3
    assert area.max() <= 0.6
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 1 + 1e-6


def test_brightness_alone_scales_each_image(photos):
    config = ViewConfig(brightness=0.4, contrast=0, saturation=0, hue=0, jitter_probability=1, grayscale_probability=0)
    dark = pixels(photos) / 4 + 1
    factors = (jitter(dark, config, generator()) / dark).flatten(1)
    assert factors.std(dim=1).max() < 1e-4
    assert 0.6 <= factors.mean(dim=1).min() < 0.8
    assert 1.2 < factors.mean(dim=1).max() <= 1.4


def test_greyscale_is_equal_channels_of_luma(photos):
    config = ViewConfig(jitter_probability=0, grayscale_probability=1)
    grey = jitter(pixels(photos), config, generator())
    expected = v2.functional.rgb_to_grayscale(pixels(photos), num_output_channels=3)
    torch.testing.assert_close(grey, expected, rtol=0, atol=0.5)


def test_hue_turns_colours_but_keeps_luma_and_grey(photos):
    config = ViewConfig(brightness=0, contrast=0, saturation=0, hue=0.1, jitter_probability=1, grayscale_probability=0)
    soft = pixels(photos) / 4 + 96  # no colour clips
    turned = jitter(soft, config, generator())
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    torch.testing.assert_close((turned * weights).sum(1), (soft * weights).sum(1), rtol=0, atol=0.2)
    assert (turned - soft).abs().max() > 2
    grey = torch.full((4, 3, 8, 8), 100.0)
    torch.testing.assert_close(jitter(grey, config, generator()), grey, rtol=0, atol=0.1)


def test_one_channel_is_jittered_in_brightness_and_contrast_only(photos):
    grey = pixels(photos)[:, :1]
    assert random_view(grey, ViewConfig(), generator()).shape == grey.shape
