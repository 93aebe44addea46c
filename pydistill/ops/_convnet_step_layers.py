"""One training step of E ConvNets, layer by layer: cuDNN's convolutions around the fused block, without autograd.

`gradient` is forward and backward. `tangent` differentiates both along a direction nu in the parameters (forward over
reverse), which gives everything that a trajectory's adjoint needs from a step, by convolutions of the usual shapes. Per
block, with _bar for the gradient of the loss and _t for the derivative along nu:

    z = conv(x, w)                        z_t = conv(x_t, w) + conv(x, w_t)
    x_bar = dgrad(z_bar, w)               x_bar_t = dgrad(z_bar_t, w) + dgrad(z_bar, w_t)
    w_bar = wgrad(x, z_bar)               w_bar_t = wgrad(x, z_bar_t) + wgrad(x_t, z_bar)

The norm, the ReLU and the pool between them are the four forms of `instance_norm_relu_avg_pool`.

The students lie side by side in the channels, [N, E * C, H, W]: convolutions have E groups, and to the norm students
are just more channels. Images that all students share go through a first convolution of one group and E * K outputs.

A bias before an instance norm is subtracted again with the mean. It is not read here (so a non-finite one has no
effect), and its derivatives are exactly zero, as in exact arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from pydistill._arguments import check_choice
from pydistill.ops._precision import Resolved, named, rounded, rounds_convolutions, switching
from pydistill.ops.instance_norm_relu_avg_pool import FORMS
from pydistill.reference.convnet_shape import ConvNetShape

LabelKind = Literal["hard", "logits", "probs"]

_CUDA = torch.device("cuda")

# without the operators' autograd, vmap and tracing around them
_block, _block_backward, _block_jvp, _block_backward_jvp = (form.raw for form in FORMS)


def _switched(function: Callable) -> Callable:
    """``function``, outside of autocast, with GPUs rounding the factors of float32 products as its ``precision`` says,
    and with convolutions that give equal bits in every run."""

    @functools.wraps(function)
    def run(shape: ConvNetShape, theta: Tensor, *args, precision: Resolved = "ieee", **options):
        precision = cast(Resolved, named(precision, theta.dtype))
        cudnn: Any = torch.backends.cudnn  # its attributes are made at run time
        with switching, rounded(precision, _CUDA):
            before, autocast = (cudnn.deterministic, cudnn.benchmark), torch.is_autocast_enabled("cuda")
            try:
                torch.set_autocast_enabled("cuda", False)
                cudnn.deterministic, cudnn.benchmark = True, False  # timing would choose another algorithm
                return function(shape, theta, *args, precision=precision, **options)
            finally:
                cudnn.deterministic, cudnn.benchmark = before
                torch.set_autocast_enabled("cuda", autocast)

    return run


@_switched
@torch.no_grad()
def logits(shape: ConvNetShape, theta: Tensor, images: Tensor, *, precision: Resolved = "ieee") -> Tensor:
    """``[E, N, classes]`` at theta ``[E, P]`` for images ``[N, C, H, W]`` or ``[E, N, C, H, W]``."""
    net = _Net(shape, theta, images, precision)
    return net.classify(net.forward()[-1])


@_switched
@torch.no_grad()
def gradient(
    shape: ConvNetShape,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    label_kind: LabelKind = "hard",
    precision: Resolved = "ieee",
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """The mean cross entropy of each student and its gradient.

    Equivalent to ``loss = F.cross_entropy(net(images), labels)`` and ``torch.autograd.grad(loss, theta)`` for every
    student's theta, with ``net`` a `pydistill.nn.ConvNet`.

    Args:
        shape: the net.
        theta: ``[E, P]``, float32 or float64.
        images: ``[N, C, H, W]``, shared by the students, or ``[E, N, C, H, W]``; dtype of theta.
        labels: int64 ``[N]`` or ``[E, N]`` for "hard"; floating ``[N, K]`` or ``[E, N, K]`` for "logits" (a softmax is
            taken) and "probs".
        label_kind: what ``labels`` holds.
        precision: "ieee": everything in theta's dtype. "tf32": a GPU that supports it rounds the factors of
            convolutions and of the classifier to TF32; "tf32-conv", "tf32-matmul": of these alone. "bf16": convolutions
            read and write bfloat16 and accumulate in float32; statistics, parameters, classifier and loss are float32.
        keep: also return what `tangent` would otherwise compute again, `kept_bytes` in total.

    Returns:
        loss ``[E]`` and its gradient ``[E, P]``, dtype of theta; then what is kept.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    net = _Net(shape, theta, images, precision)
    inputs, planes, features = net.forward()
    kept = net.kept if keep else ()
    net.kept = ()
    loss = _CrossEntropy(net.classify(features), labels, label_kind)
    grad = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
    slots = _Slots(shape, grad)
    slots.classifier(loss.bar, features)
    y_bar = net.to_planes(loss.bar @ net.classifier)
    for i in reversed(range(len(shape.layers))):
        z_bar, scale_bar, shift_bar = _block_backward(y_bar, planes.pop(), net.scales[i], net.shifts[i], *net.options)
        slots.block(i, scale_bar, shift_bar, net.weight_gradient(i, inputs.pop(), z_bar))
        if i:
            y_bar = net.input_gradient(i, z_bar, net.weights[i])
    return loss.value, grad, *kept


