"""KRR-ST (Lee et al., ICLR 2024): images and targets on which a network is pre-trained, distilled without labels.

With a pool of networks, of which each outer step takes one, and a self-supervised target network T:

    outer   loss = krr_loss(f(x_real), f(x_syn), y_real=T(x_real), y_syn=y_syn) to x_syn and y_syn, by AdamW
    inner   one step of that network, head and all, on mean (net(x_syn) - y_syn)^2, by SGD

f is the network's features in evaluation mode, with a column of ones. As in the paper's code: a network enters the pool
after a random number of inner steps and is replaced after ``online_steps`` of them; the images start as real ones and
the targets as T's output for them. Here T is an `Encoder` trained by Barlow Twins on the set itself, its mean-pooled
features standardised (the code uses a ResNet-18 trained on the source set).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill._devices import to_device
from pydistill.data import Dataset
from pydistill.evaluate import linear_probe
from pydistill.matching import krr_loss
from pydistill.methods.method import DatasetInputs, Inputs, Job, Method, OptionError, check_numbers
from pydistill.methods.networks.self_supervised import Encoder, barlow_twins, check_batch
from pydistill.seeding import Stream, seeded_generator, seeded_net

if TYPE_CHECKING:
    from pydistill.methods.runs import Run

__all__ = ["KRRST", "Pool", "krr_st", "pretrain", "target_features"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class KRRSTInputs(DatasetInputs):
    """The data set."""

    checkpoint_every: int = 50
    """Iterations between checkpoints."""


@dataclass(frozen=True)
class KRRST(Method):
    """KRR-ST's hyper-parameters; `preset` has the values for a data set."""

    name: ClassVar[str] = "krr_st"
    about: ClassVar[str] = "KRR-ST: images on which a network is pre-trained, without labels"
    paper: ClassVar[str] = "Lee et al., ICLR 2024"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "digits": {},
        "fashion-mnist": {"iterations": 400, "target_epochs": 2},
    }
    inputs: ClassVar[type[Inputs]] = KRRSTInputs

    images: int = 100
    """Number of synthetic images."""
    iterations: int = 500
    """Outer steps."""
    batch_real: int = 128
    """Real images per outer step."""
    lr: float = 1e-2
    """Learning rate of AdamW on images and targets, falling linearly to zero."""
    lam: float = 1e-6
    """Ridge in units of the trace of the kernel."""
    pool: int = 4
    """Number of networks."""
    online_steps: int = 100
    """Inner steps of a network before it is replaced."""
    lr_net: float = 0.1
    """Learning rate of SGD on a network, with momentum 0.9 and weight decay 1e-3."""
    width: int = 16
    """Channels of the networks' first block; 128 in the paper."""
    depth: int = 3
    """Blocks of the networks."""
    target_epochs: int = 30
    """Passes of the target network over the training images."""
    pretrain_steps: int = 200
    """Full-batch steps of a fresh network on the distilled set, before its features are probed."""
    probe_images: int = 100
    """Labelled training images of the linear probe; with thousands of them, any features tell digits apart."""
    students: int = 3
    """Fresh networks for each accuracy."""
    seed: int = 0
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        counts = ("images", "iterations", "batch_real", "pool", "online_steps", "target_epochs", "students")
        more = ("width", "depth", "probe_images")
        check_numbers(self, **dict.fromkeys((*counts, *more), 1), pretrain_steps=0, lr=0.0, lr_net=0.0, lam=0, seed=0)

    def job(self, inputs: KRRSTInputs, device: torch.device) -> KRRSTJob:
        return KRRSTJob(self, inputs, device)

    def encoder(self, channels: int, outputs: int, image_size: int) -> Encoder:
        return Encoder(channels, outputs, self.width, self.depth, image_size)


@torch.no_grad()
def target_features(target: Encoder, images: Tensor) -> Tensor:
    """The target network's mean-pooled features of ``images``, standardised over them, ``[N, q]``."""
    target.eval()
    features = torch.cat([target.pooled(part) for part in images.split(500)])
    return (features - features.mean(0)) / (features.std(0) + 1e-6)


