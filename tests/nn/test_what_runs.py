"""Forwards that do something other than they seem to: under a matcher they compute the same, fused where proven."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from bench.networks import things_set
from pydistill.nn import BNStatMatcher
from tests.nn.inputs import images
from tests.nn.test_bn_stat_matcher import Block, hooked, ready, residual_net

SEEN = []


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x)) + 1


class Plain(nn.Module):
    """A convolution, a BatchNorm and a ReLU, for the forwards below."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.factor, self.kept, self.options = 1.0, [], types.SimpleNamespace(twice=False)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class OptionalShortcut(Plain):
    def forward(self, x, shortcut=None):
        if shortcut is None:
            shortcut = x
        out = self.bn(self.conv(x))
        out += shortcut
        return self.relu(out)


class OptionalNone(Plain):
    def forward(self, x, shortcut=None):
        out = self.bn(self.conv(x))
        if shortcut is not None:
            out = out + shortcut
        return self.relu(out)


class AsksForTypes(Plain):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y if isinstance(y, torch.Tensor) else -y


class ChangesTheInput(Plain):
    def forward(self, x):
        x = x * 1.0
        y = self.bn(x)
        x += 1
        return self.relu(y) + x


class ChangesTheInputInAChild(Plain):
    def __init__(self):
        super().__init__()
        self.gate = nn.ReLU(inplace=True)

    def forward(self, x):
        x = x * 1.0
        y = self.bn(x)
        shortcut = self.gate(x)
        y += shortcut
        return self.relu(y)


class ChangesTheShortcut(Plain):
    def forward(self, x):
        shortcut = x * 1.0
        y = self.bn(self.conv(x)) + shortcut
        shortcut.zero_()
        return self.relu(y) + shortcut


