"""ResNet-18 and ResNet-50: torchvision's keys, shapes and counts as written down here, and the variants."""

import pytest
import torch

from pydistill.nn import ResNet18, ResNet50

BN = (("weight", 1), ("bias", 1), ("running_mean", 1), ("running_var", 1), ("num_batches_tracked", 0))


def published(blocks: tuple[int, ...], bottleneck: bool) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's state_dict, in its order, from its naming rules."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name, after, before, k):
        found[f"{name}.weight"] = (after, before, k, k)

    def bn(name, channels):
        for part, rank in BN:
            found[f"{name}.{part}"] = (channels,) * rank

    conv("conv1", 64, 3, 7)
    bn("bn1", 64)
    before = 64
    for i, count in enumerate(blocks):
        inner = 64 * 2**i
        after = 4 * inner if bottleneck else inner
        for j in range(count):
            at = f"layer{i + 1}.{j}"
            shapes = [(inner, before, 1), (inner, inner, 3), (after, inner, 1)]
            for n, (a, b, k) in enumerate(shapes if bottleneck else [(inner, before, 3), (inner, inner, 3)], 1):
                conv(f"{at}.conv{n}", a, b, k)
                bn(f"{at}.bn{n}", a)
            if before != after:
                conv(f"{at}.downsample.0", after, before, 1)
                bn(f"{at}.downsample.1", after)
            before = after
    found["fc.weight"], found["fc.bias"] = (1000, before), (1000,)
    return found


# some of the published keys, literally: the rules above are checked against them
KNOWN = {
    ResNet18: (
        *(("layer1.0.conv1.weight", (64, 64, 3, 3)), ("layer1.1.bn2.running_var", (64,))),
        *(("layer2.0.downsample.0.weight", (128, 64, 1, 1)), ("layer4.0.downsample.1.num_batches_tracked", ())),
        *(("layer4.1.conv2.weight", (512, 512, 3, 3)), ("fc.weight", (1000, 512))),
    ),
    ResNet50: (
        *(("layer1.0.downsample.0.weight", (256, 64, 1, 1)), ("layer1.2.conv3.weight", (256, 64, 1, 1))),
        *(("layer3.5.conv2.weight", (256, 256, 3, 3)), ("layer4.0.conv1.weight", (512, 1024, 1, 1))),
        *(("layer4.2.bn3.bias", (2048,)), ("fc.weight", (1000, 2048))),
    ),
}


@pytest.mark.parametrize(
    ("net", "blocks", "bottleneck", "parameters", "keys"),
    [(ResNet18, (2, 2, 2, 2), False, 11_689_512, 122), (ResNet50, (3, 4, 6, 3), True, 25_557_032, 320)],
)
def test_keys_shapes_and_counts_are_torchvisions(net, blocks, bottleneck, parameters, keys):
    with torch.device("meta"):
        model = net()
    wanted = published(blocks, bottleneck)
    assert [(k, tuple(v.shape)) for k, v in model.state_dict().items()] == list(wanted.items())
    assert len(wanted) == keys
    for name, shape in KNOWN[net]:
        assert wanted[name] == shape
    assert sum(p.numel() for p in model.parameters()) == parameters
    checkpoint = {k: torch.empty(shape, device="meta") for k, shape in wanted.items()}
    model.load_state_dict(checkpoint, strict=True, assign=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*layer4.1"):
        model.load_state_dict({k: v for k, v in checkpoint.items() if "layer4.1" not in k}, strict=True, assign=True)


@pytest.mark.parametrize("net", [ResNet18, ResNet50])
@pytest.mark.parametrize(("stem", "side", "last"), [("imagenet", 64, 2), ("cifar", 32, 4)])
def test_stems_and_widths(net, stem, side, last):
    model = net(7, channels=1, stem=stem, width=4).eval()
    seen = []
    model.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert model(torch.randn(2, 1, side, side)).shape == (2, 7)
    expansion = 4 if net is ResNet50 else 1
    assert seen == [(2, 32 * expansion, last, last)]
    assert model.conv1.weight.shape == ((4, 1, 7, 7) if stem == "imagenet" else (4, 1, 3, 3))


def test_the_blocks_add_what_they_skip():
    model = ResNet18(5, width=4, stem="cifar").double().eval()
    x = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    block = model.layer1[0]
    torch.nn.init.zeros_(block.bn2.weight)
    torch.testing.assert_close(block(x), x.relu())
    wide = model.layer2[0]
    torch.nn.init.zeros_(wide.bn2.weight)
    torch.testing.assert_close(wide(x), wide.downsample(x).relu())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"channels": 0}, "channels: expected at least 1, got 0"),
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"stem": "tiny"}, "stem: expected 'imagenet' or 'cifar', got 'tiny'"),
    ],
)
def test_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        ResNet18(**options)


def test_torchscript():
    net = ResNet18(5, stem="cifar", width=4).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))
