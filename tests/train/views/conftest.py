import numpy as np
import pytest
import torch

from mio_export.train.views import ViewConfig


@pytest.fixture(scope="session")
def images(photo_crops):
    """24 photos, uint8, shape (24, 48, 48, 3)."""
    return torch.stack([torch.from_numpy(np.array(crop.resize((48, 48)))) for crop in photo_crops])


@pytest.fixture
def pixels(images):
    """The same as views are drawn from, shape (24, 3, 48, 48)."""
    return images.permute(0, 3, 1, 2).float()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def only():
    """Build a configuration in which nothing happens but what is named."""
    nothing = {
        "crop_area": (1.0, 1.0),
        "crop_aspect": (1.0, 1.0),
        "flip_probability": 0.0,
        "brightness": 0.0,
        "contrast": 0.0,
        "saturation": 0.0,
        "hue": 0.0,
        "jitter_probability": 1.0,
        "grayscale_probability": 0.0,
    }
    return lambda **values: ViewConfig(**{**nothing, **values})
