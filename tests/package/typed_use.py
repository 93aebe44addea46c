"""How the package is called, for a type checker: ``mypy --strict --follow-imports=silent tests/package/typed_use.py``.

It shows that a caller's arguments and results have the types that the functions declare. Nothing runs it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import pydistill
from pydistill.augment import DiffAugment, MultiCrop, clamp_normalized_, crop_schedule, mix_labels
from pydistill.labels import Projector, SoftLabelDataset, SoftLabelStore, collate_soft_labels
from pydistill.methods import HeLlO, run
from pydistill.nn import BNStatMatcher, ConvNet, ResNet18, accelerate, freeze, frozen_convolutions, make
from pydistill.ops import sparse_label_loss
from pydistill.trajectory import GSAM, Adam, FlatModule, Smoothing


def divergences(student: Tensor, teacher: Tensor, labels: Tensor, q: Tensor, k: Tensor) -> Tensor:
    parts: list[Tensor] = [
        pydistill.kd_divergence(student, teacher, kind="jsd", T=4.0, labels=labels, ce_weight=0.1),
        pydistill.kd_divergence(student, teacher, target_is="probs", reduction="none").mean(),
        pydistill.attention_map_divergence(q, k, q, k, kind="rkl", T_s=0.5),
        pydistill.divergence.attention_nmi(q, k).mean(),
        pydistill.divergence.contrastive_ce(student, teacher, scale=torch.tensor(10.0), labels=labels, symmetric=True),
        pydistill.divergence.contrastive_ce(student, None, scale=10.0, labels=labels, exclude_self=True),
        pydistill.soft_cross_entropy(student, teacher, label_kind="logits"),
        sparse_label_loss(student, labels[:, None], teacher[:, :1], T=2.0, tail="zeros"),
    ]
    return torch.stack(parts).sum()


def matching(real: Tensor, syn: Tensor, y_real: Tensor, y_syn: Tensor, net: nn.Module, images: Tensor) -> Tensor:
    theta = FlatModule(net).parameters().requires_grad_()
    shapes = [p.shape for p in net.parameters()]
    rows: Tensor = pydistill.matching.class_gradients(
        net, theta, images, y_real, 10, classes=range(10), engine="student"
    )
    found = pydistill.matching.features(net, theta, images, p=4.0, axis="both", layers=(0, 1))
    maps: tuple[Tensor, ...] = found.spatial + found.channel
    targets = nn.functional.one_hot(y_real, 10).to(real.dtype)
    loss, info = pydistill.krr_loss(real, syn, y_real=targets, y_syn=y_syn, lam=1e-6, return_info=True)
    spatial: Tensor = pydistill.ops.attention_map(images, 2.0)
    _, channel = pydistill.ops.attention_map(images, axis="both")
    parts: list[Tensor] = [
        pydistill.gradient_match(grads_real=rows, grads_syn=rows, kind="cos", shapes=shapes),
        pydistill.gradient_match(grads_real=list(rows), grads_syn=tuple(rows)),
        pydistill.attention_match([images], [images], y_real, y_real, norm="l1", axis="both"),
        pydistill.matching.match_maps(maps, maps, y_real, y_real),
        pydistill.class_mean_match(found.embedding, found.embedding, y_real, y_real, num_classes=10),
        pydistill.krr_loss(real, syn, y_real=targets, y_syn=y_syn, form="primal", bias=True),
        pydistill.matching.mmd(real, syn, kernels=5, bandwidth=1.0),
        loss * info.ridge + spatial.sum() + channel.sum(),
    ]
    return torch.stack(parts).sum()


def operators(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    y, match = pydistill.ops.bn_match_forward(x, bn, relu=True, kind="sq")
    match = match + pydistill.bn_stat_match(y, bn.weight, bn.bias, unbiased=True)
    z: Tensor = pydistill.instance_norm_relu_avg_pool(y, bn.weight, bn.bias, pool=False)
    z = pydistill.ops.max_pool2d(pydistill.ops.conv2d(z, torch.ones(4, 4, 3, 3), stride=(1, 1), padding=1))
    exact: Tensor = pydistill.reference.instance_norm_relu_avg_pool(y, bn.weight, bn.bias)
    return match + z.sum() + exact.sum()


def trajectories(images: Tensor, labels: Tensor, path: Path) -> Tensor:
    net = ConvNet(3, 10, image_size=(32, 32), norm="instance")
    theta0 = FlatModule(net).parameters()
    lr = torch.tensor(0.01, requires_grad=True)
    augment = DiffAugment("color_crop", siamese=True)
    theta: Tensor = pydistill.unroll(net, theta0, images, labels, lr, steps=5, batch_size=4, augment=augment)
    two = pydistill.unroll(net, theta0, images, labels, 0.01, steps=5, at=[2, 5], optimizer=Adam(), mode="first_order")
    generators = [torch.Generator().manual_seed(s) for s in range(3)]
    trained: pydistill.trajectory.TrainResult = pydistill.train_students(
        *(net, theta0.expand(3, -1), images, labels),
        epochs=2,
        lr=0.01,
        schedule=lambda epoch, epochs: 1 - epoch / epochs,
        sharpness=GSAM(0.05),
        smoothing=Smoothing(clip_norm=1.0),
        generator=generators,
        eval_data=(images, labels),
    )
    with pydistill.ExpertStore.create(path, net, experts=3, epochs=2, dtype="bf16") as store:
        store.append(range(3), 0, theta0.expand(3, -1))
        store.append(range(3), 1, trained.theta)
        start, target = store.segment(0, 0, 1)
    return pydistill.trajectory_match(net, start, target, images, labels, lr, steps=5) + theta.sum() + two[0].sum()


def networks(x: Tensor, y: Tensor) -> tuple[float, list[float]]:
    model = freeze(ResNet18(10, stem="cifar").eval())
    how: dict[str, str] = frozen_convolutions(model)
    with BNStatMatcher(model, first=10.0, kind="norm") as matcher:
        model(x)
        print(matcher.loss().item(), matcher.layers, how.items())
    accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(4, 4), nn.ReLU()))
    student = make("convnet", 3, 10, 32, width=16, norm="instance")
    pydistill.evaluate.train_student(student, x, y, lr=0.01, epochs=1)
    best = pydistill.evaluate.evaluate(lambda: ConvNet(3, 10), x, y, x, y, lr=0.01, epochs=1, students=range(2))
    return pydistill.evaluate.accuracy(student, x, y), best


def data_and_labels(path: Path, encoder: nn.Module, x: Tensor) -> Tensor:
    digits = pydistill.data.load("digits", image_size=16)
    picks = pydistill.select.graph_cut_greedy(digits.train_images.flatten(1), 10, lam=0.5)
    few = (digits.train_images[picks], digits.train_labels[picks])
    made = pydistill.data.DistilledSet(*few, 0.01, digits.mean, digits.std, label_kind="hard")
    pydistill.evaluate.evaluate(lambda: ConvNet(1, 10), *few, x, x, lr=made.lr, epochs=1, label_kind=made.label_kind)
    augment = MultiCrop(32, scale=(crop_schedule("cosine", 1, 10), 1.0), mix="cutmix")
    record = augment.draw(x.shape)
    clamp_normalized_(augment(x, record), (0.5,), (0.5,))
    store = SoftLabelStore.create(path, num_images=10, num_classes=10, epochs=1, format="topk8", k=5, target="probs")
    store.write(0, [0, 1], mix_labels(x[:, 0, 0], record, 32))
    _, soft = collate_soft_labels([SoftLabelDataset(x, store)[0]])
    print(run(HeLlO.preset("digits"), out=path), pydistill.info.engine(encoder, (3, 32, 32)), pydistill.__version__)
    return soft.loss(Projector(encoder, x[:, 0, 0], rank=4)(x)) + pydistill.select.sample_scores(x, x)["ce"].sum()
