"""BNStatMatcher on models of several shapes, against hooks in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydistill import reference
from pydistill.nn import BNStatMatcher, ConvNet


class Block(nn.Module):
    """A residual block in torchvision's layout: one ReLU module at two places, the sum in place."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Odd(nn.Module):
    """BatchNorms that must not be fused: their output is used twice, or by something other than a ReLU."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm2d(3) for _ in range(4))
        self.bn5 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x):
        a = self.bn1(x)
        b = F.relu(a) + a
        c = self.bn2(b).tanh()
        d = self.relu(c) + self.bn3(c)
        x = x.clone()
        x += self.bn4(d)  # in place, changing what is used below
        return F.relu(x) + x + torch.relu(self.bn5(d) + 0.5)


class Dynamic(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x):
        return F.relu(self.bn(x)) if x.sum() > 0 else self.bn(x)


class Remembering(Dynamic):
    def forward(self, x):
        self.seen = self.bn(x)
        return F.relu(self.seen)


class Broadcast(Dynamic):
    def forward(self, x):
        return F.relu(x[:1] + self.bn(x))


def residual_net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), Block(6, 6, 1), Block(6, 9, 2)
    )


class Stem(nn.Module):
    """Like the start of torchvision's ResNets; then poolings that are not part of a pass."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(6) for _ in range(3))
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.wide, self.flat = nn.MaxPool2d(2, 1, dilation=2), nn.MaxPool2d((2, 1), 1)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv(x))))
        x = self.wide(self.relu(self.bn2(x)))
        y = self.relu(self.bn3(x))
        return self.flat(y) + y[:, :, 1:]


MODELS = {
    "stem": (Stem, (2, 3, 13, 12), ["bn1", "bn2", "bn3"]),
    "residual": (residual_net, (2, 3, 9, 9), ["1", "3.bn1", "3.bn2", "4.bn1", "4.bn2"]),
    "odd": (Odd, (2, 3, 5, 5), []),
    "dynamic": (Dynamic, (5, 4), []),
    "remembering": (Remembering, (5, 4), []),
    "broadcast": (Broadcast, (5, 4), ["bn"]),
    "3d": (lambda: nn.Sequential(nn.BatchNorm3d(4), nn.ReLU()), (2, 4, 3, 2, 3), ["0"]),
    "convnet": (lambda: ConvNet(3, 10, 8, 2, 16, norm="batch"), (2, 3, 16, 16), None),
}


def ready(make):
    model = make().double().eval()
    for bn in model.modules():
        if isinstance(bn, nn.modules.batchnorm._BatchNorm):
            for values in (bn.running_mean, bn.weight.data, bn.bias.data):
                values.normal_()
            bn.running_var.uniform_(0.5, 2)
    return model


def hooked(model, x, weights=None, first=1.0, **options):
    """Output, loss and the gradient in x of both, the repositories' way: forward hooks on every BatchNorm."""
    bns = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    weights = dict(zip(bns, weights or [1.0] * len(bns), strict=True))
    weights[bns[0]] *= first
    terms = []

    def hook(bn, inputs, output):
        terms.append(weights[bn] * reference.bn_stat_match(inputs[0], bn.running_mean, bn.running_var, **options))

    handles = [bn.register_forward_hook(hook) for bn in bns]
    y = model(x)
    for handle in handles:
        handle.remove()
    return y, sum(terms), torch.autograd.grad(y.square().sum() + sum(terms), x)[0]


@pytest.mark.parametrize("options", [{}, {"first": 10.0, "w_mean": 0.5, "w_var": 2.0, "kind": "sq"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_against_hooks(name, options):
    make, shape, fused = MODELS[name]
    model = ready(make)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    truth = hooked(model, x, **options)
    matcher = BNStatMatcher(model, **options)
    if fused is not None:
        assert sorted(matcher.fused) == fused
    for _ in range(2):  # of the last forward, not of both
        y = model(x)
        found = y, matcher.loss(), torch.autograd.grad(y.square().sum() + matcher.loss(), x)[0]
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b)
    matcher.remove()
    for a, b in zip(hooked(model, x, **options), truth, strict=True):
        assert torch.equal(a, b)


def test_unfused_and_layer_weights():
    model = ready(residual_net)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    weights = [0.0, 1.0, 2.0, 0.5, 3.0, 1.5]
    truth = hooked(model, x, weights, 10.0)
    for fuse in (False, True):
        with BNStatMatcher(model, layer_weights=weights, first=10.0, fuse=fuse) as matcher:
            assert len(matcher.fused) == 5 * fuse
            y = model(x)
            for a, b in zip((y, matcher.loss()), truth[:2], strict=True):
                torch.testing.assert_close(a, b)


def test_statistics_that_match_give_zero_and_no_nan():
    """The norm of zero has gradient zero; the other BatchNorm still has its gradient."""
    net = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, affine=False)).eval()
    net[0].running_mean.fill_(0.5)
    net[0].running_var.zero_()
    x = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    with BNStatMatcher(net) as matcher:
        net(x)
        loss = matcher.loss()
        (gradient,) = torch.autograd.grad(loss, x)
    truth = reference.bn_stat_match(torch.zeros(2, 3, 4, 4), net[1].running_mean, net[1].running_var)
    torch.testing.assert_close(loss, truth, rtol=0, atol=1e-4)
    assert gradient.isfinite().all()