class Precise(Plain):
    """The sum in place stays in the precision of what it is added to."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += x.cumsum(1, dtype=torch.float64)
        return self.relu(y)


class ChangesUnderAnotherName(Plain):
    """What is added in place is visible under both names."""

    def forward(self, x):
        x = other = x * 1.0
        x += 1
        x *= 2
        return self.relu(self.bn(self.conv(other)))


class Narrow(Plain):
    def forward(self, x):
        return self.relu(x[:1] + self.bn(self.conv(x)))


class WithoutGradient(Plain):
    def forward(self, x):
        with torch.no_grad():
            y = self.relu(self.bn(self.conv(x)))
        return y + x


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class ReversesTheGradient(Plain):
    def forward(self, x):
        return self.relu(self.bn(Reversed.apply(self.conv(x))))


class KeepsInAList(Plain):
    def forward(self, x):
        x = self.bn(self.conv(x))
        self.kept.append(x.detach())
        return self.relu(x)


class KeepsOutside(Plain):
    def forward(self, x):
        SEEN.append(len(SEEN))
        return self.relu(self.bn(self.conv(x)))


class Counts(Plain):
    def forward(self, x):
        self.factor = self.factor + 1
        return self.relu(self.bn(self.conv(x))) * self.factor


class Draws(Plain):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * torch.rand(()).item()


class AsksElsewhere(Plain):
    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.relu(x) if not self.options.twice else self.relu(2 * x)


class FlattensThePool(Plain):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x)))).view(x.size(0), -1)


class Several(Plain):
    """One BatchNorm and one ReLU at two places."""

    def forward(self, x):
        return self.relu(self.bn(self.conv(self.relu(self.bn(x)))))


class Loops(Plain):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.relu(self.bn(x))


FUSED = {
    *(OptionalShortcut, OptionalNone, ChangesUnderAnotherName, Precise, Narrow, FlattensThePool, Several, Loops, Plain),
}
UNUSUAL = [
    *(AsksForTypes, ChangesTheInput, ChangesTheInputInAChild, WithoutGradient, ReversesTheGradient, KeepsInAList),
    *(KeepsOutside, Counts, Draws, AsksElsewhere, ChangesTheShortcut),
]


def same_twice(make, x=None, change=None, calls=2):
    """A network and its plain twin, called equally often; the first under a matcher, and changed meanwhile."""
    net = make()
    twin, x = copy.deepcopy(net), images() if x is None else x
    before = things_set(net)
    with BNStatMatcher(net) as matcher:
        if change is not None:
            change(net)
            change(twin)
            before = None
        for _ in range(calls):
            results = []
            for each in (net, twin):
                torch.manual_seed(3)
                if each is net:
                    y, loss = net(x), matcher.loss()
                    gradient = torch.autograd.grad(y.square().sum() + loss, x)[0] if x.requires_grad else x
                    results.append((y, loss, gradient))
                else:
                    results.append(hooked(twin, x) if x.requires_grad else (twin(x), loss, x))
            for found, truth in zip(*results, strict=True):
                assert found.dtype == truth.dtype
                torch.testing.assert_close(found, truth)
            assert results[0][0].stride() == results[1][0].stride()
        report = matcher.report()
        assert list(report) == list(matcher.layers)
    assert before is None or things_set(net) == before
    torch.manual_seed(3)
    found = net(x)
    torch.manual_seed(3)
    assert torch.equal(found, twin(x))
    return report


@pytest.mark.parametrize("kind", sorted(FUSED, key=lambda kind: kind.__name__))
def test_what_is_proven_is_fused(kind):
    report = same_twice(lambda: ready(kind))
    assert any(how.startswith("fused") for how in report.values()), report


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_is_not_proven_runs_as_it_is(kind):
    if kind in (ChangesTheInput, ChangesTheInputInAChild):  # which torch does not differentiate
        report = same_twice(lambda: ready(kind), images().detach())
    elif kind not in (KeepsInAList, KeepsOutside, Counts):
        report = same_twice(lambda: ready(kind))
    else:  # what it does elsewhere happens once a call
        net, twin, x = ready(kind), ready(kind), images()
        twin.load_state_dict(net.state_dict())
        SEEN.clear()
        with BNStatMatcher(net) as matcher:
            report = matcher.report()
            assert (net.kept, SEEN, net.factor) == ([], [], 1.0)
            found = [net(x) for _ in range(2)]
            assert (len(net.kept) == 2) == (kind is KeepsInAList)
            assert (len(SEEN) == 2) == (kind is KeepsOutside)
        for y in found:
            torch.testing.assert_close(y, twin(x))
    assert all(how.startswith("alone: ") and len(how) > 20 for how in report.values()), report


def test_branches_are_taken_anew_for_other_arguments_and_attributes():
    net, x = ready(OptionalNone), images()
    twin = copy.deepcopy(net)
    with BNStatMatcher(net):
        for arguments in ((x,), (x, x * 2), (x, None), (x, x)):
            torch.testing.assert_close(net(*arguments), twin(*arguments))
        torch.testing.assert_close(net(x, shortcut=x.abs()), twin(x, x.abs()))
        for each in (net, twin):
            each.bn = nn.BatchNorm2d(3).double().eval()
        torch.testing.assert_close(net(x), twin(x))
        for each in (net, twin):
            each.relu = nn.Tanh()
        torch.testing.assert_close(net(x), twin(x))


def test_subclasses_parametrizations_and_old_weight_norms():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    def make():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 3, 1), NormAct(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()]
        net = ready(lambda: nn.Sequential(*layers))
        parametrize.register_parametrization(net[3], "weight", Twice())
        return net

    report = same_twice(make)
    assert report["1"].startswith("plain: it is a NormAct")
    assert report["3"].startswith("plain: it is a ParametrizedBatchNorm2d")
    assert report["5"] == "fused: relu"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_are_those_of_the_plain_network(layout):
    x = images(memory_format=layout)
    same_twice(lambda: ready(residual_net), x)
    if layout is torch.contiguous_format:
        same_twice(lambda: ready(FlattensThePool), x)


def test_under_autocast():
    net, x = ready(residual_net).float(), images(torch.float32)
    twin = copy.deepcopy(net)
    with BNStatMatcher(net) as matcher, torch.autocast("cpu", torch.bfloat16):
        y, loss = net(x), matcher.loss()
        truth = hooked(twin, x)
    assert y.dtype == truth[0].dtype
    assert (y.float() - truth[0].float()).norm() <= 0.02 * truth[0].float().norm()
    torch.testing.assert_close(loss, truth[1].to(loss.dtype), rtol=0.02, atol=0.0)


def test_the_logger_says_what_runs_plain(caplog):
    with caplog.at_level("INFO", "pydistill"):
        net = nn.Sequential(NormAct(3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).eval()
        BNStatMatcher(net).remove()
    assert (
        "of 3 BatchNorms 1 run fused with what follows, 1 alone, 1 as they are (plain: it is a NormAct" in caplog.text
    )


def test_a_sum_in_place_keeps_its_precision():
    report = same_twice(lambda: ready(Precise).float(), images(torch.float32))
    assert report == {"bn": "fused: add, relu"}


def test_a_block_of_ours_is_fused_in_both_branches():
    report = same_twice(lambda: ready(lambda: nn.Sequential(Block(3, 3, 1), Block(3, 4, 2))))
    assert sum(how.startswith("fused") for how in report.values()) == 4
