"""Clipping of normalised images."""

import pytest
import torch

from pydistill.augment import clamp_normalized_

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_is_the_repositorys_loop(dtype):
    x = (3 * torch.randn(4, 3, 9, 8)).to(dtype).requires_grad_()
    want = x.detach().clone()
    for c, (m, s) in enumerate(zip(MEAN, STD, strict=True)):
        want[:, c] = torch.clamp(want[:, c], -m / s, (1 - m) / s)
    before = x.detach().clone()
    assert clamp_normalized_(x, MEAN, STD) is x
    assert torch.equal(x, want)
    assert not torch.equal(x, before)
    assert x.is_leaf
    assert x.requires_grad


def test_strides_and_nan():
    x = torch.full((2, 3, 4, 4), 9.0).contiguous(memory_format=torch.channels_last)
    x[0, 1, 2, 3] = float("nan")
    clamp_normalized_(x, MEAN, STD)
    assert x.isnan().sum() == 1
    assert x[0, 1, 2, 3].isnan()
    torch.testing.assert_close(x[1, :, 0, 0], torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]))


def test_bad_input():
    x = torch.zeros(2, 3, 4, 4)
    for arguments, error, message in (
        ((x.int(), MEAN, STD), TypeError, r"x: expected a floating-point tensor, got torch\.int32"),
        ((x[0], MEAN, STD), ValueError, r"x: expected shape \[B, C, H, W\], got \[3, 4, 4\]"),
        ((x, MEAN[:2], STD), ValueError, "mean: expected 3 numbers, one for each channel, got 2"),
        ((x, MEAN, (1, 0, 1)), ValueError, r"std: expected numbers above zero, got \[1, 0, 1\]"),
    ):
        with pytest.raises(error, match=message):
            clamp_normalized_(*arguments)
