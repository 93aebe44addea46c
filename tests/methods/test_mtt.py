"""MTT does what its equations say, and a run that was cut off ends in the bits of one that was not."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pydistill.data import Dataset, read_safetensors, write_safetensors
from pydistill.evaluate import accuracy, evaluate, train_student
from pydistill.methods.mtt import MTTConfig, MTTState, distill
from pydistill.nn import ConvNet
from pydistill.trajectory.experts import completed_epochs, load_experts, seeded_generator, seeded_net, train_experts

CONFIG = MTTConfig(
    ipc=2,
    iterations=4,
    syn_steps=3,
    expert_epochs=1,
    max_start_epoch=2,
    batch_syn=4,
    lr_img=10.0,
    lr_lr=1e-4,
    lr_teacher=0.05,
    seed=5,
)


class Shift:
    """A small augmentation: each batch is shifted in brightness by what `draw` says."""

    def draw(self, shape, generator):
        return 0.1 * torch.randn(shape[0], 1, 1, 1, generator=generator)

    def __call__(self, images, record):
        return images + record


def make_net():
    return ConvNet(1, 3, width=4, depth=1, image_size=6)


@pytest.fixture(scope="module")
def dataset():
    """Three classes that differ in where the image is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = 0.5 * torch.randn(60, 1, 6, 6, generator=generator)
    for label in range(3):
        images[labels == label, :, 2 * label : 2 * label + 2] += 2
    names = ("top", "middle", "bottom")
    return Dataset("bars", images[:45], labels[:45], images[45:], labels[45:], names, torch.zeros(1), torch.ones(1))


@pytest.fixture(scope="module")
def experts(dataset):
    options = {"num_experts": 2, "epochs": 3, "lr": 0.05, "batch_size": 10, "seed": 3}
    return train_experts(make_net, dataset.train_images, dataset.train_labels, **options)


def tensors(state):
    return [state.images, state.labels, state.lr, state.image_velocity, state.lr_velocity, state.generator.get_state()]


def test_iterations_are_the_papers_updates(dataset, experts):
    """Three of them written out with torch alone: plain SGD inside, backpropagation through it, SGD with momentum."""
    options = {"syn_steps": 4, "expert_epochs": 2, "max_start_epoch": 2, "lr_img": 3.0, "lr_lr": 1e-3, "momentum": 0.7}
    config = MTTConfig(ipc=1, iterations=3, seed=2, **options)
    records = []
    found = distill(config, dataset, experts, make_net(), on_step=lambda state, record: records.append(record))

    start, net = MTTState.initial(config, dataset), make_net()
    images, lr = start.images.requires_grad_(), start.lr.requires_grad_()
    outer_images = torch.optim.SGD([images], lr=3.0, momentum=0.7)
    outer_lr = torch.optim.SGD([lr], lr=1e-3, momentum=0.7)
    sizes = [p.numel() for p in net.parameters()]
    for record in records:
        trajectory = experts[record["expert"], record["start_epoch"] :]
        theta = trajectory[0].clone().requires_grad_()
        for _ in range(4):
            named = zip(net.named_parameters(), theta.split(sizes), strict=True)
            logits = functional_call(net, {name: part.view_as(p) for (name, p), part in named}, (images,))
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, start.labels), theta, create_graph=True)
            theta = theta - lr * gradient
        loss = (theta - trajectory[2]).square().sum() / (trajectory[0] - trajectory[2]).square().sum()
        outer_images.zero_grad()
        outer_lr.zero_grad()
        loss.backward()
        assert images.grad.norm() > 1e-5
        assert record["grad_norm"] == pytest.approx(images.grad.norm().item(), rel=1e-4)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        outer_images.step()
        outer_lr.step()
        assert record["lr"] == pytest.approx(lr.item(), rel=1e-5)
    torch.testing.assert_close(found.images, images.detach(), rtol=1e-4, atol=1e-6)
    assert [record["iteration"] for record in records] == [1, 2, 3]


@pytest.mark.parametrize("augment", [None, Shift()])
def test_a_run_resumed_from_its_file_is_bitwise_the_unbroken_one(dataset, experts, tmp_path, augment):
    class CutOffError(Exception):
        pass

    def cut_off(state, record):
        if state.iteration == 2:
            state.save(tmp_path / "state.safetensors", CONFIG)
            raise CutOffError

    unbroken = MTTState.initial(CONFIG, dataset)
    whole = distill(CONFIG, dataset, experts, make_net(), state=unbroken, augment=augment)
    with pytest.raises(CutOffError):
        distill(CONFIG, dataset, experts, make_net(), augment=augment, on_step=cut_off)
    torch.randn(7)  # the global random state takes no part
    resumed = MTTState.load(tmp_path / "state.safetensors", CONFIG)
    assert resumed.iteration == 2
    continued = distill(CONFIG, dataset, experts, make_net(), state=resumed, augment=augment)
    assert all(torch.equal(a, b) for a, b in zip(tensors(resumed), tensors(unbroken), strict=True))
    assert torch.equal(continued.images, whole.images)
    assert continued.lr == whole.lr
    assert not torch.equal(whole.images, MTTState.initial(CONFIG, dataset).images)


