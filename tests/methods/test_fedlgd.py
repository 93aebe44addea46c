"""FedLGD: a round is its literal loop, ranks share the clients with the same bits, interrupted runs are resumed."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydistill.methods import FedLGD, State, distill
from pydistill.seeding import Stream, seeded_generator
from pydistill.trajectory import FlatModule
from tests.bars import make_net

SMALL = {"ipc": 2, "iterations": 2, "clients": 3, "local_steps": 2, "train_steps": 2, "server_steps": 2, "seed": 5}
SMALL |= {"lr_local": 0.5, "lr_server": 0.3, "lr_model": 0.05, "batch_real": 4, "alpha": 2.0}
CONFIGS = {
    "dirichlet, supcon": FedLGD(**SMALL),
    "class, mmd": FedLGD(**SMALL, split="class", regulariser="mmd"),
    "augmented": FedLGD(**SMALL, augment="color_crop_scale", restart=1),
}


def literal_gradient_match(found, target):
    """The distance of the rows' directions; biases have none."""
    total = 0
    for a, b in zip(found, target, strict=True):
        if a.dim() > 1:
            for row, other in zip(a.flatten(1), b.flatten(1), strict=True):
                total = total + 1 - (row @ other) / (row.norm() * other.norm() + 1e-6)
    return total


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config, dataset, **options):
    return distill(config, dataset, make_net(), **options)


def start(config, dataset):
    return config.initial(dataset, make_net(), config.check(dataset, make_net(), None))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_run_resumed_from_its_file_is_bitwise_the_unbroken_one(dataset, tmp_path, config):
    class CutOffError(Exception):
        pass

    def cut_off(state, record):
        state.save(tmp_path / "state.safetensors", config)
        raise CutOffError

    unbroken = start(config, dataset)
    before = {name: tensor.clone() for name, tensor in unbroken.tensors.items()}
    whole = run(config, dataset, state=unbroken)
    with pytest.raises(CutOffError):
        run(config, dataset, on_step=cut_off)
    torch.randn(7)  # the global random state has no effect
    resumed = State.load(tmp_path / "state.safetensors", config)
    assert resumed.iteration == 1
    continued = run(config, dataset, state=resumed)
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken.tensors)
    assert torch.equal(continued.images, whole.images)
    assert all(not torch.equal(before[name], unbroken[name]) for name in ("images", "local", "theta"))
    assert not torch.equal(run(replace(config, seed=6), dataset).images, whole.images)


def literal_distance(f_real, f_syn, labels_real, labels_syn):
    return sum(
        (f_real[labels_real == k].mean(0) - f_syn[labels_syn == k].mean(0)).square().sum()
        for k in labels_syn.unique().tolist()
    )


def literal_supcon(f, y, temperature):
    f = f / f.norm(dim=1, keepdim=True)
    losses = []
    for i in range(len(f)):
        others = [j for j in range(len(f)) if j != i]
        total = torch.stack([(f[i] @ f[j] / temperature).exp() for j in others]).sum().log()
        losses.append(torch.stack([total - f[i] @ f[j] / temperature for j in others if y[i] == y[j]]).mean())
    return torch.stack(losses).mean()


def literal_mmd(x, y):
    rows = torch.cat([x, y])
    distances = (rows[:, None] - rows).square().sum(2)
    bandwidth = distances.detach().sum() / (len(rows) ** 2 - len(rows)) / 4
    k = sum((-distances / (bandwidth * 2**i)).exp() for i in range(5))
    n = len(x)
    return k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()


