"""What is set on a network, hooked to it or made of it: matched, frozen or accelerated, it computes the same."""

import copy
import functools
import io
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from bench.networks import apart, things_set
from pydistill.nn import BNStatMatcher, accelerate, freeze, frozen_convolutions
from tests.nn.inputs import images
from tests.nn.test_bn_stat_matcher import hooked, ready, residual_net


def thrice(module, plain=None):
    plain = plain or type(module).forward
    return lambda x: 3 * plain(module, x)


SETTERS = {
    "lambda": lambda module: setattr(module, "forward", thrice(module)),
    "partial": lambda module: setattr(module, "forward", functools.partial(type(module).forward, module)),
    "method": lambda module: setattr(
        module, "forward", types.MethodType(lambda self, x: type(self).forward(self, x) - 1, module)
    ),
    "around": lambda module: setattr(module, "forward", (lambda plain: lambda x: 3 * plain(x))(module.forward)),
}


@pytest.mark.parametrize("when", ["before", "while attached"])
@pytest.mark.parametrize("name", ["", "3", "3.bn1", "3.relu", "0", "1", "2"])
@pytest.mark.parametrize("how", SETTERS)
def test_a_forward_set_on_an_instance_stays(how, name, when):
    net = ready(residual_net)
    twin = copy.deepcopy(net)  # a function that is set holds its module: copies are made before
    x = images()
    if when == "before":
        for each in (net, twin):
            SETTERS[how](each.get_submodule(name))
    before = things_set(net)
    matcher = BNStatMatcher(net)
    if when != "before":
        for each in (net, twin):
            SETTERS[how](each.get_submodule(name))
    found = net(x), matcher.loss()
    truth = hooked(twin, x)
    for a, b in zip(found, truth[:2], strict=True):
        torch.testing.assert_close(a, b)
    if when == "before":
        forwards = matcher.report()
        assert forwards["3.bn1"].startswith("fused") == (name not in ("3", "3.bn1", "3.relu"))
        assert forwards["1"].startswith("fused") == (name not in ("", "1", "2"))
        assert forwards["1"].startswith("plain") == (name == "1")
    matcher.remove()
    assert things_set(net) == before or when != "before"
    assert "forward" in vars(net.get_submodule(name))
    assert torch.equal(net(x), twin(x))


@pytest.mark.parametrize("when", ["before", "while attached"])
def test_hooks_of_every_kind_are_called_as_before(when):
    called, x = [], images()

    def attach(net):
        block = net[3]
        block.relu.register_forward_hook(lambda module, args, out: out * 2)
        block.bn2.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        block.bn2.register_forward_hook(lambda module, args, out: called.append("bn2"))
        net[0].register_full_backward_hook(lambda *_: called.append("conv, backward"))
        net[1].register_forward_hook(lambda module, args, kwargs, out: out - 1, with_kwargs=True)

    net = ready(residual_net)
    twin = copy.deepcopy(net)
    attach(twin)
    truth = hooked(twin, x)
    told = list(called)
    called.clear()
    if when == "before":
        attach(net)
    before = things_set(net)
    with BNStatMatcher(net) as matcher:
        if when != "before":
            net(x)
            attach(net)
            before = None
        y, loss = net(x), matcher.loss()
        gradient = torch.autograd.grad(y.square().sum() + loss, x)[0]
        for a, b in zip((y, loss, gradient), truth, strict=True):
            torch.testing.assert_close(a, b)
    assert called == told == ["bn2", "conv, backward"]
    assert before is None or things_set(net) == before


def test_global_hooks_are_called_as_before():
    net, x, called = ready(residual_net), images(), []
    twin = copy.deepcopy(net)
    with BNStatMatcher(net):
        hook = torch_module.register_module_forward_hook(
            lambda module, args, out: called.append(type(module)) or (out + 1 if type(module) is nn.ReLU else None)
        )
        try:
            found = net(x)
            names, called = called, []
            torch.testing.assert_close(found, twin(x))
        finally:
            hook.remove()
    assert names == called


