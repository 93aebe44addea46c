"""Frozen copies of networks: what is replaced, that nothing else changes, and that stale filters are never used."""

import copy
import io

import pytest
import torch
from torch import nn

from pydistill.nn import FrozenConv2d, freeze
from pydistill.ops import frozen_filters


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 7, 2, 3, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 40, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(40, 64, 3, 2, 1),
        nn.Conv2d(64, 520, 3, 2, 1),
        nn.Conv2d(520, 64, 1),
        nn.Conv2d(64, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 8, 3, padding=1),
        nn.Conv2d(8, 32, 1),
    ).to(dtype)


def gradient(net, x):
    x = x.detach().requires_grad_()
    y = net(x)
    return y.detach(), torch.autograd.grad(y.sin().sum(), x)[0]


def test_only_what_pays_is_replaced_and_values_stay():
    net = network().train()
    before = copy.deepcopy(net.state_dict())
    frozen = freeze(net)
    assert [i for i, module in enumerate(frozen) if type(module) is FrozenConv2d] == [0, 3, 5]
    assert net.training
    assert not frozen.training
    assert all(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert list(frozen.state_dict()) == list(before)
    x = torch.randn(2, 3, 21, 18, dtype=torch.float64)
    for found, truth in zip(gradient(frozen, x), gradient(net.eval(), x), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    assert list(frozen.state_dict()) == list(before)  # filters are made by now, and are no part of it
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
        assert torch.equal(value, frozen.state_dict()[key])


def test_filters_follow_the_weight():
    net = network(torch.float32)
    frozen, x = freeze(net), torch.randn(1, 3, 16, 16)
    old = frozen(x)
    made = frozen[3].filters()
    assert frozen[3].filters() is made
    net[3].weight.data.mul_(2)
    frozen.load_state_dict(net.state_dict())
    assert not torch.allclose(frozen(x), old)
    torch.testing.assert_close(frozen(x), net.eval()(x), rtol=1e-4, atol=1e-5)
    for dtype in (torch.float64, torch.bfloat16):
        frozen.to(dtype)
        assert frozen(x.to(dtype)).dtype == dtype
        assert frozen[3].filters().weight.dtype == dtype
    with pytest.raises(ValueError, match=r"x: expected torch.bfloat16 as the weight, got torch.float32"):
        frozen(x)


def test_a_weight_rounded_on_the_way_is_seen():
    conv = freeze(network(torch.float32))[3]
    x = torch.randn(1, 32, 6, 6)
    exact = conv(x)
    for _ in range(3):  # the memory may come back to the same address
        rounded = conv.bfloat16().float()(x)
    assert not torch.equal(rounded, exact)
    truth = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(rounded, truth, rtol=1e-4, atol=1e-5)


def test_copies_and_files_do_not_carry_the_filters():
    conv = freeze(network(torch.float32))[3]
    x = torch.randn(1, 32, 6, 6)
    y = conv(x)
    for other in (copy.deepcopy(conv), torch.load(_saved(conv), weights_only=False)):
        assert other._made is None
        assert torch.equal(other(x), y)


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_autocast_casts_as_torch_does():
    net = network(torch.float32)
    frozen, x = freeze(net).eval(), torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, truth = frozen[0](x), net[0](x)
    assert found.dtype == truth.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), truth.float(), rtol=2e-2, atol=2e-2)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [(32, 32, 3, 1, 1), (32, 32, 3, 2, 1), (3, 32, 7, 2, 3), (8, 8, 3, 1, 1)])
def test_dtypes_under_autocast_are_the_plain_module_s(weight, layer):
    """Autocast casts every input but float64, to its own dtype; what does not fit the weight is refused."""
    net = nn.Conv2d(*layer).to(weight).requires_grad_(False)
    frozen = freeze(net)
    for half in (torch.bfloat16, torch.float16):
        for given in DTYPES:
            x = torch.randn(1, layer[0], 8, 8, dtype=given)
            with torch.autocast("cpu", half):
                if (given == torch.float64) != (weight == torch.float64):
                    with pytest.raises((ValueError, RuntimeError)):
                        net(x)
                    with pytest.raises((ValueError, RuntimeError)):
                        frozen(x)
                    continue
                found, truth = frozen(x), net(x)
            assert found.dtype == truth.dtype, (half, given)
            torch.testing.assert_close(found.float(), truth.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_library", [True, False])
def test_other_convolutions_under_autocast(dtype, with_library, monkeypatch):
    """In half precision they round like torch's, whether or not processor and build have such convolutions."""
    if not with_library:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    net = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(12, 4, 1, stride=2, bias=False))
    frozen, x = freeze(net), torch.randn(2, 8, 9, 9, requires_grad=True)
    assert frozen.state_dict().keys() == net.state_dict().keys()
    with torch.autocast("cpu", dtype):
        found = frozen(x)
    assert found.dtype == dtype
    (gradient,) = torch.autograd.grad(found.float().square().sum(), x)
    truth = net(x)
    (expected,) = torch.autograd.grad(truth.square().sum(), x)
    for half, whole in ((found, truth), (gradient, expected)):
        assert (half.float() - whole).norm() <= 0.02 * whole.norm()
    torch.testing.assert_close(frozen(x), truth)


def test_compiled_and_in_inference_mode():
    net = network(torch.float32)
    frozen, x = freeze(net), torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        first = frozen(x)
        torch.testing.assert_close(freeze(net)(x), first)
    truth = gradient(frozen, x)
    torch.testing.assert_close(first, truth[0])
    for found, expected in zip(gradient(torch.compile(frozen, backend="aot_eager"), x), truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pooling_is_replaced_where_it_is_the_same():
    plain = [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 2)), nn.MaxPool2d(3, (1, 1), [1, 1])]

    class Own(nn.MaxPool2d):
        pass

    others = [
        nn.MaxPool2d((2, 3)),
        nn.MaxPool2d(3, (2, 1)),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, return_indices=True),
        nn.MaxPool2d(16),
        Own(2),
    ]
    frozen = freeze(nn.ModuleList(plain + others))
    kinds = [type(module).__name__ for module in frozen]
    assert kinds == ["_MaxPool2d"] * len(plain) + ["MaxPool2d"] * (len(others) - 1) + ["Own"]
    x = torch.randn(2, 20, 11, 10)
    for module, truth in zip(frozen, plain, strict=False):
        for found, expected in zip(gradient(module, x), gradient(truth, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert torch.equal(module(x), truth(x))
        assert torch.equal(module(x[0]), truth(x[0]))  # of one image
        assert torch.equal(module((9 * x).long()), truth((9 * x).long()))
        with torch.autocast("cpu", torch.bfloat16):
            for given in (x, x.bfloat16()):
                assert module(given).dtype == truth(given).dtype


def test_refusals():
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got int"):
        freeze(3)
    frozen = freeze(network(torch.float32))
    frozen(torch.randn(1, 3, 16, 16))
    frozen.requires_grad_()
    with pytest.raises(ValueError, match="weight: expected frozen filters, got a parameter that requires a gradient"):
        frozen(torch.randn(1, 3, 16, 16))


def test_filters_of_the_stem_are_those_of_cells():
    weight = torch.randn(5, 3, 7, 7)
    assert frozen_filters(weight).forward.shape == (36, 1, 12, 16)
    assert frozen_filters(weight).adjoint.shape == (36, 1, 5, 16)
