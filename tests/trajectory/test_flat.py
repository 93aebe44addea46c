"""Operators on flat parameters are their formulas, for one student and for each of several."""

import pytest
import torch
from torch import nn

from pydistill.trajectory.flat import (
    FlatModule,
    ema_,
    gsam_combine,
    l2_to_reference,
    perturb_towards,
    sam_perturbation,
)

E, P = 3, 41


def vectors(count, shape=(E, P)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def per_row(function, *tensors):
    return torch.stack([function(*rows) for rows in zip(*tensors, strict=True)])


def test_ema():
    average, theta = vectors(2)
    expected = 0.995 * average + 0.005 * theta
    given = average.clone()
    assert ema_(given, theta, 0.995) is given
    close(given, expected)
    close(ema_(average.clone(), theta, 1.0), average)
    close(ema_(average.clone(), theta, 0.0), theta)
    half = ema_(average.float(), theta.bfloat16(), 0.9)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, (0.9 * average + 0.1 * theta.bfloat16().double()).float())


def test_sam_perturbation():
    theta, grad = vectors(2)
    close(sam_perturbation(grad, 0.05), per_row(lambda g: 0.05 * g / g.norm(), grad))
    adaptive = per_row(lambda w, g: 0.05 * w**2 * g / (w.abs() * g).norm(), theta, grad)
    close(sam_perturbation(grad, 0.05, theta), adaptive)
    close(sam_perturbation(grad[0], 0.05), 0.05 * grad[0] / grad[0].norm())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gsam_combine(alpha):
    def literal(perturbed, grad):
        unit = perturbed / perturbed.norm()
        return perturbed - alpha * (grad - (grad @ unit) * unit)

    perturbed, grad = vectors(2)
    found = gsam_combine(perturbed, grad, alpha)
    close(found, per_row(literal, perturbed, grad))
    close(gsam_combine(perturbed[0], grad[0], alpha), literal(perturbed[0], grad[0]))
    close((found * perturbed).sum(1), perturbed.square().sum(1))  # the removed part is orthogonal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients_of_one_student(dtype):
    theta, grad, other = (v.to(dtype) for v in vectors(3))
    grad[1] = 0
    for found in (sam_perturbation(grad, 50.0), sam_perturbation(grad, 50.0, theta)):
        assert found.isfinite().all()
        assert found[1].count_nonzero() == 0
        assert (found[[0, 2]] != 0).all()
    assert torch.equal(gsam_combine(grad, other, 0.3)[1], -0.3 * other[1])
    assert torch.equal(gsam_combine(other, grad, 0.3)[1], other[1])


def test_perturb_towards():
    theta, direction = vectors(2)
    literal = per_row(lambda w, d: w * (1 + 0.7 * d / d.norm()), theta, direction)
    close(perturb_towards(theta, direction, 0.7), literal)
    close(perturb_towards(theta, torch.zeros_like(theta), 0.7), theta)


def test_perturb_towards_of_convolutions_alone():
    flat = FlatModule(nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Conv2d(3, 2, 1), nn.Linear(4, 2)))
    theta, direction = vectors(2, (E, flat.numel))
    found = perturb_towards(theta, direction, 0.7, flat)
    for row, w, d in zip(found, theta, direction, strict=True):
        before, towards = flat.unflatten(w), flat.unflatten(d)
        for name, after in flat.unflatten(row).items():
            if name in ("0.weight", "2.weight"):
                close(after, before[name] * (1 + 0.7 * towards[name] / towards[name].norm()))
            else:
                assert torch.equal(after, before[name])


def test_l2_to_reference():
    theta, reference = vectors(2)
    theta.requires_grad_()
    found = l2_to_reference(theta, reference)
    close(found.detach(), per_row(lambda w, r: (w - r).norm() ** 2, theta.detach(), reference))
    (grad,) = torch.autograd.grad(found.sum(), theta)
    close(grad, 2 * (theta - reference).detach())
    close(l2_to_reference(theta, reference[0])[2], (theta[2] - reference[0]).norm() ** 2)
    assert l2_to_reference(theta[0], reference[0]).shape == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: ema_(v, v, 1.5), r"decay: expected a number in \[0, 1\], got 1.5"),
        (lambda v: ema_(v, v[0], 0.5), r"theta: expected shape \[3, 41\] as average, got \[41\]"),
        (lambda v: sam_perturbation(v, -1.0), "rho: expected a number >= 0, got -1.0"),
        (lambda v: sam_perturbation(v, 1.0, v[:1]), r"theta: expected shape \[3, 41\] as grad"),
        (lambda v: gsam_combine(v, v[:2], 1.0), r"grad: expected shape \[3, 41\] as grad_perturbed"),
        (lambda v: perturb_towards(v, v[0], 1.0), r"direction: expected shape \[3, 41\] as theta"),
        (lambda v: perturb_towards(v, v, 1.0, FlatModule(nn.Linear(2, 2))), r"expected shape \[..., 6\] for this net"),
        (lambda v: l2_to_reference(v, v[:2]), r"reference: expected shape \[3, 41\] as theta, got \[2, 41\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors(1)[0])