def test_a_batch_norm_that_is_called_twice_counts_twice():
    bn = nn.BatchNorm1d(4)
    model = nn.Sequential(bn, nn.Tanh(), bn, nn.ReLU()).eval()
    x = torch.randn(6, 4, requires_grad=True)
    truth = hooked(model, x)
    with BNStatMatcher(model) as matcher:
        assert matcher.layers == ("0",)
        y = model(x)
        for a, b in zip((y, matcher.loss()), truth[:2], strict=True):
            torch.testing.assert_close(a, b)


def test_hooks_are_called_as_before():
    model = ready(residual_net)
    called = []
    model[3].register_forward_hook(lambda *_: called.append("block"))
    model[3].bn1.register_forward_hook(lambda *_: called.append("bn1"))
    model[2].register_forward_pre_hook(lambda *_: called.append("relu"))
    with BNStatMatcher(model) as matcher:
        assert sorted(matcher.fused) == ["3.bn2", "4.bn1", "4.bn2"]
        model(torch.randn(2, 3, 9, 9, dtype=torch.float64))
    assert called == ["relu", "bn1", "block"]


def test_remove_restores_everything():
    model = ready(residual_net)
    model[0].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    matcher = BNStatMatcher(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == state.keys()
    model(torch.randn(2, 3, 9, 9, dtype=torch.float64))
    matcher.remove()
    matcher.remove()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model._forward_pre_hooks
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with pytest.raises(RuntimeError, match="loss: expected a forward"):
        matcher.loss()
    BNStatMatcher(model).remove()


def test_moving_the_model_afterwards():
    """Statistics and parameters are looked up when they are used."""
    model = ready(residual_net)
    x = torch.randn(2, 3, 9, 9)
    with BNStatMatcher(model) as matcher:
        model.float()
        y = model(x)
        loss = matcher.loss()
    truth = hooked(model, x.requires_grad_())
    torch.testing.assert_close(y, truth[0])
    torch.testing.assert_close(loss, truth[1])


@pytest.mark.parametrize(
    ("error", "message", "make", "options"),
    [
        (TypeError, "model: expected a torch.nn.Module, got int", lambda: 3, {}),
        (ValueError, "model: expected at least one BatchNorm", lambda: nn.Linear(2, 2), {}),
        (ValueError, "model: 1: bn: expected a BatchNorm in evaluation mode", lambda: residual_net().train(), {}),
        (
            ValueError,
            "model: 0: bn: expected running statistics",
            lambda: nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)).eval(),
            {},
        ),
        (ValueError, "layer_weights: expected 6, .* got 2", lambda: residual_net().eval(), {"layer_weights": [1, 2]}),
        (
            ValueError,
            "kind: expected 'norm' or 'sq', got 'l1'",
            lambda: residual_net().eval(),
            {"kind": "l1"},
        ),
    ],
)
def test_bad_input(error, message, make, options):
    model = make()
    with pytest.raises(error, match=message):
        BNStatMatcher(model, **options)
    if isinstance(model, nn.Module):  # nothing was touched
        assert all(p.requires_grad for p in model.parameters())
        assert not any("forward" in vars(module) for module in model.modules())


def test_no_loss_before_a_forward_and_no_second_matcher():
    model = residual_net().eval()
    with BNStatMatcher(model) as matcher:
        with pytest.raises(RuntimeError, match="loss: expected a forward"):
            matcher.loss()
        with pytest.raises(ValueError, match="remove that matcher first"):
            BNStatMatcher(model)
        model.train()
        with pytest.raises(ValueError, match="got one in training mode"):
            model(torch.randn(2, 3, 9, 9))
