"""The normalised mutual information of attention maps: its definition, its extremes, its memory, its messages."""

import math

import pytest
import torch

from pydistill.divergence import attention_nmi, nmi
from pydistill.ops import attention_map_divergence
from pydistill.ops import attention_map_divergence as op


def by_definition(q, k, T):
    """From the joint distribution p(q, k) = map / N of one head, by summing over pairs."""
    joint = (q @ k.T / T).softmax(-1) / len(q)
    of_q, of_k = joint.sum(1), joint.sum(0)
    information = sum(
        joint[i, j] * math.log(joint[i, j] / (of_q[i] * of_k[j])) for i in range(len(q)) for j in range(len(k))
    )
    entropies = [-sum(p * math.log(p) for p in marginal) for marginal in (of_q, of_k)]
    return float(information / math.sqrt(entropies[0] * entropies[1]))


def test_the_family_has_the_operator():
    assert attention_map_divergence is op


def test_definition():
    q, k = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    found, warm = attention_nmi(q, k), attention_nmi(q, k, T=0.3)
    assert found.shape == (2, 3)
    for b in range(2):
        for h in range(3):
            assert found[b, h].item() == pytest.approx(by_definition(q[b, h], k[b, h], 2.0), rel=1e-10)
            assert warm[b, h].item() == pytest.approx(by_definition(q[b, h], k[b, h], 0.3), rel=1e-10)
    p = (q[0, 0] @ k[0, 0].T / 2).softmax(-1)
    line = (p * (p / p.mean(0)).log()).sum(-1).mean() / (math.log(5) * -(p.mean(0) * p.mean(0).log()).sum()).sqrt()
    torch.testing.assert_close(found[0, 0], line)


def test_alike_is_zero_and_each_its_own_is_one():
    alike, own = torch.randn(1, 4).expand(9, 4), 100 * torch.eye(9)
    assert attention_nmi(alike, torch.randn(9, 4)).item() == pytest.approx(0, abs=1e-6)
    assert attention_nmi(own, torch.eye(9)).item() == pytest.approx(1, abs=1e-6)
    assert attention_nmi(torch.ones(9, 1), 1e4 * (torch.arange(9) == 3).float()[:, None]) == 0  # all on one key
    assert attention_nmi(torch.randn(2, 1, 4), torch.randn(2, 9, 4)).tolist() == [0, 0]
    assert attention_nmi(torch.full((9, 1), math.nan), torch.ones(9, 1)).isnan()


def test_chunks_change_nothing(monkeypatch):
    q, k = torch.randn(2, 6, 20, 8), torch.randn(2, 6, 30, 8)
    whole = attention_nmi(q, k)
    made = []
    of_heads = nmi._of_heads
    monkeypatch.setattr(nmi, "_of_heads", lambda q, k, T: made.append(len(q)) or of_heads(q, k, T))
    monkeypatch.setattr(nmi, "_ELEMENTS", 5 * 20 * 30)
    torch.testing.assert_close(attention_nmi(q, k), whole, rtol=0, atol=1e-6)
    assert made == [5, 5, 2]


def test_dtypes_and_gradients():
    q, k = torch.randn(3, 9, 8), torch.randn(3, 9, 8)
    exact = attention_nmi(q.double(), k.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(attention_nmi(q.bfloat16(), k.bfloat16()), exact.float(), rtol=0.05, atol=0.01)
    assert not attention_nmi(q.requires_grad_(), k).requires_grad


@pytest.mark.parametrize(
    ("q", "k", "options", "error", "message"),
    [
        (1, torch.ones(2, 3), {}, TypeError, "q: expected a floating tensor, got int"),
        (torch.ones(2, 3), torch.ones(2, 3).long(), {}, TypeError, "k: expected a floating tensor, got torch.int64"),
        (torch.ones(3), torch.ones(2, 3), {}, ValueError, r"q: expected \[..., rows, features\] .* got \[3\]"),
        (torch.ones(2, 3), torch.ones(0, 3), {}, ValueError, r"k: expected .* got \[0, 3\]"),
        (torch.ones(4, 2, 3), torch.ones(5, 2, 3), {}, ValueError, r"k: expected leading dimensions \(heads\) \[4\]"),
        (torch.ones(2, 3), torch.ones(2, 4), {}, ValueError, "and 3 features as q, got .* and 4"),
        (torch.ones(2, 3), torch.ones(2, 3).double(), {}, ValueError, "k: expected torch.float32 on cpu as q"),
        (torch.ones(2, 3), torch.ones(2, 3), {"T": 0}, ValueError, "T: expected a positive number, got 0"),
    ],
)
def test_bad_input(q, k, options, error, message):
    with pytest.raises(error, match=message):
        attention_nmi(q, k, **options)
