"""Matching, nn, labels, selection and augmentation on the devices, against the CPU.

Not collected by itself: `test_stand_in.py` runs this file in a process that has the devices.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pydistill
from pydistill import augment, matching, ops, select
from pydistill.data import Dataset
from pydistill.evaluate import evaluate
from pydistill.labels import LoRALinear, SoftLabelStore
from pydistill.nn import BNStatMatcher, ConvNet, accelerate, freeze
from pydistill.trajectory import FlatModule
from tests.matrices import sample
from tests.stand_in.counts import counts

To = Callable[[Any], Any]

G = torch.Generator().manual_seed(0)


def randn(*size: int) -> Tensor:
    return torch.randn(size, generator=G)


torch.manual_seed(0)
NET = ConvNet(3, 4, width=4, depth=2, image_size=8)
BATCH_NORM = ConvNet(3, 4, width=4, depth=1, image_size=8, norm="batch").eval()
ENCODER = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
THETA, X, Y = FlatModule(NET).parameters(), randn(6, 3, 8, 8), torch.arange(6) % 4
BIG, ROWS, SOFT = randn(4, 3, 16, 16), randn(20, 4), randn(6, 4)
MIXED = augment.MultiCrop(8, mix="mixup").draw(BIG.shape, torch.Generator().manual_seed(1))
AUGMENT = augment.DiffAugment("color_crop_cutout_flip_scale_rotate")
CROPS = augment.MultiCrop(8, mix="cutmix", roll=2, mean=(0.5,) * 3, std=(0.2,) * 3)


def differentiated(to: To, call: Callable[[Tensor], Any], x: Tensor = X) -> Any:
    x = to(x).clone().requires_grad_()
    out = call(x)
    return out, torch.autograd.grad(sum(t.square().sum() for t in tree_leaves(out)), x)


def matched(to: To) -> Any:
    net = to(BATCH_NORM)
    with BNStatMatcher(net) as matcher:
        return differentiated(to, lambda x: (net(x), matcher.loss()))


def convolved(to: To) -> Any:
    net = freeze(to(ConvNet(3, 4, width=4, depth=2, image_size=8, norm="batch").eval().requires_grad_(False)))
    return differentiated(to, lambda x: net(x).shape[0] * x)


def real_and_synthetic(to: To, call: Callable[..., Tensor]) -> Any:
    return differentiated(to, lambda x: call([to(X + 1)], [x], to(Y), to(Y)))


CALLS: dict[str, Callable[[To], Any]] = {
    "class_gradients": lambda to: differentiated(
        to, lambda x: pydistill.matching.class_gradients(to(NET), to(THETA), x, to(Y))
    ),
    "class_gradients, even": lambda to: differentiated(
        to, lambda x: pydistill.matching.class_gradients(to(NET), to(THETA), x[:4], to(Y[:4]))
    ),
    "features": lambda to: differentiated(to, lambda x: matching.features(to(NET), to(THETA), x).embedding),
    "attention_match": lambda to: real_and_synthetic(to, pydistill.attention_match),
    "class_mean_match": lambda to: differentiated(
        to, lambda x: pydistill.class_mean_match(to(SOFT + 1), x, to(Y), to(Y)), SOFT
    ),
    "gradient_match": lambda to: differentiated(
        to, lambda x: pydistill.gradient_match(grads_real=[to(ROWS + 1)], grads_syn=[x]), ROWS
    ),
    "krr_loss": lambda to: differentiated(
        to, lambda x: pydistill.krr_loss(to(ROWS), x, y_real=to(ROWS), y_syn=to(SOFT)), SOFT
    ),
    "krr_loss, primal": lambda to: differentiated(
        to,
        lambda x: pydistill.krr_loss(to(ROWS), x, y_real=to(ROWS), y_syn=to(ROWS), form="primal", bias=True),
        ROWS,
    ),
    "mmd": lambda to: differentiated(to, lambda x: pydistill.matching.mmd(to(ROWS), x), SOFT),
    "attention_map_divergence": lambda to: differentiated(
        to, lambda q: pydistill.attention_map_divergence(q, to(X + 1), to(X), to(2 * X))
    ),
    "attention_nmi": lambda to: pydistill.divergence.attention_nmi(to(ROWS[None, None]), to(SOFT[None, None])),
    "contrastive_ce": lambda to: differentiated(
        to, lambda x: pydistill.divergence.contrastive_ce(x, to(ROWS + 1), scale=2.0, symmetric=True), ROWS
    ),
    "contrastive_ce, itself": lambda to: differentiated(
        to, lambda x: pydistill.divergence.contrastive_ce(x, None, scale=2.0, labels=to(Y), exclude_self=True), SOFT
    ),
    "kd_divergence": lambda to: differentiated(
        to, lambda x: pydistill.kd_divergence(x, to(SOFT + 1), kind="ofa", labels=to(Y), ce_weight=0.5), SOFT
    ),
    "sparse_label_loss": lambda to: differentiated(
        to, lambda x: ops.sparse_label_loss(x, to(Y[:, None]), to(SOFT[:, :1].sigmoid())), SOFT
    ),
    "conv2d": lambda to: differentiated(to, lambda x: ops.conv2d(x, to(randn_like(4, 3, 3, 3)))),
    "diff_augment": lambda to: differentiated(
        to,
        lambda x: augment.DiffAugment("color_crop_cutout_flip_scale_rotate")(
            x,
            augment.DiffAugment("color_crop_cutout_flip_scale_rotate").draw(x.shape, torch.Generator().manual_seed(3)),
        ),
    ),
    "MultiCrop": lambda to: differentiated(
        to, lambda x: CROPS(x, CROPS.draw(x.shape, torch.Generator().manual_seed(3))), BIG
    ),
    "mix_labels": lambda to: augment.mix_labels(to(Y[:4]), to(MIXED), 8, num_classes=4),
    "BNStatMatcher": matched,
    "freeze": convolved,
    "accelerate": lambda to: differentiated(to, lambda x: accelerate(plain(to))(x)),
    "LoRALinear": lambda to: differentiated(to, lambda x: lora(to)(x), ROWS),
    "kmeans": lambda to: select.kmeans(to(ROWS), 3),
    "sample_scores": lambda to: list(select.sample_scores(to(SOFT), to(Y)).values()),
    "best_crops": lambda to: select.best_crops(to(NET), to(X), to(Y)),
    "patch_importance": lambda to: select.patch_importance(to(NET), to(X), to(Y), 2),
    "herding": lambda to: select.herding(to(ROWS), 2, to(torch.zeros(20, dtype=torch.int64))),
    "graph_cut_greedy": lambda to: select.graph_cut_greedy(to(ROWS), 3, bins=2),
    "facility_location": lambda to: select.facility_location_greedy(to(ROWS), 3),
    "ZCA": lambda to: pydistill.whitening.ZCA.fit(to(BIG))(to(BIG)),
}


def plain(to: To) -> nn.Module:
    torch.manual_seed(4)
    return to(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(4, 4), nn.ReLU(), nn.AvgPool2d(2)))


def lora(to: To) -> nn.Module:
    torch.manual_seed(4)
    return to(LoRALinear(nn.Linear(4, 5), 2))


def randn_like(*size: int) -> Tensor:
    return torch.linspace(-1, 1, int(torch.Size(size).numel())).view(size)


CASES = [(name, device) for name in CALLS for device in ("cuda:0", "cuda:1")]


@pytest.mark.parametrize(("name", "device"), sample(CASES, [c for i, c in enumerate(CASES) if i % 4 in (0, 3)]))
def test_results_are_those_of_the_cpu(name: str, device: str) -> None:
    found = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        found.append(CALLS[name](lambda value, place=place: value.to(place)))
    for module in (NET, BATCH_NORM, ENCODER):
        module.to("cpu")
    for here, there in zip(*map(tree_leaves, found), strict=True):
        assert there.device == torch.device(device) or here.dim() == 0
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["fp16", "topk8"])
def test_stored_labels_are_decoded_for_the_device(format: str, tmp_path: Path) -> None:
    options = {"num_images": 6, "num_classes": 10, "epochs": 1, "format": format, "k": 4, "T": 2.0, "batch_size": 6}
    with SoftLabelStore.create(tmp_path / "labels.store", **options) as store:
        store.write(0, torch.arange(6), randn(6, 10))
    student = randn(6, 10)
    with SoftLabelStore.open(tmp_path / "labels.store") as store:
        labels = store.read(0, torch.arange(6))
        want = labels.loss(student)
        got = labels.to("cuda").loss(student.cuda())
    assert torch.isclose(got.cpu(), want, rtol=1e-5)


def test_pinned_labels_are_copied_without_waiting(tmp_path: Path) -> None:
    options = {"num_images": 6, "num_classes": 10, "epochs": 1, "batch_size": 6}
    student = randn(6, 10).cuda()
    with SoftLabelStore.create(tmp_path / "labels.store", **options) as store:
        store.write(0, torch.arange(6), randn(6, 10))
    with SoftLabelStore.open(tmp_path / "labels.store") as store:
        for _ in range(2):
            with counts() as c:
                store.read(0, torch.arange(6)).pin_memory().to("cuda").loss(student)
        assert store.read(0, torch.arange(6)).pin_memory().rows.is_pinned()
    assert c.waits == [], c


def test_evaluation(dataset: Dataset) -> None:
    found = []
    for device in ("cpu", "cuda"):
        d = dataset.to(torch.device(device))
        data = (d.train_images, d.train_labels, d.test_images, d.test_labels)
        found.append(evaluate(lambda: ConvNet(1, 3, width=4, depth=1, image_size=6), *data, lr=0.05, epochs=2))
    assert found[0] == found[1]


def test_statistics_are_matched_without_waiting() -> None:
    net = ConvNet(3, 4, width=4, depth=2, image_size=8, norm="batch").eval().cuda()
    x = X.cuda().requires_grad_()
    with BNStatMatcher(net) as matcher:
        for _ in range(2):
            with counts() as c:
                net(x)
                torch.autograd.grad(matcher.loss(), x)
    assert c.waits == [], c