@_switched
@torch.no_grad()
def tangent(
    shape: ConvNetShape,
    theta: Tensor,
    direction: Tensor,
    images: Tensor,
    labels: Tensor,
    *kept: Tensor,
    label_kind: LabelKind = "hard",
    precision: Resolved = "ieee",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The derivatives of <g, direction>, with g the gradient of the loss: a step of a trajectory's adjoint.

    Arguments are those of `gradient`, direction ``[E, P]``, and what `gradient` kept at the same theta and images, if
    it did; that changes no bit.

    Returns:
        slope: ``[E]``, <g, direction> itself.
        curvature: ``[E, P]``, the loss's Hessian times direction.
        images_grad: ``[E, N, C, H, W]``, per student even if the images are shared.
        labels_grad: ``[E, N, K]``, None for hard labels.
    """
    if direction.shape != theta.shape or direction.dtype != theta.dtype:
        wanted, got = (f"{t.dtype} {list(t.shape)}" for t in (theta, direction))
        raise ValueError(f"direction: expected {wanted} as theta, got {got}")
    net = _Net(shape, theta, images, precision)
    along = _Parameters(shape, direction, net.dtype, net.layout)
    # [w | w_t] in the input channels: for z_t together with inputs [x_t | x], and for both gradients of z_bar
    pairs = [None, *(torch.cat(pair, 1) for pair in zip(net.weights[1:], along.weights[1:], strict=True))]

    inputs, planes, features = net.forward(kept)
    net.kept = ()
    inputs_t: list[Tensor] = []
    planes_t: list[Tensor] = []
    for i, (x, z) in enumerate(zip(inputs, planes, strict=True)):
        if i == 0:  # the images do not move
            z_t = net.convolve(i, x, along.weights[i])
        else:
            z_t = net.convolve(i, net.side_by_side(inputs_t[-1], x), cast(Tensor, pairs[i]))
        planes_t.append(z_t)
        inputs_t.append(
            _block_jvp(z, net.scales[i], net.shifts[i], z_t, along.scales[i], along.shifts[i], *net.options)
        )
    features_t = net.to_features(inputs_t.pop())

    loss = _CrossEntropy(net.classify(features), labels, label_kind)
    logits_t = net.classify(features_t, along.classifier_bias) + features @ along.classifier.mT
    bar_t = loss.move_along(logits_t)
    curvature = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
    slots = _Slots(shape, curvature)
    slots.classifier(bar_t, features, loss.bar, features_t)
    y_bar = net.to_planes(loss.bar @ net.classifier)
    y_bar_t = net.to_planes(bar_t @ net.classifier + loss.bar @ along.classifier)
    for i in reversed(range(len(shape.layers))):
        x, z, z_t = inputs.pop(), planes.pop(), planes_t.pop()
        primal = (z, net.scales[i], net.shifts[i])
        z_bar = _block_backward(y_bar, *primal, *net.options)[0]
        _, z_bar_t, scale_bar_t, shift_bar_t = _block_backward_jvp(
            y_bar, y_bar_t, *primal, z_t, along.scales[i], along.shifts[i], *net.options
        )
        terms = [net.weight_gradient(i, x, z_bar_t)]
        if i:
            terms.append(net.weight_gradient(i, inputs_t.pop(), z_bar))
            both = net.input_gradient(i, z_bar, cast(Tensor, pairs[i])).unflatten(1, (net.students, 2, -1))
            y_bar, cross = (half.flatten(1, 2) for half in both.unbind(2))
        else:
            cross = net.input_gradient(i, z_bar, along.weights[i])
        y_bar_t = net.input_gradient(i, z_bar_t, net.weights[i]).add_(cross)
        slots.block(i, scale_bar_t, shift_bar_t, *terms)
    images_grad = y_bar_t.to(theta.dtype).unflatten(1, (net.students, -1)).transpose(0, 1)
    return loss.slope(logits_t), curvature, images_grad, loss.labels_grad(logits_t)


def kept_bytes(
    shape: ConvNetShape, students: int, images: int, dtype: torch.dtype, precision: Resolved = "ieee"
) -> int:
    """What `gradient` keeps."""
    values = sum(
        layer.out_channels * (layer.height * layer.width + (layer.height // 2) * (layer.width // 2))
        for layer in shape.layers
    )
    return students * images * values * (2 if precision == "bf16" else dtype.itemsize)


class _Parameters:
    """theta split up, with convolutions in the precision and layout that they run in."""

    def __init__(self, shape: ConvNetShape, theta: Tensor, dtype: torch.dtype, layout: torch.memory_format):
        views = shape.slices(theta.contiguous())
        *blocks, self.classifier, self.classifier_bias = views  # [E, classes, F], [E, classes]
        # [E * K, C, 3, 3]; for one student, contiguous, without a copy
        self.weights = [_laid_out(w.flatten(0, 1), dtype, layout) for w in blocks[0::4]]
        self.scales = [g.flatten() for g in blocks[2::4]]  # [E * K]
        self.shifts = [t.flatten() for t in blocks[3::4]]


def _laid_out(tensor: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """By its strides, from which torch concludes the layout of a convolution's output. With one channel, a tensor
    counts as channels-last whatever they are, and `Tensor.contiguous` leaves them."""
    if layout == torch.contiguous_format:
        return tensor.to(dtype).contiguous()
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device, memory_format=layout).copy_(tensor)


class _Net(_Parameters):
    """The students at theta, and their layers."""

    def __init__(self, shape: ConvNetShape, theta: Tensor, images: Tensor, precision: Resolved):
        if theta.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"theta: expected float32 or float64, got {theta.dtype}")
        if images.dtype != theta.dtype or images.device != theta.device:
            wanted, got = (f"{t.dtype} on {t.device}" for t in (theta, images))
            raise TypeError(f"images: expected {wanted} as theta, got {got}")
        sizes = (shape.channels, shape.height, shape.width_px)
        students = () if images.dim() == 4 else (len(theta),)
        if images.shape[-3:] != sizes or images.shape[:-4] != students or images.shape[-4] == 0:
            raise ValueError(f"images: expected [{len(theta)}, N, {sizes}] or [N, {sizes}], got {list(images.shape)}")
        self.dtype = torch.bfloat16 if precision == "bf16" else theta.dtype
        # tensor cores read channels last: given another layout, cuDNN transposes on the way in and out
        self.layout = torch.channels_last if rounds_convolutions(precision) else torch.contiguous_format
        super().__init__(shape, theta, self.dtype, self.layout)
        self.shape = shape
        self.students = len(theta)
        self.options = (shape.eps, True, True)  # of the block: ReLU and pool
        self.shared = images.dim() == 4
        x = images if self.shared else images.transpose(0, 1).flatten(1, 2)
        self.images = _laid_out(x, self.dtype, self.layout)  # [N, C, H, W] or [N, E * C, H, W]
        self.kept: tuple[Tensor, ...] = ()  # each block's convolution's output, then each block's output

    def forward(self, kept: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Per block its input and its convolution's output; the features ``[E, N, F]``.

        ``kept``: what an earlier pass kept."""
        planes, outputs = list(kept[: len(kept) // 2]), list(kept[len(kept) // 2 :])
        if not kept:
            for i, weight in enumerate(self.weights):
                planes.append(self.convolve(i, outputs[-1] if i else self.images, weight))
                outputs.append(_block(planes[-1], self.scales[i], self.shifts[i], *self.options))
            self.kept = (*planes, *outputs)
        return [self.images, *outputs[:-1]], planes, self.to_features(outputs[-1])

    def classify(self, features: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = self.classifier_bias if bias is None else bias
        return torch.baddbmm(bias.unsqueeze(1), features, self.classifier.mT)

    def to_features(self, x: Tensor) -> Tensor:
        """[N, E * K, h, w] -> [E, N, K * h * w]"""
        return x.unflatten(1, (self.students, -1)).transpose(0, 1).flatten(2).to(self.classifier.dtype)

    def to_planes(self, features: Tensor) -> Tensor:
        """The inverse."""
        last = self.shape.layers[-1]
        planes = features.unflatten(2, (last.out_channels, last.height // 2, last.width // 2))
        return planes.transpose(0, 1).flatten(1, 2).to(self.dtype)

    def side_by_side(self, a: Tensor, b: Tensor) -> Tensor:
        """[N, E * C, H, W] twice -> [N, E * 2C, H, W], each student's a before its b."""
        N, channels, H, W = a.shape
        size = (N, 2 * channels, H, W)
        both = torch.empty(size, dtype=a.dtype, device=a.device, memory_format=self.layout)
        for half, part in zip(both.unflatten(1, (self.students, 2, -1)).unbind(2), (a, b), strict=True):
            half.copy_(part.unflatten(1, (self.students, -1)))
        return both

    def convolve(self, i: int, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, weight, None, *self._geometry(i), self._groups(i))

    def input_gradient(self, i: int, z_bar: Tensor, weight: Tensor) -> Tensor:
        """dgrad, a transposed convolution. Per student even if the images are shared."""
        stride, padding, dilation, _, output_padding = self._geometry(i)
        return torch.ops.aten.convolution(
            z_bar, weight, None, stride, padding, dilation, True, output_padding, self.students
        )

    def weight_gradient(self, i: int, x: Tensor, z_bar: Tensor) -> Tensor:
        """wgrad, [E * K, C, 3, 3]"""
        mask = [False, True, False]
        arguments = (z_bar, x, self.weights[i], None, *self._geometry(i), self._groups(i), mask)
        return torch.ops.aten.convolution_backward(*arguments)[1]

    def _geometry(self, i: int) -> tuple:
        """Stride, padding, dilation, transposed, output padding."""
        padding = self.shape.layers[i].padding
        return [1, 1], [padding, padding], [1, 1], False, [0, 0]

    def _groups(self, i: int) -> int:
        return 1 if i == 0 and self.shared else self.students


class _CrossEntropy:
    """Each student's mean cross entropy over logits ``[E, N, K]``, and its derivatives.

    With l the logits, P their softmax, s the labels' sum (1, unless labels are not a distribution) and c = l_t -
    <P, l_t>: bar = (s P - y) / N, bar_t = s P c / N, and <bar, l_t>, the derivative of the loss along nu, changes with
    y by -c / N.
    """

    def __init__(self, logits: Tensor, labels: Tensor, label_kind: LabelKind):
        E, N, K = logits.shape
        check_choice("label_kind", label_kind, ("hard", "logits", "probs"))
        hard = label_kind == "hard"
        wanted = torch.int64 if hard else logits.dtype
        if labels.dtype != wanted or labels.device != logits.device:
            raise TypeError(
                f"labels: expected {wanted} on {logits.device} for label_kind={label_kind!r}, "
                f"got {labels.dtype} on {labels.device}"
            )
        sizes = (N,) if hard else (N, K)
        if labels.shape not in (sizes, (E, *sizes)):
            raise ValueError(f"labels: expected {list(sizes)} or {[E, *sizes]}, got {list(labels.shape)}")
        self.label_kind, self.count = label_kind, N
        if hard:
            index = labels.expand(E, N).unsqueeze(-1)
            self.targets = torch.zeros_like(logits).scatter_(-1, index, 1.0)
        else:
            self.targets = labels.softmax(-1) if label_kind == "logits" else labels
        log_probabilities = logits.log_softmax(-1)
        self.value = -(self.targets * log_probabilities).sum(-1).mean(-1)  # [E]
        self.probabilities = log_probabilities.exp()
        self.total = self.targets.sum(-1, keepdim=True)
        self.bar = (self.total * self.probabilities - self.targets) / N

    def _centred(self, logits_t: Tensor) -> Tensor:
        return logits_t - (self.probabilities * logits_t).sum(-1, keepdim=True)

    def move_along(self, logits_t: Tensor) -> Tensor:
        """bar's derivative."""
        return self.total * self.probabilities * self._centred(logits_t) / self.count

    def slope(self, logits_t: Tensor) -> Tensor:
        return (self.bar * logits_t).sum((1, 2))

    def labels_grad(self, logits_t: Tensor) -> Tensor | None:
        """The gradient of the slope."""
        if self.label_kind == "hard":
            return None
        grad = -self._centred(logits_t) / self.count
        if self.label_kind == "logits":
            grad = self.targets * (grad - (self.targets * grad).sum(-1, keepdim=True))
        return grad


class _Slots:
    """A flat result ``[E, P]``, filled parameter by parameter."""

    def __init__(self, shape: ConvNetShape, flat: Tensor):
        self.views = shape.slices(flat)

    def classifier(self, bar: Tensor, features: Tensor, *more: Tensor) -> None:
        """The sum of bar^T features over the given pairs; the bias's gradient from the first pair only."""
        weight = bar.mT @ features
        if more:
            weight += more[0].mT @ more[1]
        self.views[-2].copy_(weight)
        self.views[-1].copy_(bar.sum(1))

    def block(self, i: int, scale: Tensor, shift: Tensor, *weight_terms: Tensor) -> None:
        """Weights are summed here, in the result's dtype."""
        weight, bias, scale_slot, shift_slot = self.views[4 * i : 4 * i + 4]
        weight.copy_(weight_terms[0].view_as(weight))
        for term in weight_terms[1:]:
            weight.add_(term.view_as(weight))
        bias.zero_()
        scale_slot.copy_(scale.view_as(scale_slot))
        shift_slot.copy_(shift.view_as(shift_slot))
