"""Forgetting events and margins, counted by hand."""

import pytest
import torch

from pydistill.select import TrainingDynamics


def logits(*margins):
    return torch.tensor([[margin, 0.0, -9.0] for margin in margins])


def test_events_and_margins():
    dynamics, labels = TrainingDynamics(4), torch.zeros(3, dtype=torch.int64)
    index = torch.tensor([2, 0, 1])
    for epoch in [(1.0, -1.0, 2.0), (-1.0, -2.0, 3.0), (3.0, -3.0, 0.0), (-5.0, -2.0, 3.0)]:
        dynamics.update(logits(*epoch), labels, index)
    # a margin of zero is a miss, as argmax may take either
    assert dynamics.forgetting().tolist() == [torch.inf, 1.0, 2.0, torch.inf]
    aum = dynamics.aum()
    assert aum[:3].tolist() == [-2.0, 2.0, -0.5]
    assert aum[3].isnan()
    whole = TrainingDynamics(3)
    whole.update(logits(1.0, 2.0, -3.0), torch.tensor([0, 1, 2]))
    assert whole.aum().tolist() == [1.0, -2.0, -9.0 - 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 1)}, r"logits: expected floating \[B, K\] with K >= 2, got .*\[3, 1\]"),
        ({"logits": torch.full((3, 2), torch.nan)}, "logits: expected finite values, got others"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels: expected 0\.\.1, got 0\.\.2"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels: expected int64 \[3\], got torch.int64 \[2\]"),
        ({"index": torch.tensor([0, 1, 5])}, r"index: expected 0\.\.4, got 0\.\.5"),
        ({"index": torch.tensor([0, 1, 1])}, "index: expected every sample once, got one twice"),
        ({"index": None}, r"index: expected int64 \[3\], got torch.int64 \[5\]"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"logits": torch.zeros(3, 2), "labels": torch.zeros(3, dtype=torch.int64), "index": torch.arange(3)}
    with pytest.raises(ValueError, match=message):
        TrainingDynamics(5).update(**given | change)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        TrainingDynamics(0)