class Pool:
    """Networks of different ages, each trained on the synthetic images by SGD.

    Attributes:
        nets: the current networks.
        ages: inner steps that each has taken, ``[pool]``.
        born: how many have been made so far.
    """

    def __init__(self, config: KRRST, channels: int, outputs: int, image_size: int, device: torch.device | str):
        self.config, self._device = config, device
        self._make = lambda: config.encoder(channels, outputs, image_size)
        self.born = config.pool
        self.nets = [seeded_net(self._make, config.seed, Stream.POOL, i, device=device) for i in range(config.pool)]
        self.ages = torch.zeros(config.pool, dtype=torch.int64, device="cpu")
        self._optimizers = [self._sgd(net) for net in self.nets]

    def fill(self, x: Tensor, y: Tensor) -> Iterator[None]:
        """Trains each network to a random age; yields after each step."""
        until = torch.randint(
            self.config.online_steps,
            (len(self.nets),),
            generator=seeded_generator(self.config.seed, Stream.POOL_AGES),
            device="cpu",
        )
        for i, steps in enumerate(until.tolist()):
            for _ in range(steps):
                self.step(i, x, y)
                yield

    def step(self, i: int, x: Tensor, y: Tensor) -> None:
        """One inner step of network i; a network that is old enough is replaced by a fresh one."""
        if self.ages[i] >= self.config.online_steps:
            self.nets[i] = seeded_net(self._make, self.config.seed, Stream.POOL, self.born, device=self._device)
            self._optimizers[i] = self._sgd(self.nets[i])
            self.ages[i], self.born = 0, self.born + 1
        _step(self.nets[i], self._optimizers[i], x, y)
        self.ages[i] += 1

    def _sgd(self, net: Encoder) -> torch.optim.SGD:
        return torch.optim.SGD(net.parameters(), self.config.lr_net, momentum=0.9, weight_decay=1e-3)

    def state(self) -> State:
        state = {"ages": self.ages.clone(), "born": torch.tensor(self.born, device="cpu")}
        for i, (net, optimizer) in enumerate(zip(self.nets, self._optimizers, strict=True)):
            state |= {f"net.{i}.{name}": value.clone() for name, value in net.state_dict().items()}
            for name, p in net.named_parameters():
                if p in optimizer.state:
                    state[f"momentum.{i}.{name}"] = optimizer.state[p]["momentum_buffer"].clone()
        return state

    def restore(self, state: State) -> None:
        self.ages, self.born = state["ages"].clone(), int(state["born"])
        for i, net in enumerate(self.nets):
            net.load_state_dict({name: state[f"net.{i}.{name}"] for name in net.state_dict()})
            for name, p in net.named_parameters():
                if f"momentum.{i}.{name}" in state:
                    momentum = state[f"momentum.{i}.{name}"].to(p.device, copy=True)
                    self._optimizers[i].state[p] = {"momentum_buffer": momentum}


