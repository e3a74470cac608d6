import pytest
import torch
from scipy.stats import binomtest, ks_2samp
from torchvision.transforms import v2

from mio_export.train.views.blur import blur, random_blur

NUM_DRAWS = 3000


def impulses(num_images, side):
    pixels = torch.zeros(num_images, 1, side, side)
    pixels[:, :, side // 2, side // 2] = 255
    return pixels


@pytest.mark.parametrize(("num_channels", "side", "kernel_size"), [(3, 48, 5), (1, 48, 5), (3, 32, 3)])
def test_blur_is_torchvisions(pixels, num_channels, side, kernel_size):
    pixels = pixels[:, :num_channels, :side, :side]
    sigma = torch.linspace(0.1, 2.0, 24)
    blurred = blur(pixels, sigma)
    for index, image in enumerate(pixels):
        expected = v2.functional.gaussian_blur(image, [kernel_size] * 2, [sigma[index].item()] * 2)
        torch.testing.assert_close(blurred[index], expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("side", "width"), [(8, 3), (28, 3), (32, 3), (64, 7), (96, 9), (224, 23)])
def test_the_kernel_is_a_tenth_of_the_side_and_odd(side, width):
    blurred = blur(impulses(1, side), torch.tensor([1e3]))
    assert (blurred[0, 0] > 0).any(dim=0).sum() == width
    assert (blurred[0, 0] > 0).any(dim=1).sum() == width
    assert blurred.sum().item() == pytest.approx(255, rel=1e-5)


def test_sigma_is_distributed_as_torchvisions(only, generator):
    views = random_blur(impulses(NUM_DRAWS, 9), only(blur_probability=(1.0, 0.0)), generator, view=0)
    beside = (views[:, 0, 4, 5] / views[:, 0, 4, 4]).double()  # exp(-1 / 2σ²)
    ours = (-0.5 / beside.log()).sqrt()
    transform = v2.GaussianBlur(3, sigma=(0.1, 2.0))
    torch.manual_seed(0)
    theirs = [transform.make_params([])["sigma"][0] for _ in range(NUM_DRAWS)]
    assert ks_2samp(ours.numpy(), theirs).pvalue > 0.01


@pytest.mark.parametrize(("view", "share"), [(0, 0.6), (1, 0.1)])
def test_each_view_blurs_its_own_share(view, share, only, generator):
    config = only(blur_probability=(0.6, 0.1), blur_sigma=(1.0, 2.0))
    sharp = impulses(NUM_DRAWS, 9)
    views = random_blur(sharp.clone(), config, generator, view=view)
    blurred = views[:, 0, 4, 5] > 0
    assert torch.equal(views[~blurred], sharp[~blurred])
    assert binomtest(int(blurred.sum()), NUM_DRAWS, share).pvalue > 0.01
