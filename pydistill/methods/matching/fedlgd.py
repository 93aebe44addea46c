"""FedLGD: federated learning on distilled data, local and global.

Huang et al., "Federated Learning on Virtual Heterogeneous Data with Local-Global Distillation", TMLR 2024. Each round,
every client moves its synthetic images by distribution matching with its real ones, and towards the server's; the
clients train the global model on synthetic images, theirs and the server's, held together by a regulariser, and are
averaged; the server moves its images by matching the average of the clients' gradients. The result is the server's set.

The clients are simulated: under `torch.distributed` each rank has some of them, in one process they take turns, with
the same bits if the arithmetic is the same (torch's matrix products depend on the number of threads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill._devices import read, to_device
from pydistill.augment import DiffAugment
from pydistill.data import Dataset
from pydistill.divergence import contrastive_ce
from pydistill.matching import class_mean_match, gradient_match, mmd
from pydistill.methods.config import Config
from pydistill.methods.distilling import DistillInputs
from pydistill.methods.outer import State, fresh_parameters
from pydistill.methods.ranks import sum_over_ranks, world
from pydistill.nn.student import Student
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import FlatModule

# On small sets, fresh models are more informative than trained ones: rounds are short, each with a new model.
_SMALL = {"iterations": 40, "clients": 3, "local_steps": 5, "batch_real": 32, "train_steps": 2, "server_steps": 10}
_SMALL |= {"restart": 1}
_TEN = {**_SMALL, "lr_server": 10.0}  # one image among many contributes less to their joint gradient


class _WithFeatures(nn.Module):
    """Maps images to the features before the classifier and the logits."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = cast(Student, net)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net.embed(x)
        return features, self.net.classifier(features)


class _Client(NamedTuple):
    shard: Tensor  # its real images, by their numbers
    classes: Tensor  # that it has images of, ascending, on the CPU
    members: list[Tensor]  # of each of these, by their places in the shard, on the CPU


