import pytest
import torch

from mio_export.runtimes.devices import exact_float32


def settings():
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic


@pytest.fixture
def hurried():
    """Settings that trade exactness for speed, as a training script may have made them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        yield settings()
    torch.set_float32_matmul_precision(before)


def test_float32_is_whole_inside_and_as_it_was_outside(hurried):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_float32("cpu"):
            assert settings() == ("highest", False, False, True)
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    assert settings() == hurried


def test_an_error_inside_restores_it_too(hurried):
    with pytest.raises(KeyError), exact_float32("cpu"):
        raise KeyError
    assert settings() == hurried