def krr_st(
    config: KRRST,
    images: Tensor,
    targets: Tensor,
    *,
    state: State | None = None,
    on_step: Callable[[dict[str, Any], Callable[[], State]], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Distils ``images`` ``[N, C, H, W]`` and their ``targets`` ``[N, q]``: synthetic images and targets.

    ``on_step(record, state)`` is called after each outer step; passing the result of its ``state()`` as ``state``
    continues to the same bits as an uninterrupted run.

    Raises:
        ValueError: fewer real images than synthetic ones or than a batch.
        FloatingPointError: the loss is not finite.
    """
    if len(images) < max(config.images, config.batch_real):
        raise ValueError(f"images: expected {max(config.images, config.batch_real)} or more, got {len(images)}")
    (x, y), device = initial(config, images, targets), images.device
    pool = Pool(config, images.shape[1], targets.shape[1], images.shape[2], device)
    optimizer = torch.optim.AdamW([x.requires_grad_(), y.requires_grad_()], config.lr, weight_decay=0.0)
    done = 0
    if state is None:
        for _ in pool.fill(x.detach(), y.detach()):
            pass
    else:
        done = int(state["iteration"])
        pool.restore(state)
        with torch.no_grad():
            for name, p in (("x", x), ("y", y)):
                p.copy_(state[name])
                moments = {key: state[f"{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {key: m if key == "step" else m.to(device) for key, m in moments.items()}

    def now() -> State:
        found = {
            "iteration": torch.tensor(done, device="cpu"),
            "x": x.detach().clone(),
            "y": y.detach().clone(),
            **pool.state(),
        }
        for name, p in (("x", x), ("y", y)):
            found |= {f"{name}.{key}": value.clone() for key, value in optimizer.state[p].items()}
        return found

    for iteration in range(done, config.iterations):
        generator = seeded_generator(config.seed, Stream.KRR_BATCH, iteration)
        index = torch.randperm(len(images), generator=generator, device="cpu")[: config.batch_real]
        index = to_device(index, device)
        i = int(torch.randint(config.pool, (), generator=generator, device="cpu"))
        net = pool.nets[i].eval()
        with torch.no_grad():
            f_real = net.embed(images[index])
        loss = krr_loss(f_real, net.embed(x), y_real=targets[index], y_syn=y, lam=config.lam, bias=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss of iteration {iteration + 1} is {value}: "
                f"a smaller lr or lr_net may help ({config.lr}, {config.lr_net})"
            )
        optimizer.param_groups[0]["lr"] = config.lr * (1 - iteration / config.iterations)
        x.grad, y.grad = torch.autograd.grad(loss, (x, y))
        optimizer.step()
        pool.step(i, x.detach(), y.detach())
        done = iteration + 1
        if on_step is not None:
            on_step({"iteration": done, "loss": value}, now)
    return x.detach(), y.detach()


def initial(config: KRRST, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Random real images and their targets: a run's start and its baseline."""
    order = torch.randperm(len(images), generator=seeded_generator(config.seed, Stream.KRR_IMAGES), device="cpu")
    index = order[: config.images].to(images.device)
    return images[index].clone(), targets[index].clone()


def pretrain(net: Encoder, x: Tensor, y: Tensor, config: KRRST, on_step: Callable[[], None] | None = None) -> None:
    """Trains ``net`` in place on all of ``x`` and ``y`` at once; the learning rate falls linearly to zero."""
    optimizer = torch.optim.SGD(net.parameters(), config.lr_net, momentum=0.9, weight_decay=1e-3)
    for step in range(config.pretrain_steps):
        optimizer.param_groups[0]["lr"] = config.lr_net * (1 - step / config.pretrain_steps)
        _step(net, optimizer, x, y)
        if on_step is not None:
            on_step()
    net.eval()


def _step(net: Encoder, optimizer: torch.optim.SGD, x: Tensor, y: Tensor) -> None:
    net.train()
    optimizer.zero_grad()
    F.mse_loss(net(x), y).backward()
    optimizer.step()


class KRRSTJob(Job):
    """Distils images and targets, and probes networks pre-trained on them, on random real ones and on nothing.

    The run leaves target.safetensors (the self-supervised network), distilled.safetensors (images x and targets y) and
    test accuracies of a linear classifier on the networks' features.
    """

    made = ("distilled.safetensors",)
    data: Dataset

    def __init__(self, config: KRRST, inputs: KRRSTInputs, device: torch.device):
        check_numbers(inputs, OptionError, checkpoint_every=1)
        self.config, self.inputs, self.device, self.data = config, inputs, device, inputs.load(device)
        self.title, self.results = self.data.name, {}
        check_batch(self.data.train_images)
        for name in ("images", "batch_real"):
            if (count := len(self.data.train_images)) < getattr(config, name):
                raise OptionError(name, f"expected at most {count}, got {getattr(config, name)}")
        self.target = self._encoder(1, Stream.TARGET)

    def opened(self, run: Run) -> None:
        self.state = run.checkpoint("checkpoint.safetensors")
        self.distilled_before = (run.folder / "distilled.safetensors").exists()

    def stands(self, run: Run, record: dict[str, Any]) -> bool:
        done = int(self.state["iteration"]) if self.state else 0
        return self.distilled_before or record["iteration"] <= done

    def phases(self) -> Sequence[Callable[[Run], None]]:
        return self.train_target, self.distil, self.probe

    def train_target(self, run: Run) -> None:
        config, images = self.config, self.data.train_images

        def make() -> dict[str, Tensor]:
            barlow_twins(self.target, images, epochs=config.target_epochs, seed=config.seed, on_step=run.stop)
            return self.target.state_dict()

        self.target.load_state_dict(run.kept("target.safetensors", make))
        self.targets = target_features(self.target, images)

    def distil(self, run: Run) -> None:
        name, every = "checkpoint.safetensors", self.inputs.checkpoint_every

        def on_step(record: dict[str, Any], now: Callable[[], State]) -> None:
            run.log(record)
            if run.stopping or record["iteration"] % every == 0:
                run.write_checkpoint(name, now())
            run.stop()

        def make() -> State:
            x, y = krr_st(self.config, self.data.train_images, self.targets, state=self.state, on_step=on_step)
            return {"x": x, "y": y}

        self.distilled = run.kept("distilled.safetensors", make)
        (run.folder / name).unlink(missing_ok=True)

    def probe(self, run: Run) -> None:
        config, data = self.config, self.data
        sets = {
            "nothing": None,
            "random": initial(config, data.train_images, self.targets),
            "distilled": (self.distilled["x"].to(self.device), self.distilled["y"].to(self.device)),
        }
        for name, pair in sets.items():
            self.results[name] = []
            for student in range(config.students):
                net = self._encoder(self.targets.shape[1], Stream.PRETRAINED, student)
                if pair is not None:
                    pretrain(net, *pair, config, run.stop)
                self.results[name].append(self._probed(net))
                run.stop()
        self.results["target"] = [self._probed(self.target)]

    def _probed(self, net: Encoder) -> float:
        data, some = self.data, slice(self.config.probe_images)
        splits = data.train_images[some], data.train_labels[some], data.test_images, data.test_labels
        return linear_probe(net.eval(), *splits)

    def _encoder(self, outputs: int, *key: int) -> Encoder:
        data = self.data
        make = lambda: self.config.encoder(data.channels, outputs, data.image_size)  # noqa: E731
        return seeded_net(make, self.config.seed, *key, device=self.device)
