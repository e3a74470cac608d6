import pytest
import torch
from torchvision.transforms import v2

from mio_export.train.views import PRESETS, ViewConfig, random_view, two_views, view_values


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("preset", PRESETS)
def test_two_views_of_a_batch_differ_from_each_other_and_between_images(preset, images):
    same = images[:1].repeat(8, 1, 1, 1)
    first, second = two_views(same, ViewConfig(**view_values({"preset": preset})), generator())
    assert first.shape == second.shape == (8, 3, 48, 48)
    assert first.dtype == torch.float32
    views = torch.cat([first, second])
    assert views.min() >= 0
    assert views.max() <= 255 + 1e-3
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + 1e9 * torch.eye(16)
    assert distances.min() > 1  # every view has parameters of its own


def test_the_generator_alone_decides(images):
    config = ViewConfig(**view_values({"preset": "byol"}))
    torch.manual_seed(1)
    first = two_views(images, config, generator(7))
    torch.manual_seed(2)
    again = two_views(images, config, generator(7))
    other = two_views(images, config, generator(8))
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not any(torch.equal(*pair) for pair in zip(first, other, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_transform_may_be_drawn_for_no_image_of_a_batch(preset, images):
    config = ViewConfig(**view_values({"preset": preset}))
    for seed in range(30):  # each transform is left out at least once
        first, second = two_views(images[:1], config, generator(seed))
        assert first.isfinite().all()
        assert second.isfinite().all()


def test_a_view_without_augmentation_is_the_image(only, pixels):
    torch.testing.assert_close(random_view(pixels, only(), generator()), pixels, rtol=0, atol=1e-2)


def test_the_images_themselves_are_left_alone(images, pixels):
    config = ViewConfig(**view_values({"preset": "mio", "jitter_probability": 1}))
    before = pixels.clone(), images.clone()
    random_view(pixels, config, generator())
    two_views(images, config, generator())
    assert torch.equal(pixels, before[0])
    assert torch.equal(images, before[1])


def test_stored_images_may_be_larger_than_views(only, images, pixels):
    views = torch.cat(two_views(images, only(), generator(), size=20))
    expected = v2.functional.resize(pixels, [20, 20], antialias=True)
    torch.testing.assert_close(views, torch.cat([expected, expected]), rtol=0, atol=1e-2)


def test_blur_and_solarise_belong_to_the_view_that_names_them(only, images, pixels):
    first, second = two_views(images, only(blur_probability=(1, 0), solarize_probability=(0, 1)), generator())
    torch.testing.assert_close(second, torch.where(pixels >= 127.5, 255 - pixels, pixels), rtol=0, atol=1e-2)
    assert (first[..., 1:] - first[..., :-1]).abs().mean() < (pixels[..., 1:] - pixels[..., :-1]).abs().mean()


def test_colours_are_jittered_before_they_are_solarised(only, images):
    dark = torch.full_like(images, 100)
    config = only(brightness=0.5, solarize_probability=(1, 1), solarize_threshold=100)
    views = torch.cat(two_views(dark, config, generator())).mean(dim=(1, 2, 3))
    assert views.max() < 155.1  # 100 brightened at most by half, and inverted if it got brighter
    assert ((views > 104.9) | (views < 100.1)).all()


def test_mixed_precision_does_not_reach_the_views(images):
    config = ViewConfig(**view_values({"preset": "simclr"}))
    expected = two_views(images, config, generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = two_views(images, config, generator())
    assert torch.equal(torch.cat(views), torch.cat(expected))


def test_grey_images_are_views_too(images):
    views = two_views(images[..., :1], ViewConfig(**view_values({"preset": "byol"})), generator())
    assert [view.shape for view in views] == [(24, 1, 48, 48)] * 2
