"""ZCA whitening follows its formula, is undone by its inverse, and refuses what has no inverse."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from pydistill import whitening
from pydistill.whitening import ZCA

C, H, W = 2, 3, 4
D = C * H * W


def images(N=200, dtype=torch.float64):
    """Correlated pixels with a mean."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(D, D, generator=generator, dtype=torch.float64)
    rows = torch.randn(N, D, generator=generator, dtype=torch.float64) @ mixing + 3
    return rows.view(N, C, H, W).to(dtype)


@pytest.mark.parametrize("eps", [0.0, 0.1, 10])
@pytest.mark.parametrize("at_once", [7, 4096])
def test_it_is_the_formula(eps, at_once, monkeypatch):
    monkeypatch.setattr(whitening, "_IMAGES_AT_ONCE", at_once)
    x = images()
    rows = x.flatten(1)
    U, S, _ = torch.linalg.svd(torch.cov(rows.T))
    expected = (rows - rows.mean(0)) @ (U @ torch.diag((S + eps) ** -0.5) @ U.T)
    torch.testing.assert_close(ZCA.fit(x, eps)(x).flatten(1), expected, rtol=1e-9, atol=1e-9)


def test_the_default_is_the_papers():
    torch.testing.assert_close(ZCA.fit(images()).matrix, ZCA.fit(images(), 0.1).matrix, rtol=0, atol=0)


def test_what_comes_out_is_white():
    x = images()
    white = ZCA.fit(x, 0.0)(x).flatten(1)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(white.mean(0), torch.zeros(D, dtype=torch.float64), rtol=0, atol=1e-10)
    variances = torch.linalg.eigvalsh(torch.cov(x.flatten(1).T))
    regular = torch.linalg.eigvalsh(torch.cov(ZCA.fit(x, 0.5)(x).flatten(1).T))
    torch.testing.assert_close(regular, variances / (variances + 0.5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("N", [5, 200])
def test_the_inverse_undoes_it(dtype, tolerance, N):
    zca, x = ZCA.fit(images(N, dtype)), images(dtype=dtype)
    assert zca(x).dtype == zca.inverse(x).dtype == dtype
    torch.testing.assert_close(zca.inverse(zca(x)), x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(zca(zca.inverse(x)), x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(zca(x[3]), zca(x)[3], rtol=tolerance, atol=tolerance)


def test_float32_images_are_fitted_in_float64():
    found = ZCA.fit(images(dtype=torch.float32)).matrix
    truth = ZCA.fit(images(dtype=torch.float32).double()).matrix
    assert torch.equal(found, truth.float())


def test_strides_do_not_matter():
    x = images()
    strided = x.to(memory_format=torch.channels_last)
    zca = ZCA.fit(strided)
    torch.testing.assert_close(zca.matrix, ZCA.fit(x).matrix)
    torch.testing.assert_close(zca(strided), zca(x))
    torch.testing.assert_close(zca.inverse(strided), zca.inverse(x))


def test_it_is_differentiable_in_the_images():
    zca = ZCA.fit(images())
    x = images(3).requires_grad_()
    assert torch.autograd.gradcheck(zca, x)
    assert torch.autograd.gradcheck(zca.inverse, x)


def test_it_is_saved_with_a_result(tmp_path):
    zca, x = ZCA.fit(images()), images(4)
    save_file(zca.tensors(), tmp_path / "zca.safetensors")
    again = ZCA(**load_file(tmp_path / "zca.safetensors"))
    assert torch.equal(again(x), zca(x))
    assert torch.equal(again.inverse(x), zca.inverse(x))
    assert zca.to(torch.float32)(x.float()).dtype == torch.float32


def test_constant_images_have_no_variance_to_divide_by():
    x = torch.full((5, C, H, W), 0.5)
    assert ZCA.fit(x)(x).count_nonzero() == 0
    with pytest.raises(ValueError, match=r"eps: .* these 5 images is singular \(rank 0 of 24\), got 0"):
        ZCA.fit(x, 0.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ZCA.fit(x[:20], 0), ValueError, r"of these 20 images is singular \(rank 19 of 24\), got 0"),
        (lambda x: ZCA.fit(x[:1]), ValueError, "images: expected at least 2, as one has no covariance, got 1"),
        (lambda x: ZCA.fit(x[0]), ValueError, r"images: expected \[N, C, H, W\] .*, got \[2, 3, 4\]"),
        (lambda x: ZCA.fit(x[:0]), ValueError, r"images: expected \[N, C, H, W\] .*, got \[0, 2, 3, 4\]"),
        (lambda x: ZCA.fit(x.log()), ValueError, "images: expected finite pixels with finite squares"),
        (lambda x: ZCA.fit(x * 1e200), ValueError, "images: expected finite pixels with finite squares"),
        (lambda x: ZCA.fit(x.to(torch.uint8)), TypeError, "images: expected float32 or float64, got torch.uint8"),
        (lambda x: ZCA.fit(x, -0.1), ValueError, r"eps: expected a finite number >= 0, got -0\.1"),
        (lambda x: ZCA.fit(x, "0"), TypeError, "eps: expected a number, got str"),
        (lambda x: ZCA.fit(x)(x.float()), ValueError, r"images: expected torch.float64 \[\.\.\., 2, 3, 4\]"),
        (lambda x: ZCA.fit(x).inverse(x[..., :3]), ValueError, r"images: expected torch.float64 \[\.\.\., 2, 3, 4\]"),
        (lambda x: ZCA(x[0], torch.eye(3), torch.eye(3)), ValueError, r"matrix: expected torch.float64 \[24, 24\]"),
        (lambda x: ZCA(x, torch.eye(3), torch.eye(3)), ValueError, r"mean: expected float32 or float64 \[C, H, W\]"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(images())
