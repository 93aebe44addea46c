"""Students on a small set are trained and tested as in the papers' code."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from pydistill.evaluate import accuracy, evaluate, train_student
from tests.bars import Shift, make_net


def test_students_learn_and_depend_on_their_number_alone(dataset):
    nets = []

    def recorded_net():
        nets.append(make_net())
        return nets[-1]

    arguments = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    options = {"lr": 0.02, "epochs": 6, "batch_size": 16, "seed": 1}
    accuracies = evaluate(recorded_net, *arguments, **options, students=range(3))
    assert min(accuracies) > 0.8
    torch.randn(3)  # the global random state has no effect
    assert evaluate(recorded_net, *arguments, **options, students=[2, 0]) == [accuracies[2], accuracies[0]]
    first, second, third, third_again, first_again = (parameters_to_vector(net.parameters()) for net in nets)
    # three at once or two: the same students, up to the order of summation
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
    """SGD with momentum and decay; after half of the epochs a tenth of the rate, and the momentum reset."""
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