def test_what_replaces_parts_of_torch_is_seen(monkeypatch):
    net, x = ready(residual_net), images()
    twin = copy.deepcopy(net)
    with BNStatMatcher(net):
        monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x.tanh())
        torch.testing.assert_close(net(x), twin(x))


def test_compiled_and_scripted_parts():
    net, x = ready(residual_net), images()
    with pytest.raises(ValueError, match="model: itself is compiled; attach the matcher before"):
        BNStatMatcher(torch.compile(net, backend="eager"))
    inner = nn.Sequential(nn.Identity(), torch.compile(copy.deepcopy(net), backend="eager"))
    with pytest.raises(ValueError, match="model: 1 is compiled"):
        BNStatMatcher(inner)
    scripted = nn.Sequential(nn.BatchNorm2d(3), torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))).eval()
    with pytest.raises(ValueError, match=r"model: 1\.0 is a scripted BatchNorm"):
        BNStatMatcher(scripted)
    twin = copy.deepcopy(net)
    with BNStatMatcher(net) as matcher:
        compiled = torch.compile(net, backend="aot_eager")
        for _ in range(2):
            y, loss = compiled(x), matcher.loss()
            for a, b in zip((y, loss), hooked(twin, x)[:2], strict=True):
                torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: torch.save(net, io.BytesIO()), freeze])
def test_a_copy_with_a_matcher_on_it_is_refused(copied):
    net = ready(residual_net)
    with BNStatMatcher(net):
        with pytest.raises(TypeError, match=r"model: a BNStatMatcher is attached to it.*remove\(\)"):
            copied(net)
        shallow = copy.copy(net)
        with pytest.raises(RuntimeError, match="model: expected the one that the BNStatMatcher was attached to"):
            shallow(images())
    copied(net)


def test_calls_of_parts_and_calls_that_fail_are_not_mixed_with_whole_ones():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = residual_net(), nn.BatchNorm2d(9)

        def forward(self, x):
            y = self.head(self.features(x))
            if y.isnan().any():
                raise FloatingPointError
            return y

    net, x = ready(Net), images()
    truth = hooked(net, x)[1]
    with BNStatMatcher(net) as matcher:
        net.features(x)
        with pytest.raises(RuntimeError, match="loss: expected a forward of the model"):
            matcher.loss()
        net(x)
        net.features(x)
        torch.testing.assert_close(matcher.loss(), truth)
        with pytest.raises(FloatingPointError):
            net(x * torch.nan)
        with pytest.raises(RuntimeError, match="loss: expected a forward of the model"):
            matcher.loss()
        net(x)
        torch.testing.assert_close(matcher.loss(), truth)


def test_checkpointed_parts_count_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = residual_net()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.features, x, use_reentrant=False)

    net, x = ready(Net), images()
    truth = hooked(net.features, x)
    with BNStatMatcher(net) as matcher:
        y, loss = net(x), matcher.loss()
        found = y, loss, torch.autograd.grad(y.square().sum() + loss, x)[0]
        for a, b in zip((*found, matcher.loss()), (*truth, truth[1]), strict=True):
            torch.testing.assert_close(a, b)


def test_everything_is_given_back_after_an_exception():
    net = ready(residual_net)
    net[3].bn1.register_forward_hook(lambda *_: None)
    before = things_set(net)

    def left_by_an_error():
        with BNStatMatcher(net):
            net[3].bn2.register_forward_hook(lambda *_: None).remove()
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        left_by_an_error()
    assert things_set(net) == before
    assert all(p.requires_grad for p in net.parameters())


