import colorsys

import pytest
import torch
from scipy.stats import binomtest, ks_2samp, pearsonr
from torchvision.transforms import v2

from mio_export.train.views.color import luma, random_grayscale, random_jitter, random_solarize, turn_hue

NUM_DRAWS = 3000
COLOUR = (120.0, 100.0, 90.0)


def probes(num_images):
    """Return grey images of 90 and 110 and images of one colour; from what becomes of them each factor can be read."""
    grey = torch.tensor([90.0, 110.0]).view(1, 1, 1, 2).expand(num_images, 3, 2, 2)
    colour = torch.tensor(COLOUR).view(1, 3, 1, 1).expand(num_images, 3, 2, 2)
    return grey.clone(), colour.clone()


def brightness(grey, colour):
    return grey.mean(dim=(1, 2, 3)) / 100


def contrast(grey, colour):
    return (grey[:, 0, 0, 1] - grey[:, 0, 0, 0]) / (grey.mean(dim=(1, 2, 3)) / 5)


def saturation(grey, colour):
    return (colour[:, 0, 0, 0] - colour[:, 2, 0, 0]) / (COLOUR[0] - COLOUR[2])


def hue(grey, colour):
    start = colorsys.rgb_to_hsv(*COLOUR)[0]
    turns = [colorsys.rgb_to_hsv(*image)[0] - start for image in colour[:, :, 0, 0].tolist()]
    return (torch.tensor(turns) + 0.5).remainder(1) - 0.5


READERS = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}


def factors(name, config, seed=0, num_images=NUM_DRAWS):
    """Jitter the probes and return what was done to each; both are jittered with the same numbers."""
    jittered = (random_jitter(p, config, torch.Generator().manual_seed(seed)) for p in probes(num_images))
    return READERS[name](*jittered)


@pytest.mark.parametrize(
    ("name", "amount"),
    [
        ("brightness", 0.4),
        ("brightness", 1.3),
        ("contrast", 0.8),
        ("contrast", 1.3),
        ("saturation", 0.4),
        ("saturation", 1.3),
        ("hue", 0.1),
        ("hue", 0.5),
    ],
)
def test_factors_are_distributed_as_torchvisions(name, amount, only):
    transform = v2.ColorJitter(**{name: amount})
    torch.manual_seed(0)
    theirs = [transform.make_params([])[f"{name}_factor"] for _ in range(NUM_DRAWS)]
    ours = factors(name, only(**{name: amount}))
    assert ks_2samp(ours.numpy(), theirs).pvalue > 0.01


@pytest.mark.parametrize("name", READERS)
def test_each_adjustment_is_torchvisions(name, only, pixels):
    config = only(**{name: 0.5})
    drawn = factors(name, config, num_images=24)
    views = random_jitter(pixels.clone(), config, torch.Generator().manual_seed(0))
    adjust = getattr(v2.functional, f"adjust_{name}")
    expected = torch.stack([adjust(image / 255, factor.item()) for image, factor in zip(pixels, drawn, strict=True)])
    assert (views - expected * 255).abs().max() < 0.1  # torchvision's luma has 0.2989 for red
    assert (views - pixels).abs().max() > 20


def test_the_order_is_brightness_contrast_saturation_hue(only, pixels):
    amounts = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
    views = random_jitter(pixels.clone(), only(**amounts), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)  # draws in the same order
    drawn = [torch.rand(24, 1, 1, 1, generator=generator) * 2 - 1 for _ in amounts]
    for index, image in enumerate(pixels / 255):
        for (name, amount), unit in zip(amounts.items(), drawn, strict=True):
            factor = amount * unit[index].item() + (0 if name == "hue" else 1)
            image = getattr(v2.functional, f"adjust_{name}")(image, factor)
        assert (views[index] - image * 255).abs().max() < 1


def test_factors_of_an_image_are_independent(only):
    config = only(brightness=0.4, contrast=0.4)
    bright, stretched = (factors(name, config).numpy() for name in ("brightness", "contrast"))
    assert pearsonr(bright, stretched).pvalue > 0.01
    assert pearsonr(bright[:-1], bright[1:]).pvalue > 0.01


def test_the_chosen_share_is_jittered_and_the_rest_left_alone(only, generator):
    grey = torch.full((NUM_DRAWS, 1, 4, 4), 100.0)
    changed = (random_jitter(grey.clone(), only(brightness=0.4, jitter_probability=0.8), generator) != grey).flatten(1)
    assert torch.equal(changed.all(dim=1), changed.any(dim=1))
    assert binomtest(int(changed[:, 0].sum()), NUM_DRAWS, 0.8).pvalue > 0.01


def test_the_chosen_share_loses_its_colour(only, generator):
    colour = probes(NUM_DRAWS)[1]
    views = random_grayscale(colour.clone(), only(grayscale_probability=0.2), generator)
    lost = (views[:, 0] == views[:, 1]).flatten(1)[:, 0]
    assert torch.equal(views[~lost], colour[~lost])
    assert binomtest(int(lost.sum()), NUM_DRAWS, 0.2).pvalue > 0.01


def test_greyscale_is_equal_channels_of_luma(only, generator, pixels):
    grey = random_grayscale(pixels.clone(), only(grayscale_probability=1), generator)
    expected = v2.functional.rgb_to_grayscale(pixels, num_output_channels=3)
    torch.testing.assert_close(grey, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("turn", [-0.5, -0.21, 0.0, 0.1, 0.47])
def test_hue_is_turned_as_torchvision_turns_it_whatever_the_colour(turn, pixels):
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 77.0, 255.0])] * 3)  # greys and ties among them
    colours = torch.cat([corners, pixels.permute(0, 2, 3, 1).reshape(-1, 3)]).T.reshape(1, 3, -1, 1)
    expected = v2.functional.adjust_hue(colours / 255, turn) * 255
    torch.testing.assert_close(turn_hue(colours, torch.full((1, 1, 1, 1), turn)), expected, rtol=0, atol=1e-2)


def test_one_channel_is_jittered_in_brightness_and_contrast_only(only, pixels):
    grey = luma(pixels)
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    both, all_four = (
        random_jitter(grey.clone(), config, generator)
        for config, generator in zip(
            (only(brightness=0.4, contrast=0.4), only(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)),
            generators,
            strict=True,
        )
    )
    assert torch.equal(both, all_four)
    assert not torch.equal(both, grey)


@pytest.mark.parametrize("threshold", [0, 128, 200])
def test_solarising_is_torchvisions(threshold, only, generator, images, pixels):
    config = only(solarize_probability=(0.0, 1.0), solarize_threshold=threshold)
    views = random_solarize(pixels.clone(), config, generator, view=1)
    expected = v2.functional.solarize(images.permute(0, 3, 1, 2), threshold)
    assert torch.equal(views, expected.float())


@pytest.mark.parametrize(("view", "share"), [(0, 0.3), (1, 0.2)])
def test_each_view_solarises_its_own_share(view, share, only, generator):
    bright = torch.full((NUM_DRAWS, 1, 2, 2), 200.0)
    views = random_solarize(bright.clone(), only(solarize_probability=(0.3, 0.2)), generator, view=view)
    assert set(views.flatten().tolist()) == {55.0, 200.0}
    assert binomtest(int((views[:, 0, 0, 0] == 55).sum()), NUM_DRAWS, share).pvalue > 0.01
