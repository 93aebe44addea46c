"""UNIP (Zhang et al., ICLR 2025): a student learns the attention map of one layer of its teacher, without labels.

    loss = mean over images, heads and queries of KL(softmax(q_t k_t^T / sqrt(d_t)) || softmax(q_s k_s^T / sqrt(d_s)))

with the student's last layer, which has the teacher's number of heads. The teacher's layer is the one whose normalised
mutual information between queries and keys is nearest to ``target_nmi``: between maps that attend to the neighbourhood
(large) and maps that are alike for all queries (small). The paper's code takes the layer as an argument and is
optimised by AdamW with betas (0.9, 0.95), weight decay on matrices alone, a linear warm-up and half a cosine; so is
this. Its images are cropped and flipped at random; here they are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill.divergence import attention_map_divergence, attention_nmi
from pydistill.methods.options import check_numbers
from pydistill.nn.vit import ViT
from pydistill.seeding import Stream, seeded_generator

__all__ = ["UNIP", "choose_layer", "distill_attention", "fit", "linear_probe"]

OnEpoch = Callable[[dict[str, Any], dict[str, Tensor]], None]


@dataclass(frozen=True)
class UNIP:
    """What a run of UNIP takes; `preset` has the values for a data set."""

    layer: int = -1
    """The teacher's layer, from 0; -1 chooses it by its normalised mutual information."""
    target_nmi: float = 0.09
    """The normalised mutual information of a layer worth learning from."""
    teacher_width: int = 64
    """Features of the teacher's tokens."""
    teacher_depth: int = 6
    """Blocks of the teacher."""
    width: int = 32
    """Features of the student's tokens."""
    depth: int = 3
    """Blocks of the student."""
    heads: int = 4
    """Of both."""
    patch_size: int = 4
    """Pixels of a patch's side."""
    teacher_epochs: int = 25
    """Passes of the teacher over the labelled training images."""
    epochs: int = 40
    """Passes of the student over the training images."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 1e-3
    """Learning rate of both, at its peak."""
    weight_decay: float = 0.05
    """Of AdamW, on matrices."""
    warmup_epochs: int = 4
    """Over which the learning rate rises."""
    seed: int = 0
    """Of the initial parameters and the order of the images."""

    @classmethod
    def preset(cls, dataset: str) -> UNIP:
        """The values for "digits" and "fashion-mnist"; those of digits for others."""
        if dataset == "fashion-mnist":
            return replace(cls(), teacher_epochs=4, epochs=3, batch_size=128, warmup_epochs=1)
        # on sixteen tokens a first layer's map comes nearest to 0.09, and has little to teach
        return replace(cls(), target_nmi=0.07)

    def __post_init__(self) -> None:
        counts = ("epochs", "teacher_epochs", "batch_size", "width", "depth", "teacher_width", "teacher_depth", "heads")
        check_numbers(self, **dict.fromkeys(counts, 1), patch_size=1, lr=0.0, weight_decay=0, warmup_epochs=0, seed=0)
        if not 0 <= self.target_nmi <= 1:
            raise ValueError(f"target_nmi: expected a number in [0, 1], got {self.target_nmi}")
        if not -1 <= self.layer < self.teacher_depth:
            raise ValueError(f"layer: expected -1 or one of {self.teacher_depth} blocks, got {self.layer}")

    def optimisation(self) -> dict[str, Any]:
        """What `fit` is told of both networks."""
        names = ("batch_size", "lr", "weight_decay", "warmup_epochs", "seed")
        return {name: getattr(self, name) for name in names}

    def networks(self, channels: int, num_classes: int, image_size: int) -> tuple[Callable[[], ViT], Callable[[], ViT]]:
        """What builds the teacher, and the student."""
        shape = {"image_size": image_size, "heads": self.heads, "patch_size": self.patch_size}

        def build(width: int, depth: int) -> Callable[[], ViT]:
            return lambda: ViT(channels, num_classes, width, depth, **shape)

        return build(self.teacher_width, self.teacher_depth), build(self.width, self.depth)


@torch.no_grad()
def choose_layer(teacher: ViT, images: Tensor, target_nmi: float = 0.09) -> tuple[int, list[float]]:
    """The teacher's layer whose average `attention_nmi` on ``images`` is nearest to the target, and all averages."""
    found = [float(attention_nmi(*teacher.attention(images, layer)).mean()) for layer in range(len(teacher.blocks))]
    return min(range(len(found)), key=lambda layer: abs(found[layer] - target_nmi)), found


