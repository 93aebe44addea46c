"""The networks of the cross-architecture tables: same structure, values and second derivatives, and they train."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import pydistill
from pydistill.nn import MLP, NETS, VGG11, AlexNet, ConvNet, SmallResNet18, ViT, make
from pydistill.trajectory.recognition import trains_at_once

WITHOUT_CONVNET = [name for name in NETS if name != "convnet"]


def norm(x, p, name):
    """Instance norm, or batch norm in training mode where the state has running means; none without weights."""
    if f"{name}.running_mean" in p:
        return F.batch_norm(x, None, None, p[f"{name}.weight"], p[f"{name}.bias"], training=True)
    return F.group_norm(x, x.shape[1], p[f"{name}.weight"], p[f"{name}.bias"])


def plain_mlp(p, x):
    x = F.relu(F.linear(x.flatten(1), p["fc_1.weight"], p["fc_1.bias"]))
    return F.linear(F.relu(F.linear(x, p["fc_2.weight"], p["fc_2.bias"])), p["fc_3.weight"], p["fc_3.bias"])


def plain_alexnet(p, x):
    layers = zip((0, 3, 6, 8, 10), (4 if x.shape[1] == 1 else 2, 2, 1, 1, 1), (1, 1, 0, 0, 1), strict=True)
    for i, padding, pool in layers:
        x = F.relu(F.conv2d(x, p[f"features.{i}.weight"], p[f"features.{i}.bias"], padding=padding))
        x = F.max_pool2d(x, 2) if pool else x
    return F.linear(x.flatten(1), p["fc.weight"], p["fc.bias"])


def plain_vgg11(p, x):
    one = x.shape[1] == 1
    for i in (0, 4, 8, 11, 15, 18, 22, 25):
        x = F.conv2d(x, p[f"features.{i}.weight"], p[f"features.{i}.bias"], padding=3 if one and i == 0 else 1)
        x = F.relu(norm(x, p, f"features.{i + 1}"))
        x = F.max_pool2d(x, 2) if i not in (8, 15, 22) else x
    return F.linear(x.flatten(1), p["classifier.weight"], p["classifier.bias"])


def plain_resnet18(p, x, average_pool=False):
    def convolution(x, name, stride=1):
        weight = p[f"{name}.weight"]
        return F.conv2d(x, weight, stride=1 if average_pool else stride, padding=weight.shape[-1] // 2)

    def halved(x, stride):
        return F.avg_pool2d(x, 2) if average_pool and stride == 2 else x

    x = F.relu(norm(convolution(x, "conv1"), p, "bn1"))
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = halved(F.relu(norm(convolution(x, f"{at}.conv1", stride), p, f"{at}.bn1")), stride)
            out = norm(convolution(out, f"{at}.conv2"), p, f"{at}.bn2")
            if stride == 2:
                x = halved(convolution(x, f"{at}.shortcut.0", stride), stride)
                x = norm(x, p, f"{at}.shortcut.{2 if average_pool else 1}")
            x = F.relu(out + x)
    x = x if average_pool else F.avg_pool2d(x, 4)
    return F.linear(x.flatten(1), p["classifier.weight"], p["classifier.bias"])


def plain_vit(p, x, heads=4):
    width, channels, patch, _ = p["patches.weight"].shape
    B, _, H, W = x.shape
    cut = x.reshape(B, channels, H // patch, patch, W // patch, patch).permute(0, 2, 4, 1, 3, 5)
    cut = cut.reshape(B, -1, channels * patch**2)
    x = cut @ p["patches.weight"].reshape(width, -1).T + p["patches.bias"] + p["positions"]
    for i in range(4):
        at = f"blocks.{i}"

        def linear(x, name, at=at):
            return x @ p[f"{at}.{name}.weight"].T + p[f"{at}.{name}.bias"]

        def layer_norm(x, name, at=at):
            return F.layer_norm(x, (width,), p[f"{at}.{name}.weight"], p[f"{at}.{name}.bias"])

        outs = []
        q, k, v = linear(layer_norm(x, "norm1"), "qkv").chunk(3, -1)
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            scores = torch.einsum("bnd,bmd->bnm", q[..., part], k[..., part]) / (width // heads) ** 0.5
            outs.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(outs, -1), "proj")
        x = x + linear(F.gelu(linear(layer_norm(x, "norm2"), "mlp.0")), "mlp.2")
    x = F.layer_norm(x, (width,), p["norm.weight"], p["norm.bias"]).mean(1)
    return x @ p["classifier.weight"].T + p["classifier.bias"]


PLAIN = {
    "vit": plain_vit,
    "mlp": plain_mlp,
    "alexnet": plain_alexnet,
    "vgg11": plain_vgg11,
    "resnet18": plain_resnet18,
    "resnet18_ap": lambda p, x: plain_resnet18(p, x, average_pool=True),
}


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("mlp", (3, 10, 32), 3072 * 128 + 128 + 128 * 128 + 128 + 1290),
        ("mlp", (1, 10, 28), 118_282),
        ("alexnet", (3, 10, 32), 1_872_202),
        ("alexnet", (1, 10, 28), 1_865_802),
        ("alexnet", (3, 200, 64), 1_872_202 + 190 * (192 * 4 * 4 + 1)),
        ("vgg11", (3, 10, 32), 9_231_114),
        ("vgg11", (1, 10, 28), 9_229_962),
        ("vgg11", (3, 200, 64), 9_231_114 + 190 * 513),
        ("resnet18", (3, 10, 32), 11_173_962),
        ("resnet18", (1, 10, 28), 11_172_810),
        ("resnet18", (3, 200, 64), 11_173_962 + 190 * 513),
        ("resnet18_ap", (3, 10, 32), 11_250_762),
        ("resnet18_ap", (1, 10, 28), 11_213_770),
        ("vit", (3, 10, 32), 48 * 64 + 64 + 64 * 64 + 4 * (12 * 64 * 64 + 13 * 64) + 128 + 650),
        ("convnet", (3, 10, 32), 320_010),
        ("convnet", (3, 200, 64), 857_160),
    ],
)
def test_they_have_the_repositories_numbers_of_parameters(name, options, parameters):
    net = make(name, *options)
    assert sum(p.numel() for p in net.parameters()) == parameters
    channels, classes, size = options
    x = torch.randn(2, channels, size, size)
    assert net(x).shape == (2, classes)
    assert net.embed(x).shape == (2, net.classifier.in_features)


@pytest.mark.parametrize("name", WITHOUT_CONVNET)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_they_compute_what_the_plain_networks_do_to_the_second_derivative(name, channels, size):
    net = make(name, channels, 10, size).double()
    state = dict(net.named_parameters())
    for parameter in state.values():  # affine parameters too should differ from 1 and 0
        nn.init.normal_(parameter, parameter.mean().item(), 0.05)
    results = []
    for function in (net, lambda x: PLAIN[name](state, x)):
        x = torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        loss = F.cross_entropy(function(x), torch.tensor([3, 7]))
        grads = torch.autograd.grad(loss, list(state.values()), create_graph=True)
        results.append([loss, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), x)])
        assert all(g.abs().sum() > 0 for g in (grads[0], grads[-1], results[-1][-1]))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet18_ap"])
def test_with_batch_norm_too(name):
    net = make(name, 3, 10, 32, norm="batch")
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(net(x), PLAIN[name](net.state_dict(), x))
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in make(name, 3, 10, 32).parameters())
    assert not torch.equal(net.eval()(x), net.train()(x))


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "resnet18", "resnet18_ap"])
def test_other_norms(name):
    kinds = {}
    for kind in ("instance", "batch", "none"):
        net = make(name, 3, 10, 32, norm=kind)
        kinds[kind] = {type(m).__name__ for m in net.modules()} & {"InstanceNormReLUAvgPool", "BatchNorm2d"}
        net(torch.randn(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert kinds == {"instance": {"InstanceNormReLUAvgPool"}, "batch": {"BatchNorm2d"}, "none": set()}


@pytest.mark.parametrize("name", WITHOUT_CONVNET)
def test_a_student_trains_as_by_torch(name):
    net = make(name, 3, 10, 32)
    theta0 = parameters_to_vector(net.parameters()).detach()
    images, labels = torch.randn(5, 3, 32, 32), torch.arange(5)
    assert not trains_at_once(net, images)
    found = pydistill.train_students(
        net,
        theta0[None],
        images,
        labels,
        epochs=1,
        lr=0.01,
        batch_size=3,
        momentum=0.9,
        generator=torch.Generator().manual_seed(2),
    )
    vector_to_parameters(theta0.clone(), net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for index in torch.randperm(5, generator=torch.Generator().manual_seed(2)).split(3):
        optimizer.zero_grad()
        F.cross_entropy(net(images[index]), labels[index]).backward()
        optimizer.step()
    trained = parameters_to_vector(net.parameters()).detach()
    assert (trained - theta0).norm() > 1e-3 * theta0.norm()
    assert (found.theta[0] - trained).norm() <= 1e-5 * (trained - theta0).norm()


@pytest.mark.parametrize("name", WITHOUT_CONVNET)
def test_the_exact_trajectory_gradient_is_the_one_of_the_whole_graph(name):
    net = make(name, 1, 10, 28).double()
    theta0 = parameters_to_vector(net.parameters()).detach()
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    grads = []
    for mode in ("exact", "full"):
        images = x.clone().requires_grad_()
        lr = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
        theta = pydistill.unroll(net, theta0, images, torch.arange(3), lr, steps=2, mode=mode)
        grads.append(torch.autograd.grad((theta - theta0).square().sum(), (images, lr)))
        assert all(g.abs().max() > 0 for g in grads[-1])
    for exact, full in zip(*grads, strict=True):
        torch.testing.assert_close(exact, full, rtol=1e-8, atol=1e-12)


def test_make_builds_each_by_name():
    kinds = {"convnet": ConvNet, "mlp": MLP, "alexnet": AlexNet, "vgg11": VGG11}
    kinds |= {"resnet18": SmallResNet18, "resnet18_ap": SmallResNet18, "vit": ViT}
    assert {name: type(make(name, 3, 7, 32)) for name in NETS} == kinds
    assert make("convnet", 3, 10, 16, width=8, depth=2, norm="none").classifier.in_features == 8 * 4 * 4
    assert make("mlp", 3, 10, (9, 8), width=5).fc_1.weight.shape == (5, 216)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "vgg"},
            r"name: expected one of convnet, mlp, alexnet, vgg11, resnet18, resnet18_ap, vit, got 'vgg'",
        ),
        ({"name": "vgg11", "width": 3}, "width: expected none, vgg11 has no such option, got 3"),
        ({"name": "mlp", "depth": 3}, "depth: expected none, mlp has no such option, got 3"),
        ({"name": "mlp", "norm": "batch"}, "norm: expected none, mlp has no such option"),
        ({"name": "mlp", "width": 0}, "width: expected at least 1, got 0"),
        ({"name": "resnet18", "norm": "layer"}, "norm: expected 'instance', 'batch' or 'none', got 'layer'"),
        ({"name": "alexnet", "norm": "instancenorm"}, "norm: expected 'none', 'instance' or 'batch', got"),
        ({"name": "vgg11", "norm": "group"}, "norm: expected 'instance', 'batch' or 'none', got 'group'"),
        ({"name": "vgg11", "image_size": 28}, r"image_size: too small for VGG11, got \(28, 28\)"),
        ({"name": "resnet18", "image_size": 24}, "image_size: too small for SmallResNet18"),
        ({"name": "alexnet", "image_size": 7}, "image_size: too small for AlexNet"),
        ({"name": "mlp", "image_size": 0}, "image_size: expected at least 1, got 0"),
        ({"name": "alexnet", "channels": 0}, "channels: expected at least 1, got 0"),
        ({"name": "resnet18", "num_classes": 0}, "num_classes: expected at least 1, got 0"),
    ],
)
def test_make_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**{"channels": 3, "num_classes": 10, "image_size": 32, **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, r"patch_size: expected a divisor of image_size \(32, 32\), got 5"),
        ({"heads": 3}, "heads: expected a divisor of width 64, got 3"),
        ({"last_heads": 5}, "last_heads: expected a divisor of width 64, got 5"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
    ],
)
def test_vit_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        ViT(3, 10, **options)


def test_vit_shows_each_blocks_queries_and_keys():
    net = ViT(1, 10, width=24, depth=3, image_size=(8, 12), heads=2, last_heads=3)
    x = torch.randn(5, 1, 8, 12)
    maps = []
    for block in net.blocks:
        block.qkv.register_forward_hook(lambda module, inputs, output: maps.append(output))
    net(x)
    for layer, heads in enumerate((2, 2, 3)):
        q, k = net.attention(x, layer)
        assert q.shape == k.shape == (5, heads, 6, 24 // heads)
        for found, part in ((q, maps[layer][..., :24]), (k, maps[layer][..., 24:48])):
            torch.testing.assert_close(found.transpose(1, 2).flatten(2), part)
    assert torch.equal(net.attention(x)[0], q)
    with pytest.raises(ValueError, match="layer: expected one of 3 blocks, got 3"):
        net.attention(x, 3)


@pytest.mark.parametrize("name", NETS)
def test_images_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match=r"images: expected \[N, 3, 32, 32\], got \[2, 3, 33, 32\]"):
        make(name, 3, 10, 32)(torch.randn(2, 3, 33, 32))
