"""pydistill's providers, in the same shape as the peers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .peers import (
    augment,
    distribution,
    eager,
    gradient_matching,
    label_losses,
    multi_crop,
    recover,
    resnet,
    segments,
    selection,
    stored_labels,
    training,
)
from .peers.problem import Problem, Result, Thunk


def accelerated(net: nn.Module) -> nn.Module:
    # imported late, so that peers can be run and compared without pydistill
    from pydistill.nn import accelerate

    return accelerate(copy.deepcopy(net))


def eager_accelerated(problem: Problem) -> Thunk:
    return eager.prepare(problem, accelerated(problem.net))


def trajectory_match(problem: Problem, students: int | None = None, **options: Any) -> Thunk:
    """Takes the plain module as it is: what a user of a method repository has."""
    import pydistill

    theta0, target = problem.theta0, problem.target
    if students is not None:
        theta0, target = (t.expand(students, -1).contiguous() for t in (theta0, target))

    def run() -> Result:
        images = problem.images.clone().requires_grad_()
        lr = problem.lr.clone().requires_grad_()
        torch.manual_seed(0)
        loss = pydistill.trajectory_match(
            problem.net,
            theta0,
            target,
            images,
            problem.labels,
            lr,
            steps=problem.steps,
            batches=list(problem.batches),
            augment=Replay(problem.draws) if problem.draws else augment.drawn if problem.lambdas else None,
            **options,
        )
        d_images, d_lr = torch.autograd.grad(loss, (images, lr))
        return Result(loss.detach(), d_images, d_lr)

    return run


class Replay:
    """A problem's augmentations, in the order of its steps."""

    def __init__(self, draws: tuple[tuple[str, Tensor], ...]):
        self.records = iter([record for _, record in draws])

    def draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return next(self.records)

    def __call__(self, images: Tensor, record: Tensor) -> Tensor:
        return augment_images(images, record)


def exact(problem: Problem) -> Thunk:
    return trajectory_match(problem, mode="exact", engine="student")


def exact_bf16(problem: Problem) -> Thunk:
    return trajectory_match(problem, mode="exact", engine="student", precision="bf16")


def exact_students(scaled: Any) -> Thunk:
    return trajectory_match(scaled.problem, scaled.students, mode="exact", engine="student")


def exact_compiled(problem: Problem) -> Thunk:
    return trajectory_match(problem, mode="exact", engine="compiled")


