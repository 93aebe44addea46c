"""Whatever torch's default device and dtype: public functions give the same results, on their arguments' device; and
public objects survive pickling and copying."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import pydistill
from pydistill import augment, labels, matching, ops, select
from pydistill.trajectory import FlatModule

NET = pydistill.nn.ConvNet(3, 4, width=4, depth=2, image_size=8)
BATCH_NORM = pydistill.nn.ConvNet(3, 4, width=4, depth=1, image_size=8, norm="batch")
ENCODER = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
G = torch.Generator().manual_seed(0)


def randn(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=G)


THETA, X, Y = FlatModule(NET).parameters(), randn(6, 3, 8, 8), torch.arange(6) % 4
BIG, ROWS, SOFT = randn(4, 3, 16, 16), randn(20, 4), randn(6, 4)


def differentiated(call: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(call(x).square().sum(), x)[0]


def unrolled(net: nn.Module, **options) -> torch.Tensor:
    theta = FlatModule(net).parameters()
    return differentiated(lambda x: pydistill.unroll(net, theta, x, Y, 0.1, steps=2, **options))


def trained(net: nn.Module, **options) -> torch.Tensor:
    theta = FlatModule(net).parameters().expand(2, -1)
    options = {"epochs": 2, "lr": 0.1, "schedule": "step", "eval_data": (X, Y), "train_accuracy": True} | options
    found = pydistill.train_students(net, theta, X, Y, **options)
    return torch.cat([found.theta.flatten(), found.accuracy, found.train_accuracy.flatten()])


def cropped(**options) -> torch.Tensor:
    crops = augment.MultiCrop(8, **options)
    record = crops.draw(BIG.shape)
    record = augment.record_from_bytes(augment.record_to_bytes(record))
    return torch.cat([crops(BIG, record).flatten(), augment.mix_weights(record, 8)[1].flatten()])


def dynamics() -> torch.Tensor:
    seen = select.TrainingDynamics(6)
    for _ in range(2):
        seen.update(SOFT, Y)
    return torch.cat([t.double().flatten() for t in vars(seen).values() if isinstance(t, torch.Tensor)])


def frozen() -> torch.Tensor:
    return ops.frozen_conv2d(X, ops.frozen_filters(randn_like(4, 3, 3, 3)))


def randn_like(*size: int) -> torch.Tensor:
    return torch.linspace(-1, 1, int(np.prod(size)), dtype=torch.float32, device="cpu").view(size)


def projected() -> torch.Tensor:
    found = labels.Projector(ENCODER, ROWS[:4], teachers=2)
    return torch.cat([found.A.flatten(), found.B.flatten(), found.W.flatten()])


CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "unroll": lambda: unrolled(NET, batch_size=4, augment=augment.DiffAugment()),
    "unroll, generic": lambda: unrolled(NET, batch_size=4, engine="generic", augment=augment.MultiCrop(8)),
    "unroll, function": lambda: unrolled(NET, augment=lambda x: x.flip(3)),
    "unroll, soft": lambda: pydistill.unroll(NET, THETA, X, SOFT, 0.1, steps=2, label_kind="logits"),
    "unroll, BatchNorm": lambda: unrolled(copy.deepcopy(BATCH_NORM), mode="full"),
    "train_students": lambda: trained(NET, augment=augment.DiffAugment()),
    "train_students, generic": lambda: trained(BATCH_NORM, momentum=0.9, batch_size=4, schedule="cosine"),
    "class_gradients": lambda: differentiated(lambda x: pydistill.matching.class_gradients(NET, THETA, x, Y)),
    "class_gradients, even": lambda: differentiated(
        lambda x: pydistill.matching.class_gradients(NET, THETA, x[:4], Y[:4])
    ),
    "features": lambda: differentiated(lambda x: matching.features(NET, THETA, x).embedding),
    "attention_match": lambda: pydistill.attention_match([X], [X + 1], Y, Y),
    "class_mean_match": lambda: pydistill.class_mean_match(SOFT, SOFT + 1, Y, Y),
    "gradient_match": lambda: pydistill.gradient_match(grads_real=[ROWS], grads_syn=[ROWS + 1]),
    "krr_loss": lambda: pydistill.krr_loss(ROWS, SOFT, y_real=ROWS, y_syn=SOFT),
    "krr_loss, primal": lambda: pydistill.krr_loss(ROWS, ROWS, y_real=ROWS, y_syn=ROWS, form="primal", bias=True),
    "mmd": lambda: pydistill.matching.mmd(ROWS, SOFT),
    "attention_map_divergence": lambda: pydistill.attention_map_divergence(*(X.flatten(2)[None, :, :, :16],) * 4),
    "attention_nmi": lambda: pydistill.divergence.attention_nmi(ROWS[None, None], SOFT[None, None]),
    "contrastive_ce": lambda: pydistill.divergence.contrastive_ce(ROWS, ROWS + 1, scale=2.0, symmetric=True),
    "contrastive_ce, itself": lambda: pydistill.divergence.contrastive_ce(
        SOFT, None, scale=2.0, labels=Y, exclude_self=True
    ),
    "kd_divergence": lambda: pydistill.kd_divergence(SOFT, SOFT + 1, kind="jsd", labels=Y, ce_weight=0.5),
    "kd_divergence, ofa": lambda: pydistill.kd_divergence(SOFT, SOFT + 1, kind="ofa", labels=Y),
    "sparse_label_loss": lambda: ops.sparse_label_loss(SOFT, Y[:, None], SOFT[:, :1].sigmoid()),
    "soft_cross_entropy": lambda: pydistill.soft_cross_entropy(SOFT, SOFT, label_kind="logits"),
    "bn_stat_match": lambda: pydistill.bn_stat_match(X, ROWS[0, :3], ROWS[1, :3].abs()),
    "instance_norm": lambda: differentiated(lambda x: ops.instance_norm_relu_avg_pool(x, ROWS[0, :3], ROWS[1, :3])),
    "conv2d": lambda: differentiated(lambda x: ops.conv2d(x, randn_like(4, 3, 3, 3))),
    "frozen_conv2d": frozen,
    "max_pool2d": lambda: differentiated(ops.max_pool2d),
    "attention_map": lambda: ops.attention_map(X),
    "diff_augment": lambda: augment.diff_augment(X, "color_crop_cutout_flip_scale_rotate"),
    "diff_augment, seeded": lambda: augment.diff_augment(X, "color_crop", seed=3),
    "MultiCrop": lambda: cropped(mean=(0.5,) * 3, std=(0.2,) * 3, roll=2),
    "MultiCrop, mixup": lambda: cropped(mix="mixup"),
    "MultiCrop, cutmix": lambda: cropped(mix="cutmix"),
    "MultiCrop, mosaic": lambda: cropped(mix="mosaic"),
    "mix_labels": lambda: augment.mix_labels(
        Y[:4], augment.MultiCrop(8, mix="mixup").draw(BIG.shape), 8, num_classes=4
    ),
    "graph_cut_greedy": lambda: select.graph_cut_greedy(ROWS, 3, bins=2),
    "facility_location": lambda: select.facility_location_greedy(ROWS, 3),
    "herding": lambda: select.herding(ROWS, 2, torch.zeros(20, dtype=torch.int64, device="cpu")),
    "kmeans": lambda: select.kmeans(ROWS, 3),
    "representatives": lambda: select.representatives(SOFT, Y // 2, 2),
    "sample_scores": lambda: torch.stack(list(select.sample_scores(SOFT, Y).values())),
    "TrainingDynamics": dynamics,
    "best_crops": lambda: select.best_crops(NET, X, Y)[0],
    "drop_patches": lambda: select.drop_patches(X, select.patch_importance(NET, X, Y, 2), 0.5)[0],
    "ZCA": lambda: pydistill.whitening.ZCA.fit(BIG)(BIG),
    "Projector": projected,
    "perturb_towards": lambda: pydistill.trajectory.flat.perturb_towards(THETA, THETA + 1, 0.1, FlatModule(NET)),
}


@pytest.mark.parametrize("name", CALLS)
def test_defaults_of_torch_change_nothing(name):
    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return CALLS[name]().detach()

    plain = run()
    with torch.device("meta"):
        elsewhere = run()
    torch.set_default_dtype(torch.float64)
    try:
        double = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for found in (elsewhere, double):
        assert found.device == plain.device
        assert found.dtype == plain.dtype
        assert torch.equal(found, plain)


def test_a_label_store_is_the_same(tmp_path):
    def written(name: str) -> bytes:
        options = {"num_images": 6, "num_classes": 4, "epochs": 1, "k": 2}
        with labels.SoftLabelStore.create(tmp_path / name, **options) as store:
            store.write(0, range(6), SOFT)
        with labels.SoftLabelStore(tmp_path / name) as store:
            assert store.read(0, [3, 1]).loss(SOFT[:2]).device.type == "cpu"
        return (tmp_path / name).read_bytes()

    plain = written("plain")
    with torch.device("meta"):
        assert written("meta") == plain
    torch.set_default_dtype(torch.float64)
    try:
        assert written("double") == plain
    finally:
        torch.set_default_dtype(torch.float32)


OBJECTS = {
    "ConvNetShape": lambda: ops.ConvNetShape(3, 8, 8, (4, 4), 1, 4),
    "DiffAugment": lambda: augment.DiffAugment("color_crop", siamese=True),
    "MultiCrop": lambda: augment.MultiCrop(8, mix="cutmix", mean=(0.5,), std=(0.2,)),
    "Adam": lambda: pydistill.trajectory.Adam(beta1=0.5),
    "GSAM": lambda: pydistill.trajectory.GSAM(rho=0.1),
    "Smoothing": lambda: pydistill.trajectory.Smoothing(gradient_penalty=0.1),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_records_of_options_are_pickled_and_copied(name):
    each = OBJECTS[name]()
    assert pickle.loads(pickle.dumps(each)) == each
    assert copy.deepcopy(each) == each


def test_results_and_networks_are_pickled_and_copied():
    result = pydistill.train_students(BATCH_NORM, FlatModule(BATCH_NORM).parameters()[None], X, Y, epochs=1, lr=0.1)
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert torch.equal(again.theta, result.theta)
        assert all(torch.equal(again.buffers[name], buffer) for name, buffer in result.buffers.items())
    for net in (NET, pydistill.compat.ReparamModule(copy.deepcopy(NET)), FlatModule(NET)):
        for again in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
            found = pydistill.unroll(again if isinstance(again, nn.Module) else again.net, THETA, X, Y, 0.1, steps=1)
            assert torch.equal(found, pydistill.unroll(NET, THETA, X, Y, 0.1, steps=1))
    zca = pydistill.whitening.ZCA.fit(BIG)
    assert torch.equal(pickle.loads(pickle.dumps(zca))(BIG), zca(BIG))
    workspace = ops.convnet_step.Workspace()
    options = {"workspace": copy.deepcopy(workspace)}
    assert torch.equal(
        pydistill.matching.class_gradients(NET, THETA, X, Y, **options),
        pydistill.matching.class_gradients(NET, THETA, X, Y),
    )
