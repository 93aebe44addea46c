"""UNIP (Zhang et al., ICLR 2025): a student learns the attention map of one layer of its teacher, without labels.

    loss = mean over images, heads and queries of KL(softmax(q_t k_t^T / sqrt(d_t)) || softmax(q_s k_s^T / sqrt(d_s)))

with the student's last layer, which has the teacher's number of heads. The teacher's layer is the one whose normalised
mutual information between queries and keys is nearest to ``target_nmi``: between maps that attend to the neighbourhood
(large) and maps that are alike for all queries (small). The paper's code takes the layer as an argument and optimises
by AdamW with betas (0.9, 0.95), weight decay on matrices only, a linear warm-up and half a cosine; so does this. Its
images are cropped and flipped at random; here they are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill import __version__
from pydistill._devices import to_device
from pydistill.data import Dataset, write_safetensors
from pydistill.divergence import attention_nmi
from pydistill.evaluate import linear_probe
from pydistill.methods.method import DatasetInputs, Inputs, Job, Method, check_numbers
from pydistill.methods.training import OnEpoch, half_cosine, train
from pydistill.nn.vit import ViT
from pydistill.ops import attention_map_divergence
from pydistill.seeding import Stream, seeded_generator, seeded_net

if TYPE_CHECKING:
    from pydistill.methods.runs import Run

__all__ = ["UNIP", "choose_layer", "distill_attention", "fit"]


@dataclass(frozen=True)
class UNIP(Method):
    """UNIP's hyper-parameters; `preset` has the values for a data set."""

    name: ClassVar[str] = "unip"
    about: ClassVar[str] = "UNIP: a teacher's attention into a smaller transformer, without labels"
    paper: ClassVar[str] = "Zhang et al., ICLR 2025"
    group: ClassVar[str] = "networks"
    # with sixteen tokens the first layer's map is nearest to 0.09, and has little to teach
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {"target_nmi": 0.07},
        "fashion-mnist": {"teacher_epochs": 4, "epochs": 3, "batch_size": 128, "warmup_epochs": 1},
        **{name: {"target_nmi": 0.07} for name in ("cifar10", "cifar100", "image-folder")},
    }
    inputs: ClassVar[type[Inputs]] = DatasetInputs
    state_kind: ClassVar[str] = "UNIP state"

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
    """Attention heads of both."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    teacher_epochs: int = 25
    """Passes of the teacher over the labelled training images."""
    epochs: int = 40
    """Passes of the student over the training images."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate of both."""
    weight_decay: float = 0.05
    """Weight decay of AdamW, on matrices."""
    warmup_epochs: int = 4
    """Epochs over which the learning rate rises."""
    seed: int = 0
    """Seed of the initial parameters and the order of the images."""

    def __post_init__(self) -> None:
        counts = ("epochs", "teacher_epochs", "batch_size", "width", "depth", "teacher_width", "teacher_depth", "heads")
        check_numbers(self, **dict.fromkeys(counts, 1), patch_size=1, lr=0.0, weight_decay=0, warmup_epochs=0, seed=0)
        if not 0 <= self.target_nmi <= 1:
            raise ValueError(f"target_nmi: expected a number in [0, 1], got {self.target_nmi}")
        if not -1 <= self.layer < self.teacher_depth:
            raise ValueError(f"layer: expected -1 or one of {self.teacher_depth} blocks, got {self.layer}")

    def unused(self, inputs: DatasetInputs) -> dict[str, str]:
        return {} if self.layer < 0 else {"target_nmi": f" with layer={self.layer}"}

    def job(self, inputs: DatasetInputs, device: torch.device) -> UNIPJob:
        return UNIPJob(self, inputs, device)

    def optimisation(self) -> dict[str, Any]:
        """The arguments of `fit` for both networks."""
        names = ("batch_size", "lr", "weight_decay", "warmup_epochs", "seed")
        return {name: getattr(self, name) for name in names}

    def networks(self, channels: int, num_classes: int, image_size: int) -> tuple[Callable[[], ViT], Callable[[], ViT]]:
        """Functions that build the teacher and the student."""
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
    images: Tensor,
    *,
    student: ViT,
    teacher: ViT,
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
        images: ``[N, C, H, W]``, without labels.
        student: its last block has as many heads and tokens as the teacher's layer; feature sizes may differ.
        teacher: whose parameters are not touched.
        layer: of the teacher; "nmi" takes that of `choose_layer` on the first 256 images.
        target_nmi: see `choose_layer`.
        epochs: passes over the images.
        state: see `fit`, to continue from; the student need not be as it was then.
        on_epoch: see `fit`.
        backend: see `attention_map_divergence`.
        optimisation: arguments of `fit`: batch_size, lr, weight_decay, warmup_epochs, seed.

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

    An epoch's order depends on ``(seed, stream, epoch)`` alone, and ``on_epoch(record, state)`` receives what the next
    epoch continues from: with that ``state`` a run continues to the same bits as an uninterrupted one.

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
    device = next(net.parameters()).device
    steps = -(-count // batch_size)

    def batches(epoch: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        order = torch.randperm(count, generator=seeded_generator(seed, stream, epoch), device="cpu")
        for index in to_device(order, device).split(batch_size):
            yield len(index), partial(loss, index)

    def rate(highest: float, epoch: int, step: int) -> float:
        at = epoch + step / steps
        rising = min(1.0, (at + 1 / steps) / warmup_epochs) if warmup_epochs else 1.0
        return highest * rising * half_cosine(max(0.0, at - warmup_epochs), max(1, epochs - warmup_epochs))

    train(
        net,
        optimizer,
        batches,
        epochs=epochs,
        steps=steps,
        rate=rate,
        state=state,
        state_name="adam",
        on_epoch=on_epoch,
    )


class UNIPJob(Job):
    """Trains a teacher on labels, a student on its attention, and probes the features of both.

    The run leaves teacher.safetensors and student.safetensors, and test accuracies of a linear classifier on the
    features of the teacher, the student, and the untrained student.
    """

    made = ("student.safetensors",)
    data: Dataset

    def __init__(self, config: UNIP, inputs: DatasetInputs, device: torch.device):
        self.config, self.inputs, self.data = config, inputs, inputs.load(device)
        self.title, self.results = self.data.name, {}
        data = self.data
        make_teacher, make_student = config.networks(data.channels, data.num_classes, data.image_size)
        self.teacher = seeded_net(make_teacher, config.seed, Stream.UNIP_TEACHER, device=device)
        self.student, self.random = (
            seeded_net(make_student, config.seed, Stream.UNIP_STUDENT, device=device) for _ in range(2)
        )

    def phases(self) -> Sequence[Callable[[Run], None]]:
        return self.train_teacher, self.train_student, self.probe

    def train_teacher(self, run: Run) -> None:
        images, labels, epochs = self.data.train_images, self.data.train_labels, self.config.teacher_epochs

        def loss(index: Tensor) -> Tensor:
            return F.cross_entropy(self.teacher(images[index]), labels[index])

        with run.epochs("teacher", epochs) as (state, on_epoch):
            options = {"epochs": epochs, "state": state, "on_epoch": on_epoch, **self.config.optimisation()}
            fit(self.teacher, loss, len(images), **options)
        self._keep(run, "teacher", self.teacher)

    def train_student(self, run: Run) -> None:
        config, images = self.config, self.data.train_images
        layer, nmi = choose_layer(self.teacher, images[:256], config.target_nmi)
        layer = layer if config.layer < 0 else config.layer
        with run.epochs("student", config.epochs) as (state, on_epoch):
            options = {"epochs": config.epochs, "state": state, "on_epoch": on_epoch, **config.optimisation()}
            distill_attention(images, student=self.student, teacher=self.teacher, layer=layer, **options)
        self._keep(run, "student", self.student, layer=layer)
        self.results = {"layer": layer, "nmi": nmi}

    def probe(self, run: Run) -> None:
        data = self.data
        splits = data.train_images, data.train_labels, data.test_images, data.test_labels
        for name, net in {"teacher": self.teacher, "student": self.student, "random": self.random}.items():
            self.results[name] = {"linear_probe": linear_probe(net, *splits)}
            run.stop()

    def _keep(self, run: Run, name: str, net: ViT, **more: Any) -> None:
        config = {**self.stored(), "pydistill": __version__, **more}
        write_safetensors(run.folder / f"{name}.safetensors", net.state_dict(), "ViT", config)