def test_seeds_differ(dataset, experts):
    other = MTTConfig(**{**CONFIG.__dict__, "seed": 6})
    assert not torch.equal(
        distill(CONFIG, dataset, experts, make_net()).images, distill(other, dataset, experts, make_net()).images
    )


def test_the_result_says_what_made_it(dataset, experts):
    config = distill(CONFIG, dataset, experts, make_net()).config
    assert json.loads(json.dumps(config)) == config
    assert (config["method"], config["dataset"], config["ipc"], config["lr_img"]) == ("mtt", "bars", 2, 10.0)
    assert config["class_names"] == ["top", "middle", "bottom"]


def test_a_state_of_another_run_is_refused(dataset, tmp_path):
    path = tmp_path / "state.safetensors"
    MTTState.initial(CONFIG, dataset).save(path, CONFIG)
    longer = MTTConfig(**{**CONFIG.__dict__, "iterations": 9})
    assert MTTState.load(path, longer).iteration == 0
    with pytest.raises(ValueError, match=r"state\.safetensors: expected a run with syn_steps=7, got 3"):
        MTTState.load(path, MTTConfig(**{**CONFIG.__dict__, "syn_steps": 7}))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"state\.safetensors: expected .* 'mtt_state', version 1; it is truncated"):
        MTTState.load(path, CONFIG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipc": 0}, "ipc: expected at least 1, got 0"),
        ({"batch_syn": 0}, "batch_syn: expected at least 1, got 0"),
        ({"lr_img": -1.0}, r"lr_img: expected at least 0, got -1\.0"),
        ({"lr_lr": float("nan")}, "lr_lr: expected at least 0, got nan"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MTTConfig(**options)


def test_experts_that_do_not_fit_are_refused(dataset, experts):
    with pytest.raises(ValueError, match=r"experts: expected \[E, epochs \+ 1, \d+\] for this net, got \[2, 4, \d+\]"):
        distill(CONFIG, dataset, experts, ConvNet(1, 3, width=5, depth=1, image_size=6))
    with pytest.raises(ValueError, match=r"expected at least 2 epochs .*max_start_epoch=2.*, got 1"):
        distill(CONFIG, dataset, experts[:, :2], make_net())


def test_experts_are_plain_sgd(dataset):
    batches = []

    class Recorded:
        """Lets the test see the batches in their order."""

        def draw(self, shape, generator):
            return None

        def __call__(self, images, record):
            batches.append(images.clone())
            return images

    options = {"num_experts": 1, "epochs": 2, "lr": 0.1, "batch_size": 20, "augment": Recorded()}
    (trajectory,) = train_experts(make_net, dataset.train_images, dataset.train_labels, **options)
    net = make_net()
    torch.nn.utils.vector_to_parameters(trajectory[0].clone(), net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    by_image = {
        image.numpy().tobytes(): label for image, label in zip(dataset.train_images, dataset.train_labels, strict=True)
    }
    for step, x in enumerate(batches):
        y = torch.stack([by_image[image.numpy().tobytes()] for image in x])
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if step in (2, 5):
            torch.testing.assert_close(trajectory[step // 3 + 1], parameters_to_vector(net.parameters()).detach())
    assert [len(x) for x in batches] == [20, 20, 5] * 2
    for epoch in (batches[:3], batches[3:]):  # each epoch sees each image once
        assert {image.numpy().tobytes() for x in epoch for image in x} == by_image.keys()


def test_experts_cut_off_within_an_epoch_go_on_to_the_same_bits(dataset, experts, tmp_path):
    path = tmp_path / "experts.safetensors"
    options = {"num_experts": 2, "epochs": 3, "lr": 0.05, "batch_size": 10, "seed": 3, "path": path}
    arguments = (make_net, dataset.train_images, dataset.train_labels)
    steps = 0

    class CutOffError(Exception):
        pass

    def on_step():
        nonlocal steps
        steps += 1
        if steps == 2 * 5 * 2 + 3:  # both experts, which train at once, within their third epoch
            raise CutOffError

    with pytest.raises(CutOffError):
        train_experts(*arguments, **options, on_step=on_step)
    assert completed_epochs(path) == [2, 2]
    with pytest.raises(ValueError, match=r"experts\.safetensors: expected 3 epochs of each expert, got \[2, 2\]"):
        load_experts(path)
    records = []
    torch.randn(7)
    assert torch.equal(train_experts(*arguments, **options, on_epoch=records.append), experts)
    assert [(record["expert"], record["epoch"]) for record in records] == [(0, 3), (1, 3)]
    assert torch.equal(load_experts(path)[0], experts)
    with pytest.raises(ValueError, match=r"expected experts trained with lr=0\.01, got 0\.05"):
        train_experts(*arguments, **{**options, "lr": 0.01})
    with pytest.raises(ValueError, match="expected experts trained with data_crc32"):
        train_experts(make_net, dataset.train_images + 1, dataset.train_labels, **options)
    with pytest.raises(ValueError, match="expected experts that start as make_net's networks do"):
        train_experts(lambda: ConvNet(1, 3, width=5, depth=1, image_size=6), *arguments[1:], **options)


def test_experts_that_stand_at_different_epochs_are_continued(dataset, experts, tmp_path):
    """As a file may hold them whose experts trained one after the other."""
    path = tmp_path / "experts.safetensors"
    options = {"num_experts": 2, "epochs": 3, "lr": 0.05, "batch_size": 10, "seed": 3, "path": path}
    train_experts(make_net, dataset.train_images, dataset.train_labels, **options)
    tensors, header = read_safetensors(path, "experts")
    tensors["completed"] = torch.tensor([3, 1])
    tensors["trajectories"][1, 2:] = 0
    write_safetensors(path, tensors, "experts", header["config"])
    records = []
    found = train_experts(make_net, dataset.train_images, dataset.train_labels, **options, on_epoch=records.append)
    assert [(record["expert"], record["epoch"]) for record in records] == [(1, 2), (1, 3)]
    assert torch.equal(found[0], experts[0])
    torch.testing.assert_close(found[1], experts[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("together", [True, False])
def test_experts_report_the_loss_and_accuracy_of_their_batches(dataset, together):
    def with_batch_norm():
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3))

    make, records, steps = make_net if together else with_batch_norm, [], []
    options = {"num_experts": 2, "epochs": 2, "lr": 0.05, "batch_size": 10, "seed": 3, "augment": Shift()}
    found = train_experts(
        *(make, dataset.train_images, dataset.train_labels),
        **options,
        on_epoch=records.append,
        on_step=lambda: steps.append(None),
    )
    order = [(0, 1), (1, 1), (0, 2), (1, 2)] if together else [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [(record["expert"], record["epoch"]) for record in records] == order
    assert len(steps) == 2 * 2 * 5
    for record in records:
        expert, epoch = record["expert"], record["epoch"]
        net, generator = make(), seeded_generator(3, 1, expert, epoch - 1)
        vector_to_parameters(found[expert, epoch - 1].clone(), net.parameters())
        total, right = 0.0, 0
        for index in torch.randperm(45, generator=generator).split(10):
            x, y = dataset.train_images[index], dataset.train_labels[index]
            logits = net(Shift()(x, Shift().draw(x.shape, generator)))
            loss = F.cross_entropy(logits, y)
            total += loss.item() * len(y)
            right += (logits.argmax(1) == y).sum().item()
            for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
                p.data -= 0.05 * g
        assert record["loss"] == pytest.approx(total / 45, rel=1e-4)
        assert record["accuracy"] == right / 45
        torch.testing.assert_close(found[expert, epoch], parameters_to_vector(net.parameters()).detach())


def test_an_expert_that_diverges_is_named(dataset, tmp_path):
    path = tmp_path / "experts.safetensors"
    options = {"num_experts": 1, "epochs": 2, "lr": 1e30, "batch_size": 10, "path": path}
    with pytest.raises(FloatingPointError, match=r"lr: .*got 1e\+30: the loss of expert 0 is nan in epoch 1, step \d"):
        train_experts(make_net, dataset.train_images, dataset.train_labels, **options)
    assert completed_epochs(path) == [0]


def test_students_learn_and_depend_on_their_number_alone(dataset):
    nets = []

    def recorded_net():
        nets.append(make_net())
        return nets[-1]

    arguments = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    options = {"lr": 0.02, "epochs": 6, "batch_size": 16, "seed": 1}
    accuracies = evaluate(recorded_net, *arguments, **options, students=range(3))
    assert min(accuracies) > 0.8
    torch.randn(3)  # the global random state takes no part
    assert evaluate(recorded_net, *arguments, **options, students=[2, 0]) == [accuracies[2], accuracies[0]]
    first, second, third, third_again, first_again = (parameters_to_vector(net.parameters()) for net in nets)
    # three at once or two: the same students, but for the order in which sums are taken
    torch.testing.assert_close(first, first_again, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(third, third_again, rtol=1e-3, atol=1e-5)
    assert (first - second).norm() > 0.1
    assert accuracies[0] == accuracy(nets[0], dataset.test_images, dataset.test_labels, batch_size=4)


@pytest.mark.parametrize("label_kind", ["probs", "logits"])
def test_soft_labels_that_say_the_same_train_the_same_student(dataset, label_kind):
    soft = F.one_hot(dataset.train_labels, 3).float() * (1 if label_kind == "probs" else 100)
    vectors = []
    for labels, kind in ((dataset.train_labels, "hard"), (soft, label_kind)):
        torch.manual_seed(0)
        net = make_net()
        generator = torch.Generator().manual_seed(0)
        options = {"lr": 0.02, "epochs": 2, "batch_size": 16, "label_kind": kind, "generator": generator}
        train_student(net, dataset.train_images, labels, **options)
        vectors.append(parameters_to_vector(net.parameters()).detach())
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", ["convnet", "batch norm"])
def test_a_student_is_trained_as_in_the_papers_code(dataset, net):
    """SGD with momentum and decay; after half of the epochs a tenth of the rate, and the momentum anew."""
    images, labels = dataset.train_images.double(), dataset.train_labels
    net = make_net() if net == "convnet" else nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3))
    net = net.double()
    theirs = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(4)
    for epoch in range(5):
        if epoch in (0, 3):
            rate = 0.02 if epoch == 0 else 0.002
            optimizer = torch.optim.SGD(theirs.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
        for index in torch.randperm(len(images), generator=generator).split(16):
            x = Shift()(images[index], Shift().draw(images[index].shape, generator))
            optimizer.zero_grad()
            F.cross_entropy(theirs(x), labels[index]).backward()
            optimizer.step()
    generator.manual_seed(4)
    train_student(net, images, labels, lr=0.02, epochs=5, batch_size=16, augment=Shift(), generator=generator)
    assert net.training
    for (name, value), expected in zip(net.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10, msg=name)


def test_students_that_are_no_convnets_keep_what_is_their_own(dataset):
    """A buffer that make_net draws, and BatchNorm's statistics."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("features", torch.randn(36, 8))
            self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(x.flatten(1) @ self.features))

    nets = []

    def recorded_net():
        nets.append(Net())
        return nets[-1]

    arguments = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    accuracies = evaluate(recorded_net, *arguments, lr=0.02, epochs=6, batch_size=16, students=[3, 1])
    assert not torch.equal(nets[0].features, nets[1].features)
    assert accuracies == [accuracy(net, dataset.test_images, dataset.test_labels) for net in nets]
    assert [net.norm.num_batches_tracked.item() for net in nets] == [18, 18]


def test_students_are_evaluated_under_augmentation(dataset):
    data = (dataset.train_images, dataset.train_labels)
    options = {"lr": 0.02, "epochs": 3, "batch_size": 16, "augment": Shift()}
    nets = []

    def recorded_net():
        nets.append(make_net())
        return nets[-1]

    evaluate(recorded_net, *data, dataset.test_images, dataset.test_labels, students=[4], seed=1, **options)
    for augment in (Shift(), None):
        net = seeded_net(make_net, 1, 2, 4)
        train_student(net, *data, **(options | {"augment": augment}), generator=seeded_generator(1, 3, 4))
        theirs, ours = (parameters_to_vector(each.parameters()) for each in (net, nets[0]))
        assert torch.equal(theirs, ours) == (augment is not None)


def test_students_may_have_their_own_images(dataset):
    images, labels = dataset.train_images[:40].view(2, 20, 1, 6, 6), dataset.train_labels[:40].view(2, 20)
    options = {"lr": 0.02, "epochs": 3, "batch_size": 8}
    found = evaluate(make_net, images, labels, dataset.test_images, dataset.test_labels, students=[0, 1], **options)
    for student in (0, 1):
        data = (images[student], labels[student], dataset.test_images, dataset.test_labels)
        assert evaluate(make_net, *data, students=[student], **options) == [found[student]]
    with pytest.raises(ValueError, match="images, labels: expected those of 3 students, got 2 and 2"):
        evaluate(make_net, images, labels, dataset.test_images, dataset.test_labels, students=range(3), **options)
    with pytest.raises(ValueError, match=r"test_labels: expected shape \[15\] with an image or more, got \[45\]"):
        evaluate(make_net, images, labels, dataset.test_images, dataset.train_labels, students=[0, 1], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"lr: expected a positive finite number, got 0\.0"),
        ({"lr": float("nan")}, "lr: expected a positive finite number, got nan"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"label_kind": "soft"}, "label_kind: expected 'hard', 'logits' or 'probs', got 'soft'"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels: expected one for each of 45 images, got 3"),
    ],
)
def test_wrong_training_options_are_named(dataset, options, message):
    arguments = {"images": dataset.train_images, "labels": dataset.train_labels, "lr": 0.1, "epochs": 1, **options}
    with pytest.raises(ValueError, match=message):
        train_student(make_net(), **arguments)
