"""The smallest network of each of timm's source files and torchvision's families with BatchNorm, under a matcher.

`python -m bench.networks` walks all of both.
"""

import pytest
import torch

from bench.networks import apart, batch_norms, build, hooked, randomise, tensors, things_set
from pydistill.nn import BNStatMatcher, freeze

pytest.importorskip("timm", reason="timm is not installed: pip install --no-deps timm torchvision")

# with the side of the images that it takes
TORCHVISION = {}
TIMM = {}
CASES = [("torchvision", *case) for case in TORCHVISION.items()] + [("timm", *case) for case in TIMM.items()]


def results(net, x, matcher=None):
    """Outputs, loss, and the gradient of both in the images; with the random numbers that every call is given."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_()
    y, loss = hooked(net, x) if matcher is None else (net(x), matcher.loss())
    total = sum(tensor.square().sum() for tensor in tensors(y)) + loss
    return y, loss, torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize(("library", "name", "side"), CASES, ids=lambda case: str(case))
def test_logits_losses_and_gradients_are_the_plain_networks(library, name, side):
    torch.use_deterministic_algorithms(False)  # some networks resize by operators that are not
    net = build(library, name, num_classes=10).double()
    randomise(net)
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    plain, drawn = results(net, x), None
    net.train()  # what draws numbers then, draws the same
    for bn in batch_norms(net):
        bn.eval()
    drawn = results(net, x)
    before = things_set(net)
    with BNStatMatcher(net) as matcher:
        for found, truth in zip(results(net, x, matcher), drawn, strict=True):
            assert apart(found, truth) < 1e-9
        net.eval()
        for found, truth in zip(results(net, x, matcher), plain, strict=True):
            assert apart(found, truth) < 1e-9
        assert all(how.partition(":")[0] in ("fused", "alone", "plain") for how in matcher.report().values())
    net.train()
    for bn in batch_norms(net):
        bn.eval()
    assert things_set(net) == before
    net.eval()
    again = results(net, x)
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(plain), strict=True))
    with torch.no_grad():
        assert apart(freeze(net)(x), plain[0]) < 1e-9