@pytest.mark.parametrize("name", ["dirichlet, supcon", "class, mmd"])
def test_a_round_is_written_out(dataset, name):
    config = replace(CONFIGS[name], iterations=1, pull=0.3, weight=0.5)
    records, state = [], start(config, dataset)
    theta, server, server_labels, local = (state[n].clone() for n in ("theta", "images", "labels", "local"))
    run(config, dataset, state=state, on_step=lambda state, record: records.append(record))
    net, shards = make_net(), config.shards(dataset)

    def features(theta, x):
        return FlatModule(Embedding(net))(theta, x)

    def logits(theta, x):
        return FlatModule(net)(theta, x)

    thetas, own, labels, losses = [], [], [], []
    for client, shard in enumerate(shards):
        x, y = dataset.train_images[shard], dataset.train_labels[shard]
        generator = seeded_generator(5, Stream.OUTER_STEP, 0, client)
        label = torch.tensor([k for k in y.unique().tolist() for _ in range(2)])
        images = local[sum(map(len, own)) :][: len(label)].clone().requires_grad_()
        sgd = torch.optim.SGD([images], lr=0.5, momentum=0.5)
        for _ in range(2):
            batch = []
            for k in y.unique().tolist():
                members = (y == k).nonzero()[:, 0]
                batch.append(members[torch.randperm(len(members), generator=generator)][:4])
            batch = torch.cat(batch)
            f = features(theta, images)
            loss = literal_distance(features(theta, x[batch]), f, y[batch], label)
            loss = loss + 0.3 * literal_distance(features(theta, server), f, server_labels, label)
            sgd.zero_grad()
            (images.grad,) = torch.autograd.grad(loss, images)
            sgd.step()
        images = images.detach()
        mine, all_labels = theta.clone(), torch.cat([label, server_labels])
        for _ in range(2):
            mine.requires_grad_()
            both = torch.cat([images, server])
            f = features(mine, both)
            apart = literal_supcon(f, all_labels, 0.07) if "supcon" in name else literal_mmd(*f.split([len(images), 6]))
            loss = F.cross_entropy(logits(mine, both), all_labels) + 0.5 * apart
            mine = (mine - 0.05 * torch.autograd.grad(loss, mine)[0]).detach()
        losses.append(loss.item())
        thetas.append(mine)
        own.append(images)
        labels.append(label)
    shares = [len(shard) / 45 for shard in shards]
    assert sum(shares) == pytest.approx(1)
    theta = sum(share * mine for share, mine in zip(shares, thetas, strict=True)).requires_grad_()
    torch.testing.assert_close(state["local"], torch.cat(own), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["theta"], theta.detach(), rtol=1e-4, atol=1e-6)
    assert records[0]["client_loss"] == pytest.approx(sum(a * b for a, b in zip(shares, losses, strict=True)), rel=1e-4)
    target = sum(
        share * torch.autograd.grad(F.cross_entropy(logits(theta, images), label), theta)[0]
        for share, images, label in zip(shares, own, labels, strict=True)
    )
    flat = FlatModule(net)
    images = server.clone().requires_grad_()
    sgd = torch.optim.SGD([images], lr=0.3, momentum=0.5)
    for step in range(2):
        (found,) = torch.autograd.grad(F.cross_entropy(logits(theta, images), server_labels), theta, create_graph=True)
        parts = (list(flat.unflatten(vector).values()) for vector in (found, target))
        loss = literal_gradient_match(*parts)
        if step == 0:
            assert records[0]["loss"] == pytest.approx(loss.item(), rel=1e-3)
        (images.grad,) = torch.autograd.grad(loss, images)
        sgd.step()
    moved = state["images"] - server
    assert moved.norm() > 1e-3
    assert float((images.detach() - state["images"]).norm() / moved.norm()) < 1e-3


class Embedding(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.embed(x)


RANKS = """
import sys, torch
from pydistill.methods import FedLGD, distill
from tests.bars import make_dataset, make_net
torch.distributed.init_process_group("gloo")
config = FedLGD(**%(config)r)
state = config.initial(make_dataset(), make_net(), config.check(make_dataset(), make_net(), None))
records = []
distill(config, make_dataset(), make_net(), state=state, on_step=lambda s, r: records.append(r["loss"]))
found = state.tensors | {"losses": torch.tensor(records)}
torch.save(found, f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


def test_ranks_share_the_clients_to_the_bits_of_one_process(dataset, tmp_path):
    config = CONFIGS["dirichlet, supcon"]
    script = tmp_path / "ranks.py"
    script.write_text(RANKS % {"config": asdict(config)})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path)],
        env={
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alone, losses = start(config, dataset), []
    run(config, dataset, state=alone, on_step=lambda state, record: losses.append(record["loss"]))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == alone.tensors.keys() | {"losses"}
        assert torch.equal(found.pop("losses"), torch.tensor(losses))
        assert all(torch.equal(found[name], alone[name]) for name in found)


@pytest.mark.parametrize("split", ["dirichlet", "class"])
def test_shards_are_a_partition(dataset, split):
    config = FedLGD(clients=3, split=split, alpha=0.5, seed=1)
    shards = config.shards(dataset)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(45))
    classes = [dataset.train_labels[shard].unique().tolist() for shard in shards]
    if split == "class":
        assert sorted(classes) == [[0], [1], [2]]
    assert all(torch.equal(a, b) for a, b in zip(shards, config.shards(dataset), strict=True))
    assert [len(s) for s in shards] != [len(s) for s in replace(config, seed=2).shards(dataset)] or split == "class"


def test_what_cannot_be_done_is_refused(dataset):
    with pytest.raises(ValueError, match=r"clients: expected few enough that each has images, client \d has none"):
        run(FedLGD(clients=4, split="class"), dataset)
    with pytest.raises(ValueError, match="net: expected one with embed and classifier, Linear lacks them"):
        distill(FedLGD(), dataset, nn.Linear(36, 3))
    for options, message in (
        ({"split": "even"}, "split: expected 'dirichlet' or 'class', got 'even'"),
        ({"regulariser": "kl"}, "regulariser: expected 'supcon' or 'mmd', got 'kl'"),
        ({"alpha": 0.0}, r"alpha, temperature: expected positive numbers, got 0\.0, 0\.07"),
        ({"clients": 0}, "clients: expected a finite number of at least 1, got 0"),
        ({"augment": "melt"}, "augment: expected names out of color"),
    ):
        with pytest.raises(ValueError, match=message):
            FedLGD(**options)
