"""The smallest network of each of timm's source files and torchvision's families with BatchNorm, under a matcher.

`python -m bench.networks` walks all of both, including those with large images or many parameters.
"""

import pytest
import torch

from bench.networks import apart, batch_norms, build, hooked, randomise, tensors, things_set
from pydistill.nn import BNStatMatcher, freeze
from tests.matrices import sample
from tests.peers import peer

peer("timm")

# with the side of the images that it takes
TORCHVISION = {
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "resnet18": 64,
    "shufflenet_v2_x0_5": 64,
}
TIMM = {
    "test_byobnet": 64,
    "cpubone_nano": 64,
    "cs3darknet_focus_s": 64,
    "cspnext_tiny": 64,
    "densenet121": 64,
    "dla46x_c": 64,
    "dpn48b": 64,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "test_efficientnet": 64,
    "efficientvim_m1": 64,
    "efficientvit_b0": 64,
    "efficientvit_m0": 64,
    "fasternet_t0": 64,
    "fastvit_t8": 64,
    "ghostnet_050": 64,
    "hardcorenas_b": 64,
    "hgnetv2_b0": 64,
    "iformer_t": 64,
    "inception_next_atto": 64,
    "lcnetv2_small": 64,
    "levit_128s": 224,
    "mobilenetv3_small_050": 64,
    "mobilevit_xxs": 64,
    "regnetx_002": 64,
    "repghostnet_050": 64,
    "repvit_m1": 64,
    "resnest14d": 64,
    "test_resnet": 64,
    "resnetv2_18": 64,
    "rexnet_100": 64,
    "legacy_seresnet18": 64,
    "shvit_s1": 64,
    "skresnet18": 64,
    "starnet_s050": 64,
    "swiftformer_xs": 64,
    "tiny_vit_5m_224": 64,
    "visformer_tiny": 224,
    "ese_vovnet19b_slim_dw": 64,
    "xcit_nano_12_p8_224": 64,
}
CASES = [("torchvision", *case) for case in TORCHVISION.items()] + [("timm", *case) for case in TIMM.items()]
FEW = [
    ("torchvision", "resnet18", 64),
    *(("timm", name, 64) for name in ("test_byobnet", "test_resnet", "lcnetv2_small")),
]


def results(net, x, matcher=None):
    """Outputs and loss, and the gradient of both in the images where it takes one."""
    torch.manual_seed(5)  # networks in training mode draw numbers: the same in every call
    y, loss = hooked(net, x) if matcher is None else (net(x), matcher.loss())
    if not x.requires_grad:
        return y, loss
    return y, loss, torch.autograd.grad(sum(tensor.square().sum() for tensor in tensors(y)) + loss, x)[0]


@pytest.mark.parametrize(("library", "name", "side"), sample(CASES, FEW), ids=lambda case: str(case))
def test_logits_losses_and_gradients_are_the_plain_networks(library, name, side):
    torch.use_deterministic_algorithms(False)  # some networks resize by operators that are not
    net = build(library, name, num_classes=10).double()
    randomise(net)
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    net.train()
    for bn in batch_norms(net):
        bn.eval()
    agree(net, x)
    frozen = freeze(net)  # in training mode, in which no network keeps tensors that cannot be copied
    net.eval()
    plain = agree(net, x.requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(tensors(net(x)), tensors(plain), strict=True))
    with torch.no_grad():
        assert apart(frozen(x), plain) < 1e-9


def agree(net, x):
    """Compare with and without a matcher, and what is set before and after; returns the output."""
    plain = results(net, x)
    before = things_set(net)  # some networks keep what they compute
    with BNStatMatcher(net) as matcher:
        for found, truth in zip(results(net, x, matcher), plain, strict=True):
            assert apart(found, truth) < 1e-9
        assert all(how.partition(":")[0] in ("fused", "alone", "plain") for how in matcher.report().values())
    assert things_set(net) == before
    return plain[0]
