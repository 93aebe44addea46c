"""Low-rank factors against changed weights, the projector's file, and the messages."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydistill.labels import LoRAConv, LoRALinear, Projector, add_lora, feature_distance, lora_logits, open_clip_encoder
from pydistill.nn import ViT


def factors(M=3, B=5, d=7, C=4, r=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, d), (C, d), (M, r, d), (M, C, r))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def changed_heads(x, W, A, Bm, scale):
    return torch.stack([x @ (W + scale * b @ a).T for a, b in zip(A, Bm, strict=True)])


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_logits_are_those_of_changed_heads(reduction):
    inputs = factors()
    found, truth = lora_logits(*inputs, 0.3, reduction=reduction), changed_heads(*inputs, 0.3)
    truth = truth.mean(0) if reduction == "mean" else truth
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(truth.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradgradcheck(lambda *t: lora_logits(*t, 0.3, reduction=reduction), factors(2, 2, 3, 2, 1))


def test_a_single_teacher_needs_no_dimension():
    x, W, A, Bm = factors(1)
    alone, one = lora_logits(x, W, A[0], Bm[0], 2.0), lora_logits(x, W, A, Bm, 2.0)[0]
    torch.testing.assert_close(alone, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: [1.0]}, TypeError, "x: expected a floating tensor, got list"),
        ({0: torch.ones(5, 7).int()}, TypeError, "x: expected a floating tensor, got torch.int32"),
        ({1: torch.ones(4, 7)}, TypeError, "W: expected torch.float64 as x, got torch.float32"),
        ({1: torch.ones(4, 6).double()}, ValueError, r"W: expected \[C, 7\], got \[4, 6\]"),
        ({2: torch.ones(7).double()}, ValueError, r"A: expected \[M, r, 7\] or \[r, 7\], got \[7\]"),
        ({3: torch.ones(4, 2).double()}, ValueError, r"Bm: expected \[3, 4, 2\], got \[4, 2\]"),
        ({4: float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ],
)
def test_bad_input_is_named(change, error, message):
    inputs = [*factors(), 1.0]
    with pytest.raises(error, match=message):
        lora_logits(*(change.get(i, value) for i, value in enumerate(inputs)))


def test_layers_are_their_changed_weights():
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1).double()
    found = LoRAConv(conv, 2, 0.5)
    assert torch.equal(found(x), conv(x))  # B starts at zero
    nn.init.normal_(found.B)
    change = 0.5 * torch.einsum("or,rikl->oikl", found.B[:, :, 0, 0], found.A)
    torch.testing.assert_close(found(x), F.conv2d(x, conv.weight + change, conv.bias, 2, 1))
    linear = nn.Linear(8, 4).double()
    found = LoRALinear(linear, 3, 2.0)
    nn.init.normal_(found.B)
    torch.testing.assert_close(found(x), F.linear(x, linear.weight + 2 * found.B @ found.A, linear.bias))
    assert {name for name, p in found.named_parameters() if p.requires_grad} == {"A", "B"}
    with pytest.raises(ValueError, match="base: expected a convolution in one group that pads by zeros, got 3 groups"):
        LoRAConv(nn.Conv2d(3, 3, 3, groups=3), 1)
    with pytest.raises(ValueError, match="rank: expected a whole number of at least 1, got 0"):
        LoRALinear(nn.Linear(2, 2), 0)


def test_every_layer_of_an_encoder_has_factors():
    encoder = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))
    found = add_lora(encoder, 1)
    kinds = {name: type(m) for name, m in found.named_modules() if isinstance(m, LoRALinear)}
    assert set(kinds) == {"0", "1.linear1", "1.linear2", "1.self_attn.out_proj"}
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(found(x), encoder.eval()(x))
    assert all(p.requires_grad for p in encoder.parameters())  # the given one is not touched
    factors = {name: p for name, p in found.named_parameters() if p.requires_grad}
    assert len(factors) == 8
    for p in factors.values():
        nn.init.normal_(p, std=0.3)
    slow, gradients = found(x), torch.autograd.grad(found(x).square().sum(), factors.values())
    assert all(g.norm() > 0 for g in gradients)
    with torch.no_grad():  # where torch takes its own fused layer
        torch.testing.assert_close(found(x), slow)
    assert not torch.allclose(slow, encoder(x), atol=0.1)
    with pytest.raises(ValueError, match="encoder: expected a linear layer or a convolution inside, got ReLU"):
        add_lora(nn.ReLU(), 1)


class Pooled(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.vit = ViT(1, 2, width=width, depth=2, image_size=8, heads=3)

    def forward(self, x):
        return self.vit.embed(x)


def projector(teachers=2):
    torch.manual_seed(3)
    return Projector(Pooled(), torch.randn(4, 12), rank=2, head_rank=3, teachers=teachers)


def test_it_starts_at_the_class_embeddings_and_learns_each_teacher():
    found, x = projector(), torch.randn(16, 1, 8, 8)
    cosines = F.normalize(Pooled.forward(found.encoder, x), dim=1) @ F.normalize(found.W, dim=1).T
    torch.testing.assert_close(found(x), 10 * cosines)
    targets, labels = torch.randn(2, 16, 4), torch.arange(16) % 4
    optimizer = torch.optim.Adam(found.factors().values(), 0.02)
    frozen = {name: t.clone() for name, t in found.state_dict().items() if name not in found.factors()}
    first = found.loss(x, targets, labels, 0.1).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = found.train().loss(x, targets, labels, 0.1)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    assert all(torch.equal(found.state_dict()[name], t) for name, t in frozen.items())
    torch.testing.assert_close(found(x), found.logits(x).mean(0))
    by_hand = F.mse_loss(found.logits(x), targets)
    by_hand = by_hand + 0.1 * sum(F.cross_entropy(z, labels) for z in found.logits(x)) / 2
    torch.testing.assert_close(found.loss(x, targets, labels, 0.1), by_hand)
    with pytest.raises(ValueError, match=r"targets: expected \[2, 16, 4\], got \[1, 16, 4\]"):
        found.loss(x, targets[:1], labels)


def test_its_file_is_it_and_its_bytes_are_counted(tmp_path):
    found, path, x = projector(), tmp_path / "p.safetensors", torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for p in found.factors().values():
            nn.init.normal_(p)
    written = found.save(path, note="x")
    assert written == path.stat().st_size
    numbers = sum(p.numel() for p in found.factors().values()) + 4 * 12
    assert found.num_bytes == 4 * numbers
    assert found.num_bytes < written < found.num_bytes + 4000  # names and configuration
    torch.manual_seed(3)
    read = Projector.load(path, Pooled())
    assert torch.equal(read(x), found.eval()(x))
    assert found.save(path, torch.float16) < written - 2 * numbers + 100
    torch.manual_seed(3)
    torch.testing.assert_close(Projector.load(path, Pooled())(x), found(x), rtol=0.05, atol=0.5)
    with pytest.raises(ValueError, match=r"expected factors of this encoder's layers; they are of another encoder"):
        Projector.load(path, nn.Sequential(nn.Flatten(), nn.Linear(64, 12)))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="it is truncated or no safetensors file"):
        Projector.load(path, Pooled())


def test_what_a_projector_refuses():
    with pytest.raises(ValueError, match=r"class_embeddings: expected finite \[C, d\], got \[3\]"):
        Projector(Pooled(), torch.randn(3))
    with pytest.raises(ValueError, match="teachers: expected at least 1, got 0"):
        Projector(Pooled(), torch.randn(4, 12), teachers=0)
    with pytest.raises(ValueError, match=r"encoder: expected features \[B, 5\] as class_embeddings has, got \[1, 12\]"):
        Projector(Pooled(), torch.randn(4, 5))(torch.randn(1, 1, 8, 8))


def test_feature_distance_is_none_on_what_survives_and_falls_by_its_gradient():
    encoder = Pooled().requires_grad_(False)
    assert feature_distance(encoder, torch.ones(2, 1, 8, 8), 4) < 1e-10
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    before = feature_distance(encoder, x, (4, 4))
    (gradient,) = torch.autograd.grad(before, x)
    assert feature_distance(encoder, x - 1e-3 * gradient / gradient.norm(), (4, 4)) < before


def test_an_open_clip_model_is_its_image_tower_and_its_prompts():
    class Model(nn.Module):
        visual = nn.Flatten()

        def encode_text(self, tokens):
            return torch.tensor([[float(len(t))] for t in tokens])

    encoder, embeddings = open_clip_encoder(Model(), lambda prompts: prompts, ["cat", "horse"])
    assert encoder is Model.visual
    assert embeddings.tolist() == [[len("a photo of a cat")], [len("a photo of a horse")]]
