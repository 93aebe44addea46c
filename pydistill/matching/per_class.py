"""The gradient of each class's loss, all classes at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._devices import once, to_device
from pydistill.ops._precision import Precision, check_switches
from pydistill.ops.convnet_step import Workspace
from pydistill.trajectory import FlatModule
from pydistill.trajectory.generic import GenericStudents
from pydistill.trajectory.step import Batch, saved_tensors
from pydistill.trajectory.students import ConvNetStudents, Engine, choose_students

__all__ = ["class_gradients"]


def class_gradients(
    net: nn.Module,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    *,
    classes: Sequence[int] | None = None,
    output: int | None = None,
    precision: Precision = "auto",
    engine: Engine = "auto",
    workspace: Workspace | None = None,
) -> Tensor:
    """For each class, the gradient in the parameters of the mean cross entropy of that class's images.

    What DC and DSA (Zhao, Mopuri, Bilen, ICLR 2021; Zhao and Bilen, ICML 2021) match between real and synthetic images.
    Equivalent to ::

        losses = [F.cross_entropy(net(images[labels == k]), labels[labels == k]) for k in range(num_classes)]
        torch.stack([torch.autograd.grad(loss, theta, create_graph=True)[0] for loss in losses])

    with ``net`` a function of its flattened parameters. Differentiable in images and theta. On the student engine
    (`pydistill.info.engine` says which nets it runs) all classes are one batched pass, and their derivative one more,
    forward over reverse; there the result's own second derivative raises ``NotImplementedError``. Classes of different
    sizes are padded to the largest with images that have no loss, so the work is proportional to the number of classes
    times the largest class. Other nets run on autograd, one class after the other, in their current mode.
    Deterministic on the student engine: equal bits across runs and thread counts.

    Args:
        net: its structure; the parameters come from ``theta``.
        theta: ``[P]`` in ``net.parameters()`` order, floating.
        images: ``[N, C, H, W]`` in any order, dtype and device of theta. Not copied if sorted by class with classes of
            equal size.
        labels: int64 ``[N]`` class numbers, on the device of images or on the CPU: class sizes decide what is run, so
            labels on a GPU cause a synchronisation when they are first seen, and when they have changed. A change that
            torch does not count (by ``labels.data``, or in a replayed graph) is not seen.
        num_classes: K, the rows of the result; by default one more than the largest label.
        classes: the classes whose gradients are wanted, in the order of the result's rows, instead of all K; each label
            must be one of them.
        output: which element to take where ``net`` returns a tuple.
        precision: as in `pydistill.unroll`.
        engine: "student", "generic" or "auto", as in `pydistill.unroll`.
        workspace: working memory of the student engine to reuse; fresh when None.

    Returns:
        ``[K, P]``, dtype of theta; zero for parameters that are frozen or that the loss does not use.

    Raises:
        TypeError, ValueError: an argument does not fit; a class has no image; a label is not one of the classes. The
            message says which, what was expected and what was given.
        RuntimeError: theta or images were changed in place between the forward pass and its backward pass.
    """
    flat = FlatModule(net)
    groups = _group(flat, theta, images, labels, num_classes, classes)
    blocked = None
    if min(groups.sizes) < max(groups.sizes) and any(isinstance(m, nn.BatchNorm2d) for m in flat.net.modules()):
        blocked = "its BatchNorm takes each class as one batch, and the classes have unequal numbers of images"
    if engine == "compiled":
        raise ValueError("engine: expected 'auto', 'student' or 'generic', got 'compiled', which trains students")
    students = choose_students(engine, flat, images, "hard", output, max(groups.classes), precision, blocked)
    trained = flat.trained(theta)
    if isinstance(students, GenericStudents):
        check_switches(students.precision, images.device, images.dtype, "which gradients by autograd follow")
        found = _by_autograd(students, theta, images, labels, groups)
        return found if trained is None else found * trained
    if max(groups.classes) >= students.shape.classes:
        wanted = f"class numbers below the net's {students.shape.classes} classes"
        raise ValueError(f"labels: expected {wanted}, got {max(groups.classes)}")
    if workspace is not None:
        students.workspace = workspace
    K, n = len(groups.sizes), max(groups.sizes)
    numbers = to_device(torch.tensor(groups.classes, device="cpu"), images.device)
    if min(groups.sizes) == n:
        own_images = images if groups.in_order else images[to_device(groups.order, images.device)]
        own_labels, factors = numbers[:, None].expand(K, n).contiguous(), theta.new_ones(K)
    else:
        # where image i of class k goes: K rows of n places, the last of which stay empty for small classes
        places = torch.cat([k * n + torch.arange(size, device=images.device) for k, size in enumerate(groups.sizes)])
        found = images[to_device(groups.order, images.device)]
        own_images = images.new_zeros(K * n, *images.shape[1:]).index_put((places,), found)
        rows = F.one_hot(numbers, students.shape.classes).to(theta.dtype).repeat_interleave(n, 0)
        empty = torch.ones(K * n, dtype=torch.bool, device=images.device).index_fill(0, places, False)
        own_labels = rows.masked_fill(empty[:, None], 0).unflatten(0, (K, n))  # no class, so no loss
        students.label_kind = "probs"
        factors = torch.tensor([n / size for size in groups.sizes], dtype=theta.dtype, device="cpu")
        factors = to_device(factors, theta.device)  # mean over n places to class mean
    own_images = own_images.unflatten(0, (K, n))
    further = torch.is_grad_enabled() and (theta.requires_grad or images.requires_grad)
    rows = _ClassGradients.apply(theta, own_images, own_labels, factors, students, further)
    return rows if trained is None else rows * trained


class _Groups(NamedTuple):
    classes: list[int]
    sizes: list[int]  # images of each
    order: Tensor  # [N], on the CPU: the images by class
    in_order: bool  # whether they are so already


def _group(
    flat: FlatModule,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    num_classes: int | None,
    classes: Sequence[int] | None,
) -> _Groups:
    for name, tensor in (("theta", theta), ("images", images), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not theta.is_floating_point():
        raise TypeError(f"theta: expected a floating dtype, got {theta.dtype}")
    if theta.shape != (flat.numel,):
        raise ValueError(f"theta: expected shape [{flat.numel}] for this net, got {list(theta.shape)}")
    if images.dtype != theta.dtype:
        raise TypeError(f"images: expected dtype {theta.dtype} as theta, got {images.dtype}")
    if images.device != theta.device:
        raise ValueError(f"images: expected device {theta.device} as theta, got {images.device}")
    if images.dim() != 4 or not len(images):
        raise ValueError(f"images: expected [N, C, H, W] with at least one image, got shape {list(images.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64 class numbers, got {labels.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected shape {[len(images)]} as images, got {list(labels.shape)}")
    if labels.device.type != "cpu" and labels.device != images.device:
        raise ValueError(f"labels: expected device {images.device} as images, or cpu, got {labels.device}")
    here = once(Tensor.cpu, labels)
    low, high = (int(v) for v in here.aminmax())
    if classes is None:
        K = high + 1 if num_classes is None else num_classes
        if low < 0 or high >= K:
            wanted = f"class numbers in 0..{K - 1}" if low >= 0 else "class numbers >= 0"
            raise ValueError(f"labels: expected {wanted}, got {low if low < 0 else high}")
        wanted_classes = list(range(K))
    else:
        wanted_classes = [int(k) for k in classes]
        if not wanted_classes or min(wanted_classes) < 0 or len(set(wanted_classes)) < len(wanted_classes):
            raise ValueError(f"classes: expected different class numbers >= 0, at least one, got {wanted_classes}")
        if num_classes is not None and max(wanted_classes) >= num_classes:
            raise ValueError(f"classes: expected numbers below num_classes={num_classes}, got {max(wanted_classes)}")
    if low < 0:
        raise ValueError(f"labels: expected class numbers >= 0, got {low}")
    rows = torch.full((max(high, *wanted_classes, 0) + 1,), -1, device="cpu")
    rows[wanted_classes] = torch.arange(len(wanted_classes), device="cpu")
    row = rows[here]
    if int(row.min()) < 0:
        raise ValueError(f"labels: expected one of the classes {wanted_classes}, got {int(here[row < 0][0])}")
    sizes = torch.bincount(row, minlength=len(wanted_classes)).tolist()
    if 0 in sizes:
        empty = wanted_classes[sizes.index(0)]
        raise ValueError(f"labels: expected at least one image of every class, got none of class {empty}")
    order = row.argsort(stable=True)
    return _Groups(wanted_classes, sizes, order, torch.equal(order, torch.arange(len(order), device="cpu")))


def _by_autograd(students: GenericStudents, theta: Tensor, images: Tensor, labels: Tensor, groups: _Groups) -> Tensor:
    """One class after the other, differentiable as often as the net is."""
    further = torch.is_grad_enabled() and (theta.requires_grad or images.requires_grad)
    found = []
    for index in groups.order.split(groups.sizes):
        x, y = (
            images[to_device(index, images.device)],
            to_device(labels[to_device(index, labels.device)], images.device),
        )
        with torch.enable_grad():
            at = theta if further and theta.requires_grad else theta.detach().requires_grad_()
            loss = students.loss(at, x if further else x.detach(), y)
            (g,) = torch.autograd.grad(loss, at, create_graph=further)
        found.append(g)
    return torch.stack(found)


class _ClassGradients(torch.autograd.Function):
    """theta [P], images [K, n, C, H, W], labels of each: [K, P], row k times factors[k]."""

    @staticmethod
    def forward(
        ctx: Any,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        factors: Tensor,
        students: ConvNetStudents,
        wanted: bool,
    ) -> Tensor:
        K, n = images.shape[:2]
        rows, batch = theta.expand(K, -1), Batch(images.detach(), labels, True)
        if wanted:  # what the derivative would otherwise recompute
            students.plan("auto", 1, K, n, theta, 0)
        found = students.gradient(rows, batch, None, 0 if wanted else None).grad
        ctx.save_for_backward(theta, images, labels, factors)
        ctx.students = students
        return found.mul_(factors[:, None])

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple:
        theta, images, labels, factors = saved_tensors(ctx, "theta, images")
        wanted = tuple(ctx.needs_input_grad[:2])
        found = _Derivative.apply(direction, theta, images, labels, factors, ctx.students, wanted)
        return *found, None, None, None, None


class _Derivative(torch.autograd.Function):
    """The derivatives of <class gradients, direction> in theta and images, where they are wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        direction: Tensor,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        factors: Tensor,
        students: ConvNetStudents,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        found = students.adjoint(
            theta.detach().expand(len(images), -1),
            direction.detach(),
            factors,
            Batch(images.detach(), labels, True),
            None,
            0,
            curvature=wanted[0],
            images=wanted[1],
            labels=False,
        )
        along_theta = found.curvature if wanted[0] else None
        return None if along_theta is None else along_theta.sum(0), found.images

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError(
            "class_gradients: the student engine's gradients are differentiable once, which takes the net's second "
            "derivative; engine='generic' goes further"
        )