@dataclass(frozen=True)
class FedLGD(Config):
    """Hyper-parameters; an iteration is a federated round."""

    name: ClassVar[str] = "fedlgd"
    about: ClassVar[str] = "federated: clients match features, the server gradients"
    paper: ClassVar[str] = "Huang et al., TMLR 2024"
    student_lr: ClassVar[str] = "lr_model"
    presets: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {
        "digits": {1: _SMALL, 10: _TEN},
        "fashion-mnist": {1: _SMALL, 10: _TEN},
        "cifar10": {
            50: {"iterations": 100, "clients": 10, "local_steps": 100, "server_steps": 500}
            | {"augment": "color_crop_cutout_flip_scale_rotate"}
        },
    }

    clients: int = 5
    """Clients that the real images are spread over."""
    split: Literal["dirichlet", "class"] = "dirichlet"
    """How real images are spread over the clients: shares of each class, or whole classes."""
    alpha: float = 0.5
    """Parameter of the Dirichlet distribution of the shares; the smaller, the more heterogeneous."""
    local_steps: int = 100
    """Steps of a client's images, in a round."""
    batch_real: int = 256
    """Real images of a class in a step of a client's images, at most."""
    lr_local: float = 1.0
    """Learning rate of a client's images."""
    pull: float = 0.1
    """Weight of the distance between a client's and the server's mean features."""
    train_steps: int = 20
    """Steps of a client's model, in a round."""
    lr_model: float = 0.01
    """Learning rate of SGD on a client's model, and of students on the result."""
    regulariser: Literal["supcon", "mmd"] = "supcon"
    """What holds local and server features together in a client's training."""
    weight: float = 0.1
    """Weight of the regulariser."""
    temperature: float = 0.07
    """Temperature of the regulariser supcon."""
    restart: int | None = None
    """Rounds after which the global model is reset; never by default."""
    server_steps: int = 500
    """Steps of the server's images, in a round."""
    lr_server: float = 0.1
    """Learning rate of the server's images."""
    momentum: float = 0.5
    """Momentum of the images' updates, within a round."""

    def unused(self, inputs: DistillInputs) -> dict[str, str]:
        unused = super().unused(inputs)
        if self.split != "dirichlet":
            unused["alpha"] = f" with split={self.split}"
        if self.regulariser != "supcon":
            unused["temperature"] = f" with regulariser={self.regulariser}"
        return unused

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision == "bf16":
            raise ValueError("precision: expected a float32 one, in which all models train, got 'bf16'")
        if not self.alpha > 0 or not self.temperature > 0:
            raise ValueError(f"alpha, temperature: expected positive numbers, got {self.alpha}, {self.temperature}")

    def shards(self, dataset: Dataset) -> list[Tensor]:
        """The indices of each client's real images."""
        random = np.random.default_rng([self.seed, 8])
        owners = random.permutation(dataset.num_classes) % self.clients  # of each class, in split "class"
        shards: list[list[Tensor]] = [[] for _ in range(self.clients)]
        for label in range(dataset.num_classes):
            members = (dataset.train_labels.cpu() == label).nonzero()[:, 0]
            members = members[torch.from_numpy(random.permutation(len(members)))]
            if self.split == "class":
                shards[owners[label]].append(members)
                continue
            shares = random.dirichlet(np.full(self.clients, self.alpha)).cumsum()[:-1]
            parts = members.tensor_split((shares * len(members)).astype(int).tolist())
            for shard, part in zip(shards, parts, strict=True):
                shard.append(part)
        return [
            torch.cat(shard).sort().values if shard else torch.zeros(0, dtype=torch.int64, device="cpu")
            for shard in shards
        ]

    def check(self, dataset: Dataset, net: nn.Module, experts: Any) -> list[_Client]:
        if not hasattr(net, "embed") or not hasattr(net, "classifier"):
            raise ValueError(f"net: expected one with embed and classifier, {type(net).__name__} lacks them")
        if world()[1] > self.clients:
            raise ValueError(f"clients: expected one for each of {world()[1]} ranks, got {self.clients}")
        shards = self.shards(dataset)
        for client, shard in enumerate(shards):
            if not len(shard):
                raise ValueError(f"clients: expected few enough that each has images, client {client} has none")
        labels = dataset.train_labels.cpu()
        clients = []
        for shard in shards:
            own = labels[shard]
            classes = own.unique()
            members = [(own == label).nonzero()[:, 0] for label in classes]
            clients.append(_Client(shard.to(dataset.train_images.device), classes, members))
        return clients

    def initial(self, dataset: Dataset, net: nn.Module, experts: list[_Client]) -> State:
        """The clients start from real images, the server from noise with each class's mean and deviation by pixel."""
        x, y = dataset.train_images, dataset.train_labels
        local = []
        for client, (shard, _, classes) in enumerate(experts):
            generator = seeded_generator(self.seed, Stream.SYNTHETIC, client)
            for rows in classes:
                members = shard[rows.to(shard.device)]
                # a client may have fewer images of a class than it has to distil
                order = torch.randperm(len(members), generator=generator, device="cpu").repeat(
                    -(-self.ipc // len(members))
                )
                local.append(x[members[order[: self.ipc].to(members.device)]])
        generator, images = seeded_generator(self.seed, Stream.SYNTHETIC, self.clients), []
        for label in range(dataset.num_classes):
            members = x[y == label]
            noise = torch.randn(self.ipc, *x.shape[1:], generator=generator, dtype=torch.float32, device="cpu").to(x)
            images.append(members.mean(0) + members.std(0, correction=0) * noise)
        labels = torch.arange(dataset.num_classes, device=x.device).repeat_interleave(self.ipc)
        tensors = {"images": torch.cat(images), "labels": labels, "lr": x.new_tensor(self.lr_model)}
        theta = fresh_parameters(net, self.seed, Stream.OUTER_STEP_NET, like=x)
        return State({**tensors, "theta": theta, "local": torch.cat(local)})

    def step(self, state: State, dataset: Dataset, net: nn.Module, experts: list[_Client]) -> dict[str, Any]:
        flat, (rank, ranks) = FlatModule(_WithFeatures(net)), world()
        if self.restart and state.iteration % self.restart == 0:
            state["theta"] = fresh_parameters(
                net, self.seed, Stream.OUTER_STEP_NET, state.iteration, like=state["theta"]
            )
        labels = [to_device(client.classes.repeat_interleave(self.ipc), state["labels"].device) for client in experts]
        parts = [images.clone() for images in state["local"].split([len(y) for y in labels])]
        # Each rank fills in its clients' results: the sum over ranks only adds zeros, so it does not round.
        own = [client for client in range(self.clients) if client % ranks == rank]
        thetas = state["theta"].new_zeros(self.clients, flat.numel)
        losses = thetas.new_zeros(self.clients)
        for client, part in enumerate(parts):
            if client in own:
                generator = seeded_generator(self.seed, Stream.OUTER_STEP, state.iteration, client)
                parts[client] = self._distil_local(
                    flat, state, part, labels[client], dataset, experts[client], generator
                )
                thetas[client], losses[client] = self._train(flat, state, parts[client], labels[client], generator)
            else:
                parts[client] = torch.zeros_like(part)
        state["local"], thetas, losses = sum_over_ranks([torch.cat(parts), thetas, losses])
        sizes = torch.tensor([len(client.shard) for client in experts], dtype=thetas.dtype, device="cpu")
        shares = to_device(sizes, thetas.device) / len(dataset.train_labels)
        state["theta"] = shares @ thetas
        parts, gradients = state["local"].split([len(y) for y in labels]), torch.zeros_like(thetas)
        for client in own:
            theta = state["theta"].detach().requires_grad_()
            loss = F.cross_entropy(flat(theta, parts[client])[1], labels[client])
            (gradients[client],) = torch.autograd.grad(loss, theta)
        (gradients,) = sum_over_ranks([gradients])
        images, loss = torch.zeros_like(state["images"]), torch.zeros_like(shares[0])
        if rank == 0:
            images, loss = self._distil_server(flat, state, shares @ gradients)
        state["images"], loss = sum_over_ranks([images, loss])
        found, of_clients = read(loss, shares @ losses)
        return {"loss": found, "lr": self.lr_model, "client_loss": of_clients}

    def _distil_local(
        self,
        flat: FlatModule,
        state: State,
        images: Tensor,
        labels: Tensor,
        dataset: Dataset,
        client: _Client,
        generator: Any,
    ) -> Tensor:
        """A client's images, moved by distribution matching under the global model."""
        augment, own = DiffAugment(self.augment, siamese=True), State({"images": images})
        theta, (server, server_labels) = state["theta"], (state["images"], state["labels"])
        x, y, classes = dataset.train_images[client.shard], dataset.train_labels[client.shard], dataset.num_classes
        known = to_device(
            (client.classes[:, None] * self.ipc + torch.arange(self.ipc, device="cpu")).flatten(), x.device
        )
        for _ in range(self.local_steps):
            draws = [rows[torch.randperm(len(rows), generator=generator, device="cpu")] for rows in client.members]
            real = to_device(torch.cat([rows[: self.batch_real] for rows in draws]), x.device)
            record = augment.draw((1, *x.shape[1:]), generator)  # one for all images that are compared
            wanted = own["images"].detach().requires_grad_()
            f_syn, f_real, f_server = (
                flat(theta, augment(batch, record.expand(len(batch), -1)))[0]
                for batch in (wanted, x[real], server[known])
            )
            loss = class_mean_match(f_real.detach(), f_syn, y[real], labels, num_classes=classes)
            pull = class_mean_match(f_server.detach(), f_syn, server_labels[known], labels, num_classes=classes)
            (grad,) = torch.autograd.grad(loss + self.pull * pull, wanted)
            own.descend("images", grad, self.lr_local, self.momentum)
        return own["images"]

    def _train(
        self, flat: FlatModule, state: State, images: Tensor, labels: Tensor, generator: Any
    ) -> tuple[Tensor, Tensor]:
        """A client's model after its training, and its last loss."""
        theta, augment = state["theta"], self.augmentation()
        x, y = torch.cat([images, state["images"]]), torch.cat([labels, state["labels"]])
        for _ in range(self.train_steps):
            theta = theta.detach().requires_grad_()
            batch = x if augment is None else augment(x, augment.draw(x.shape, generator))
            f, logits = flat(theta, batch)
            if self.regulariser == "supcon":
                apart = contrastive_ce(f, None, scale=1 / self.temperature, labels=y, exclude_self=True)
            else:
                apart = mmd(f[: len(images)], f[len(images) :])
            loss = F.cross_entropy(logits, y) + self.weight * apart
            theta = theta - self.lr_model * torch.autograd.grad(loss, theta)[0]
        return theta.detach(), loss.detach()

    def _distil_server(self, flat: FlatModule, state: State, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The server's images, moved to match the clients' gradient, and the initial distance from it."""
        own, target = State({"images": state["images"]}), list(flat.unflatten(gradient).values())
        losses = []
        for _ in range(self.server_steps):
            wanted, theta = own["images"].detach().requires_grad_(), state["theta"].detach().requires_grad_()
            loss = F.cross_entropy(flat(theta, wanted)[1], state["labels"])
            (found,) = torch.autograd.grad(loss, theta, create_graph=True)
            losses.append(gradient_match(grads_real=target, grads_syn=list(flat.unflatten(found).values())))
            (grad,) = torch.autograd.grad(losses[-1], wanted)
            own.descend("images", grad, self.lr_server, self.momentum)
        return own["images"], losses[0].detach()