def exact_generic(problem: Problem, share: float) -> Thunk:
    """Within ``share`` of what the loop by hand keeps, or as close as storing fewer parameters allows."""
    memory, one = int(share * problem.steps * eager.graph_bytes(problem)), problem.theta0.nbytes

    def needed(every: int) -> int:  # what is kept, plus what a stretch recomputes
        return (-(-problem.steps // every) + every - 1) * one

    choices = range(1, problem.steps + 1)
    every = next((k for k in choices if needed(k) <= memory), min(choices, key=needed))
    memory = max(memory, needed(every)) - (every - 1) * one
    return trajectory_match(problem, mode="exact", engine="generic", memory=memory, store_every=every)


def first_order(problem: Problem) -> Thunk:
    return trajectory_match(problem, mode="first_order", engine="student")


def lowest_step_cosines(problem: Problem) -> dict[str, float]:
    """bf16 against float32 at every theta of the float32 trajectory, along the direction to the target."""
    from pydistill.ops import convnet_gradient, convnet_tangent
    from pydistill.trajectory import convnet_shape

    shape = convnet_shape(problem.net, problem.images.shape[1:])
    theta, lowest = problem.theta0[None], dict.fromkeys(("gradient", "curvature", "d_images"), 1.0)
    for index in problem.batches:
        batch = (problem.images[index], problem.labels[index])
        direction = theta - problem.target
        found = []
        for precision in ("fp32", "bf16"):
            _, gradient = convnet_gradient(shape, theta, *batch, precision=precision)
            _, curvature, d_images, _ = convnet_tangent(shape, theta, direction, *batch, precision=precision)
            found.append((gradient, curvature, d_images))
        for name, a, b in zip(lowest, *found, strict=True):
            similarity = torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0)
            lowest[name] = min(lowest[name], float(similarity))
        theta = theta - problem.lr * found[0][0]
    return lowest


def instance_norm_relu_avg_pool(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    import pydistill

    return pydistill.instance_norm_relu_avg_pool(x, weight, bias, **options)


def train_students(problem: training.Training) -> training.Thunk:
    import pydistill

    def run() -> training.Trained:
        found = pydistill.train_students(
            problem.net,
            problem.theta0,
            problem.images,
            problem.labels,
            epochs=problem.epochs,
            batch_size=problem.batch,
            lr=problem.lr,
            momentum=problem.momentum,
            weight_decay=problem.weight_decay,
            generator=problem.generators,
        )
        return training.Trained(found.theta - problem.theta0, found.losses)

    return run


def gradient_matching_step(problem: gradient_matching.Matching, **options: Any) -> gradient_matching.Thunk:
    from pydistill.matching import class_gradients, gradient_match
    from pydistill.ops.convnet_step import Workspace

    workspace, shapes = Workspace(), [p.shape for p in problem.net.parameters()]

    def gradients(images: Tensor) -> Tensor:
        labels = problem.labels(images).flatten()
        images = images.flatten(0, 1)
        return class_gradients(problem.net, problem.theta, images, labels, workspace=workspace, **options)

    def run() -> gradient_matching.Matched:
        images = problem.syn.clone().requires_grad_()
        loss = gradient_match(grads_real=gradients(problem.real), grads_syn=gradients(images), shapes=shapes)
        (d_images,) = torch.autograd.grad(loss, images)
        return gradient_matching.Matched(loss.detach(), d_images.flatten(0, 1))

    return run


def gradient_matching_step_bf16(problem: gradient_matching.Matching) -> gradient_matching.Thunk:
    return gradient_matching_step(problem, precision="bf16")


def expert_store(problem: segments.Experts) -> segments.Thunk:
    from pydistill import ExpertStore

    path = Path(problem.folder.name) / "experts.store"
    if problem.opens:
        ExpertStore.create(path, problem.net, experts=problem.experts, epochs=problem.epochs, overwrite=True).close()
        return lambda: ExpertStore(path)
    store = ExpertStore.import_replay_buffers([problem.buffer], problem.net, path, overwrite=True)
    places = problem.places()

    def run() -> segments.Segment:
        return segments.Segment(*store.segment(*next(places), problem.length))

    return run


def label_store(problem: stored_labels.Labels, form: str) -> Any:
    """A store of the problem's labels, open for reading."""
    from pydistill.labels import SoftLabelStore

    path = Path(problem.folder.name) / f"{form}.store"
    with SoftLabelStore.create(
        path,
        num_images=problem.images,
        num_classes=problem.classes,
        epochs=1,
        format=form,
        k=problem.k,
        T=problem.T,
        record_bytes=problem.record_bytes,
        batch_size=problem.batch,
        overwrite=True,
    ) as store:
        records = torch.zeros(problem.batch, problem.record_bytes, dtype=torch.uint8)
        for b in range(problem.batches):
            store.write(0, problem.order(b), problem.teacher(b), records)
    return SoftLabelStore(path)


def stored_labels_epoch(problem: stored_labels.Labels, form: str = "topk8") -> stored_labels.Thunk:
    """As a training loop reads them, without the images."""
    from pydistill.labels import SoftLabelDataset, StoredBatches, collate_soft_labels

    data = SoftLabelDataset(None, label_store(problem, form))
    workers = {"num_workers": problem.workers, "persistent_workers": problem.workers > 0}
    loader = DataLoader(data, batch_sampler=StoredBatches(data), collate_fn=collate_soft_labels, **workers)
    student = problem.student
    return partial(stored_labels.passes, loader, lambda item: item[1].loss(student), student)


def stored_bytes(problem: stored_labels.Labels, form: str) -> Callable[[], float]:
    """Bytes per label: the whole file, divided."""
    path = label_store(problem, form).path
    return lambda: path.stat().st_size / problem.images


def densified_labels(problem: stored_labels.Labels, form: str) -> list[Tensor]:
    store = label_store(problem, form)
    return [store.read(0, images).densify() for images in store.batches(0)]


def augment_images(images: Tensor, record: Tensor) -> Tensor:
    from pydistill.ops import augment_images

    return augment_images(images, record)


def crops(problem: multi_crop.Crops) -> Callable[[Tensor], Tensor]:
    from pydistill.ops import multi_crop as op  # the peer's module has that name here

    size, rows = problem.size, len(problem.boxes)
    record = torch.zeros(rows, 1, 14)
    record[:, 0, 0] = torch.arange(rows)
    record[:, 0, 1:8] = problem.boxes
    record[:, 0, 11:] = torch.tensor([size, size, 1])
    record = record.to(problem.images.device)
    return lambda images: op(images, record, size, mean=multi_crop.MEAN, std=multi_crop.STD)


def datadam(problem: distribution.Images, precision: str = "auto") -> distribution.Thunk:
    """``precision``: of the real images' convolutions."""
    from pydistill import matching

    theta = nn.utils.parameters_to_vector(problem.net.parameters())
    labels, options = problem.labels, {"num_classes": problem.classes}

    def features(images: Tensor, precision: str) -> Any:
        return matching.features(problem.net, theta, images, p=problem.power, axis="spatial", precision=precision)

    def run() -> distribution.Matched:
        synthetic = problem.synthetic.clone().requires_grad_()
        with torch.no_grad():
            real = features(problem.real, precision)
        own = features(synthetic, "auto")
        loss = distribution.MAPS_WEIGHT * matching.match_maps(real.spatial, own.spatial, *labels, **options)
        embedded = matching.class_mean_match(real.embedding, own.embedding, *labels, **options)
        loss = loss + distribution.EMBEDDING_WEIGHT * embedded
        return distribution.Matched(loss.detach(), torch.autograd.grad(loss, synthetic)[0])

    return run


def dm(problem: distribution.Images) -> distribution.Thunk:
    from pydistill import matching

    theta = nn.utils.parameters_to_vector(problem.net.parameters())

    def embed(images: Tensor) -> Tensor:
        return matching.features(problem.net, theta, images, p=problem.power, axis=None).embedding

    def run() -> distribution.Matched:
        synthetic = problem.synthetic.clone().requires_grad_()
        with torch.no_grad():
            real = embed(problem.real)
        loss = matching.class_mean_match(real, embed(synthetic), *problem.labels, num_classes=problem.classes)
        return distribution.Matched(loss.detach(), torch.autograd.grad(loss, synthetic)[0])

    return run


def mmd(x: Tensor, y: Tensor) -> Tensor:
    from pydistill.matching import mmd

    return mmd(x, y)


def kd_divergence(student: Tensor, problem: label_losses.Logits) -> Tensor:
    from pydistill import kd_divergence

    return kd_divergence(student, problem.teacher, T=problem.T, scale_T2=False)


def sparse_label_loss(student: Tensor, problem: label_losses.Logits) -> Tensor:
    from pydistill.ops import sparse_label_loss

    return sparse_label_loss(student, problem.indices, problem.values, T=problem.T)


def attention_map_divergence(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    from pydistill.ops import attention_map_divergence

    return attention_map_divergence(q_s, k_s, q_t, k_t)


def krr_loss(f_real: Tensor, f_syn: Tensor, y_syn: Tensor, y_real: Tensor) -> Tensor:
    from pydistill.matching import krr_loss

    return krr_loss(f_real, f_syn, y_real=y_real, y_syn=y_syn, bias=True)


def bn_stat_match(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    from pydistill import bn_stat_match

    return bn_stat_match(x, running_mean, running_var)


def recover_step(problem: recover.Recovery, half: bool = False) -> Any:
    from pydistill.nn import BNStatMatcher, freeze
    from pydistill.ops import multi_crop

    size = problem.images.shape[-1]
    part = (*problem.crop, 1, *problem.roll, 0, 0, 0, size, size, 1)  # flipped, over the whole result
    rows = [[(i, *part)] for i in range(len(problem.images))]
    record = torch.tensor(rows, dtype=torch.float32, device=problem.images.device)
    net = freeze(problem.net)
    matcher = BNStatMatcher(net, first=recover.FIRST)

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            logits = net(x.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits, problem.labels)
        return loss + recover.WEIGHT * matcher.loss()

    return recover.stepping(problem, loss_of, view=lambda images: multi_crop(images, record, size))


def frozen_layer(layer: resnet.Layer) -> resnet.Thunk:
    """The filters are transformed beforehand, as those of a network that is kept."""
    from pydistill.ops import frozen_conv2d, frozen_filters

    layer = layer.to(memory_format=torch.channels_last)
    filters = frozen_filters(layer.weight, stride=layer.stride)
    return resnet.differentiated(lambda x: frozen_conv2d(x, filters), layer)


def frozen_network(problem: resnet.Recovered) -> resnet.Thunk:
    from pydistill.nn import freeze

    return resnet.recovered(freeze(problem.net), problem, channels_last=True)


def graph_cut_greedy(problem: selection.Samples) -> selection.Thunk:
    from pydistill.select import graph_cut_greedy

    return lambda: graph_cut_greedy(problem.features, problem.picks, factors=problem.factors)