def distill_attention(
    teacher: ViT,
    student: ViT,
    images: Tensor,
    *,
    layer: int | Literal["nmi"] = "nmi",
    target_nmi: float = 0.09,
    epochs: int = 40,
    state: dict[str, Tensor] | None = None,
    on_epoch: OnEpoch | None = None,
    backend: str = "auto",
    **optimisation: Any,
) -> int:
    """Trains ``student`` in place to attend as a layer of ``teacher`` does, and returns that layer.

    Args:
        teacher: whose parameters are not touched.
        student: its last block has as many heads and tokens as the teacher's layer; feature sizes may differ.
        images: ``[N, C, H, W]``, without labels.
        layer: of the teacher; "nmi" takes that of `choose_layer` on the first 256 images.
        target_nmi: of `choose_layer`.
        epochs: passes over the images.
        state: of `fit`, to go on from; a student as it was then need not be given.
        on_epoch: of `fit`.
        backend: of `attention_map_divergence`.
        optimisation: of `fit`: batch_size, lr, weight_decay, warmup_epochs, seed.

    Raises:
        ValueError: heads or tokens of student and teacher do not match, there is no such layer, or as `fit` does.
    """
    if layer == "nmi":
        layer, _ = choose_layer(teacher, images[:256], target_nmi)

    def loss(index: Tensor) -> Tensor:
        batch = images[index]
        with torch.no_grad():
            q_t, k_t = teacher.attention(batch, layer)
        return attention_map_divergence(*student.attention(batch), q_t, k_t, backend=backend)

    fit(
        student,
        loss,
        len(images),
        epochs=epochs,
        stream=Stream.UNIP_STUDENT,
        state=state,
        on_epoch=on_epoch,
        **optimisation,
    )
    return layer


def fit(
    net: nn.Module,
    loss: Callable[[Tensor], Tensor],
    count: int,
    *,
    epochs: int,
    stream: int = Stream.UNIP_TEACHER,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup_epochs: int = 4,
    seed: int = 0,
    state: dict[str, Tensor] | None = None,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Minimises ``loss(index)`` over batches of ``count`` images by AdamW, in place.

    An epoch's order hangs on ``(seed, stream, epoch)`` alone, and ``on_epoch(record, state)`` receives after each what
    the next one continues: with that ``state`` a run goes on to the bits of one that was not cut off.

    Raises:
        ValueError: there are no images, or the state is of another network.
        FloatingPointError: the loss is not finite.
    """
    if count < 1:
        raise ValueError(f"images: expected one at least, got {count}")
    named = dict(net.named_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    others = [p for p in named.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    done = 0
    if state is not None:
        done = int(state["epoch"])
        _restore(optimizer, named, state)
    device = next(net.parameters()).device
    steps = -(-count // batch_size)
    for epoch in range(done, epochs):
        order = torch.randperm(count, generator=seeded_generator(seed, stream, epoch), device="cpu").to(device)
        total = 0.0
        for step, index in enumerate(order.split(batch_size)):
            at = epoch + step / steps
            rising = min(1.0, (at + 1 / steps) / warmup_epochs) if warmup_epochs else 1.0
            falling = 0.5 + 0.5 * math.cos(math.pi * max(0.0, at - warmup_epochs) / max(1, epochs - warmup_epochs))
            for group in optimizer.param_groups:
                group["lr"] = lr * rising * falling
            optimizer.zero_grad()
            value = loss(index)
            value.backward()
            optimizer.step()
            total += float(value.detach()) * len(index)
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {total}: a smaller lr than {lr} may help")
        if on_epoch is not None:
            on_epoch({"epoch": epoch + 1, "loss": total / count}, _state(optimizer, named, epoch + 1))


def _state(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], epoch: int) -> dict[str, Tensor]:
    state = {"epoch": torch.tensor(epoch, device="cpu")}
    for name, p in named.items():
        state[f"net.{name}"] = p.detach()
        # the last block's parameters that have no part in its map have no gradient, and no moments
        state |= {f"adam.{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
    return state


def _restore(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
    for name, p in named.items():
        kept = state.get(f"net.{name}")
        if kept is None or kept.shape != p.shape:
            got = "none" if kept is None else list(kept.shape)
            raise ValueError(f"state: expected {name} of shape {list(p.shape)}, got {got}")
        with torch.no_grad():
            p.copy_(kept)
        moments = {key: state.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if moments["step"] is not None:
            like = {"step": moments["step"].clone()}
            like |= {key: value.to(p, copy=True) for key, value in moments.items() if key != "step"}
            optimizer.state[p] = like


def linear_probe(
    net: ViT, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, *, decay: float = 1e-3
) -> float:
    """Accuracy in [0, 1] of a logistic regression on the network's frozen features, standardised; by L-BFGS."""

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        return torch.cat([net.embed(part) for part in x.split(500)]).double()

    train, test = features(images), features(test_images)
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(int(labels.max()) + 1, train.shape[1] + 1, dtype=torch.float64, device=train.device)
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def logits(x: Tensor) -> Tensor:
        return x @ weight[:, :-1].T + weight[:, -1]

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits(train), labels) + decay * weight[:, :-1].square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return float((logits(test).argmax(1) == test_labels).double().mean())
