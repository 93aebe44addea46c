"""ConvNet's structure, and accelerate on other networks."""

import copy

import pytest
import torch
from torch import nn

import pydistill
from pydistill.nn import ConvNet, InstanceNormReLUAvgPool, accelerate


class TheirConvNet(nn.Module):
    """The structure in the method repositories, in plain torch."""

    def __init__(self, channels=3, classes=10, width=16, depth=3, size=16):
        super().__init__()
        layers = []
        for block in range(depth):
            pad = 3 if channels == 1 and block == 0 else 1
            layers += [
                nn.Conv2d(channels if block == 0 else width, width, 3, padding=pad),
                nn.GroupNorm(width, width, affine=True),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(kernel_size=2, stride=2),
            ]
        self.features = nn.Sequential(*layers)
        after = (size + (4 if channels == 1 else 0)) // 2**depth
        self.classifier = nn.Linear(width * after**2, classes)

    def forward(self, x):
        out = self.features(x)
        return self.classifier(out.view(out.size(0), -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_convnet_is_theirs(channels):
    theirs = TheirConvNet(channels)
    ours = ConvNet(channels, 10, width=16, depth=3, image_size=16)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, channels, 16, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_convnet_has_the_published_size():
    assert sum(p.numel() for p in ConvNet(3, 10).parameters()) == 320_010
    assert sum(p.numel() for p in ConvNet(3, 200, depth=4, image_size=64).parameters()) == 857_160


def test_accelerate_keeps_parameters_and_results():
    theirs = TheirConvNet().double()
    ours = copy.deepcopy(theirs)
    parameters = list(ours.parameters())
    assert accelerate(ours) is ours
    assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert sum(isinstance(m, InstanceNormReLUAvgPool) for m in ours.modules()) == 3
    assert not any(isinstance(m, (nn.GroupNorm, nn.ReLU, nn.AvgPool2d)) for m in ours.modules())

    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    results = []
    for net in (theirs, ours):  # the drop-in use: an eager loop with create_graph
        X = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(net(X), torch.arange(4))
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        results.append([loss, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), X)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_accelerate_takes_partial_blocks_and_leaves_others():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(8, 8),
        nn.AvgPool2d(2, ceil_mode=True),  # rounds up: not ours
        nn.GroupNorm(4, 8),  # pairs of channels: not ours
        nn.GroupNorm(8, 8, eps=1e-3),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    plain = copy.deepcopy(net)
    accelerate(net)
    kinds = " ".join(type(m).__name__ for m in net)
    fused = "InstanceNormReLUAvgPool"
    assert kinds == f"Conv2d {fused} AvgPool2d GroupNorm {fused} Identity MaxPool2d"
    x = torch.randn(2, 3, 11, 11)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ["relu", "leakyrelu"])
def test_accelerate_leaves_what_has_the_operators_already(act):
    net = ConvNet(3, 4, width=8, depth=2, image_size=8, act=act)
    before = [type(m) for m in net.modules()]
    assert accelerate(accelerate(net)) is net
    assert [type(m) for m in net.modules()] == before
    theirs = TheirConvNet()
    before = [type(m) for m in accelerate(theirs).modules()]
    assert [type(m) for m in accelerate(theirs).modules()] == before


def test_accelerate_refuses():
    with pytest.raises(ValueError, match=r"found no GroupNorm\(C, C\).*it has no norms"):
        accelerate(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"found no GroupNorm\(C, C\).*its norms are BatchNorm2d\(8, "):
        accelerate(ConvNet(3, 4, width=8, depth=2, image_size=8, norm="batch"))
    with pytest.raises(TypeError, match=r"module: expected an nn\.Module, got int"):
        accelerate(3)
    hooked = TheirConvNet()
    hooked.features[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks, which replacing it would lose"):
        accelerate(hooked)


@pytest.mark.parametrize("norm", ["instance", "group", "batch", "layer", "none"])
@pytest.mark.parametrize("pool", ["avg", "max", "none"])
def test_variants_run(norm, pool):
    net = ConvNet(3, 4, width=8, depth=2, image_size=(9, 8), norm=norm, act="leakyrelu", pool=pool)
    assert net(torch.randn(2, 3, 9, 8)).shape == (2, 4)
    assert net.embed(torch.randn(2, 3, 9, 8)).shape == (2, net.classifier.in_features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "instancenorm"}, "norm: expected one of instance, group, batch, layer, none, got 'instancenorm'"),
        ({"act": "swish"}, "act: expected 'relu', 'leakyrelu' or 'sigmoid'"),
        ({"pool": "avgpooling"}, "pool: expected 'avg', 'max' or 'none'"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"depth": 4, "image_size": 8}, r"depth: 4 blocks leave nothing of a \(8, 8\) image"),
    ],
)
def test_bad_convnet(options, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(3, 10, **options)
    with pytest.raises(ValueError, match=r"images: expected \[N, 3, 32, 32\], got \[2, 3, 16, 16\]"):
        pydistill.nn.ConvNet(3, 10, width=8)(torch.randn(2, 3, 16, 16))
