"""Scores of samples against their formulas, one by one."""

import pytest
import torch
import torch.nn.functional as F

from pydistill.select import sample_scores


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_formulas(dtype):
    logits, labels = (4 * torch.randn(50, 7)).to(dtype), torch.arange(50) % 7
    scores = sample_scores(logits, labels)
    z = logits.double()
    p = z.softmax(1)
    truth = {
        "ce": F.cross_entropy(z, labels, reduction="none"),
        "el2n": (p - F.one_hot(labels, 7)).norm(dim=1),
        "margin": torch.stack(
            [row[y] - torch.cat([row[:y], row[y + 1 :]]).max() for row, y in zip(z, labels, strict=True)]
        ),
        "entropy": torch.distributions.Categorical(logits=z).entropy(),
    }
    assert list(scores) == list(truth)
    for name, value in scores.items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(value.double(), truth[name], rtol=tolerance, atol=tolerance)


def test_a_sample_that_is_all_but_sure():
    """EL2N is then a small number, not what remains of 1 - p in float32."""
    logits = torch.tensor([[30.0, 0.0, -torch.inf]])
    scores = sample_scores(logits, torch.tensor([0]))
    torch.testing.assert_close(scores["el2n"], torch.tensor([2**0.5 * torch.tensor(-30.0).exp()]))
    torch.testing.assert_close(scores["entropy"], torch.tensor([31 * torch.tensor(-30.0).exp()]))
    assert scores["margin"] == 30


def test_only_what_is_asked_for_and_no_gradient():
    logits, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    every = sample_scores(logits, labels)
    assert list(sample_scores(logits, labels, ("margin", "ce"))) == ["margin", "ce"]
    for name, value in every.items():
        assert torch.equal(sample_scores(logits, labels, [name])[name], value)
        assert not value.requires_grad
    assert sample_scores(logits[:0], labels[:0])["ce"].shape == (0,)
    assert sample_scores(logits[:, :1], labels * 0, ["margin"])["margin"].isinf().all()


X, Y = torch.randn(2, 3), torch.tensor([0, 2])
BAD = [
    (("x", Y), TypeError, "logits: expected a tensor, got str"),
    ((X[0], Y), ValueError, r"logits: expected \[N, C\] with at least one class, got shape \[3\]"),
    ((X, [0, 2]), TypeError, "labels: expected a tensor, got list"),
    ((X, Y.int()), TypeError, "labels: expected int64 class numbers, got torch.int32"),
    ((X, Y[:1]), ValueError, r"labels: expected shape \[2\], got \[1\]"),
    ((X, Y + 1), ValueError, r"labels: expected class numbers in 0\.\.2 for 3 classes, got 3"),
    ((X, Y, "ce"), ValueError, "kinds: expected some of ce, el2n, margin, entropy, got 'ce'"),
    ((X, Y, ("aum",)), ValueError, "kinds: expected some of ce, el2n, margin, entropy, got .*aum"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        sample_scores(*args)