class Conv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def mobile():
    """Convolutions that `freeze` leaves to torch, each for a different reason, and one that it replaces."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU6(), nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.Conv2d(32, 32, 1)),
        *(Conv(32, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 1, 1)),
        *(nn.Conv2d(32, 32, 3, 1, 1), nn.MaxPool2d(2)),
    ).double()
    net[5].forward = types.MethodType(lambda self, x: F.conv2d(x, self.weight.abs(), self.bias, 1, 1), net[5])
    net[6]._conv_forward = types.MethodType(lambda self, x, weight, bias: F.conv2d(x, -weight, bias, 1, 1), net[6])
    net[9].forward = types.MethodType(lambda self, x: F.avg_pool2d(x, 2), net[9])
    torch.nn.utils.spectral_norm(net[7])
    return net


def test_freeze_replaces_what_is_plain_and_says_what_it_does_not(caplog):
    net, x = mobile().eval(), images()
    called = []
    net[8].register_forward_hook(lambda module, args, out: called.append(type(module).__name__) or 2 * out)
    with caplog.at_level("INFO", "pydistill"):
        frozen = freeze(net)
    assert "freeze: 1 of 8 convolutions run on frozen filters (" in caplog.text
    assert frozen_convolutions(frozen) == frozen_convolutions(net)
    assert frozen_convolutions(frozen) == {
        "0": "it has fewer than 32 channels",
        "2": "it has groups",
        "3": "it is 1x1 with stride 1 and padding 0",
        "4": "it is a Conv, which may compute something else than Conv2d",
        "5": "its forward was set on the instance",
        "6": "its _conv_forward was set on the instance",
        "7": "its weight is no parameter, but made anew in each call",
        "8": "frozen",
    }
    torch.testing.assert_close(frozen(x), net(x))
    assert called == ["FrozenConv2d", "Conv2d"]
    caplog.clear()
    freeze(net[:4])
    assert [(record.levelname, record.message[:40]) for record in caplog.records] == [
        ("WARNING", "freeze: 0 of 3 convolutions run on froze")
    ]
    caplog.clear()
    with caplog.at_level("INFO", "pydistill"):
        freeze(net[:4].to("meta"))
    assert [record.message for record in caplog.records] == [
        "freeze: on meta all 3 convolutions run as torch's own, channels-last"
    ]


class Taps(nn.Module):
    """Looks between the layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), nn.AvgPool2d(2))

    def forward(self, x):
        seen = []
        for layer in self.features:
            x = layer(x)
            seen.append(x.mean())
        return torch.stack(seen)


class Backwards(nn.Sequential):
    def forward(self, x):
        for layer in reversed(self):
            x = layer(x)
        return x


def convnet(kind=nn.Sequential):
    return kind(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.ReLU(), nn.AvgPool2d(2))


def patched(name):
    net = convnet()
    SETTERS["around"](net[int(name)] if name else net)
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), r"found no GroupNorm\(C, C\)"),
        (Taps, r"features is taken apart by Taps\.forward"),
        (lambda: convnet(Backwards), "Backwards is no plain nn.Sequential"),
        (lambda: patched(""), "Sequential is no plain nn.Sequential"),
        (lambda: patched("1"), "found no GroupNorm"),
    ],
)
def test_a_network_that_accelerate_refuses_is_left_as_it_was(make, message):
    net, x = make().double(), images()
    before, truth = (things_set(net), [type(m) for m in net.modules()]), net(x)
    with pytest.raises(ValueError, match=message):
        accelerate(net)
    assert (things_set(net), [type(m) for m in net.modules()]) == before
    assert torch.equal(net(x), truth)


def test_accelerate_leaves_the_rest_where_a_hook_would_be_lost():
    net = nn.Sequential(convnet(), convnet())
    net[1][2].register_forward_hook(lambda *_: None)
    before = things_set(net), [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=r"module: ReLU.* has hooks, which replacing it would lose"):
        accelerate(net)
    assert (things_set(net), [type(m) for m in net.modules()]) == before


@pytest.mark.parametrize("name", ["0", "2", "3"])
def test_accelerate_calls_what_was_set_on_a_layer(name):
    net, x = patched(name).double(), images()
    truth = net(x)
    accelerate(net)
    assert apart(net(x), truth) < 1e-12
