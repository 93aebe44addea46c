"""What is said of an argument that is not one of its choices."""

import re

import pytest
import torch

from pydistill import ExpertStore, soft_cross_entropy, unroll
from pydistill._arguments import check_choice, not_one_of
from pydistill.augment import DiffAugment, MultiCrop, diff_augment
from pydistill.data import DistilledSet, load
from pydistill.evaluate import evaluate
from pydistill.info import engine
from pydistill.labels import SoftLabelDataset
from pydistill.methods import DM, MTT, Relabel, distill, run
from pydistill.nn import make
from pydistill.ops import kd_divergence
from pydistill.select import graph_cut_greedy, kmeans
from pydistill.trajectory.experts import train_experts

IMAGES, LABELS, MOMENTS = torch.zeros(2, 1, 4, 4), torch.arange(2), torch.ones(2, 1)


def evaluated(**options):
    data = {"images": IMAGES, "labels": LABELS, "test_images": IMAGES, "test_labels": LABELS}
    return evaluate(**{"make_net": lambda: make("mlp", 1, 2, 4, 3), **data, "lr": 0.1, "epochs": 1, **options})


def experts(**options):
    return train_experts(lambda: None, IMAGES, LABELS, "e.store", **{"num_experts": 1, "epochs": 1, **options})


def unrolled(**options):
    net = make("mlp", 1, 2, 4, 3)
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    return unroll(net, theta, IMAGES, LABELS, 0.1, steps=2, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load("digts"), "name: expected one of digits, .*, got 'digts'; did you mean digits?"),
        (lambda: load("CIFAR-10"), "got 'CIFAR-10'; did you mean cifar10?"),
        (lambda: make("resnet_18", 3, 10, 32), "got 'resnet_18'; did you mean resnet18?"),
        (lambda: kd_divergence(None, None, kind="softce"), "kind: expected one of .*; did you mean soft_ce?"),
        (lambda: soft_cross_entropy(None, None, label_kind="prob"), "got 'prob'; did you mean probs?"),
        (lambda: Relabel(format="top_k8"), "format: expected one of fp32, .*; did you mean topk8?"),
        (lambda: MTT.preset("digit", 1), "got 'digit'; did you mean digits?"),
        (lambda: MTT(augment="colour_crop"), "got 'colour' in 'colour_crop'; did you mean color?"),
    ],
)
def test_the_nearest_choice_is_offered(call, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        call()


def test_nothing_like_it():
    assert not_one_of(("mean", "sum"), "none") == "expected 'mean' or 'sum', got 'none'"
    assert not_one_of(("sum",), 3) == "expected 'sum', got 3"
    assert not_one_of("abcde", None) == "expected one of a, b, c, d, e, got None"
    check_choice("reduction", "sum", ("mean", "sum"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DM(ipc="1"), ValueError, "ipc: expected a whole number, got '1'"),
        (lambda: DM(ipc=None), ValueError, "ipc: expected a whole number, got None"),
        (lambda: DM(ipc=1.5), ValueError, "ipc: expected a whole number, got 1.5"),
        (lambda: MTT(lr_img="3"), ValueError, "lr_img: expected a number, got '3'"),
        (lambda: Relabel(crop="3"), ValueError, "crop: expected a number, got '3'"),
        (lambda: run(DM(), out=None), TypeError, "out: expected the path of a folder, got None"),
        (lambda: load("digits", image_size="8"), TypeError, "image_size: expected a whole number, got '8'"),
        (lambda: make("convnet", 3, 10, "32"), TypeError, "image_size: expected a whole number of pixels or (height"),
        (lambda: make("convnet", 3, 10, 32, width=1.5), TypeError, "width: expected a whole number, got 1.5"),
        (lambda: diff_augment(IMAGES, "color", seed=1.5), TypeError, "seed: expected an int, got 1.5"),
        (lambda: diff_augment(IMAGES[0], "color"), ValueError, "images: expected [B, C, H, W], got shape [1, 4, 4]"),
        (lambda: DiffAugment("flip").draw((4, 4)), ValueError, "shape: expected that of images, [B, C, H, W], got [4"),
        (lambda: DiffAugment(prob_flip="a"), TypeError, "prob_flip: expected a number, got 'a'"),
        (lambda: DiffAugment(siamese="no"), TypeError, "siamese: expected True or False, got 'no'"),
        (lambda: DiffAugment()(IMAGES, None), TypeError, "record: expected what draw returns, a tensor, got NoneType"),
        (lambda: MultiCrop(8)(IMAGES, None), TypeError, "record: expected what draw returns, a tensor, got NoneType"),
        (lambda: MultiCrop(8).draw(IMAGES), ValueError, "shape: expected that of images, [B, C, H, W], got a Tensor"),
        (lambda: MultiCrop("8"), TypeError, "out_size: expected a whole number of pixels or (height, width), got '8'"),
        (lambda: MultiCrop(8, scale=0.5), TypeError, "scale: expected (low, high), got 0.5"),
        (lambda: MultiCrop(8, flip="a"), TypeError, "flip: expected a number, got 'a'"),
        (lambda: unrolled(augment=DiffAugment), TypeError, "augment: expected an object, as DiffAugment() makes one"),
        (lambda: unrolled(at=3), TypeError, "at: expected step numbers, got 3"),
        (lambda: unrolled(batches=3), TypeError, "batches: expected 2 index tensors, one a step, got int"),
        (lambda: unrolled(store_every="a"), TypeError, "store_every: expected a whole number, got 'a'"),
        (lambda: unrolled(output="a"), TypeError, "output: expected a whole number, got 'a'"),
        (lambda: unrolled(output=9), ValueError, "output: expected None for a net that returns a tensor, got 9"),
        (
            lambda: evaluated(make_net=make("mlp", 1, 2, 4)),
            TypeError,
            "make_net: expected a function that builds a",
        ),
        (lambda: evaluated(students=3), TypeError, "students: expected their numbers, such as range(5), got 3"),
        (lambda: evaluated(seed=1.5), TypeError, "seed: expected a whole number of at least 0, got 1.5"),
        (lambda: evaluated(seed=-1), ValueError, "seed: expected a whole number of at least 0, got -1"),
        (lambda: evaluated(test_images=None), TypeError, "test_images: expected a tensor, got NoneType"),
        (lambda: experts(epochs=1.5), TypeError, "epochs: expected a whole number, got 1.5"),
        (lambda: experts(momentum="a"), TypeError, "momentum: expected a number, got str"),
        (
            lambda: ExpertStore.import_replay_buffers("a.pt", None, "b"),
            TypeError,
            "paths: expected a sequence of paths",
        ),
        (lambda: DistilledSet(None, LABELS, 0.1, *MOMENTS), TypeError, "images: expected a tensor, got NoneType"),
        (lambda: DistilledSet(IMAGES, LABELS, 0.1, None, None), TypeError, "mean: expected a tensor, got NoneType"),
        (lambda: distill(DM(), None, make("convnet", 1, 2, 8)), TypeError, "dataset: expected a Dataset, got None"),
        (lambda: distill(DM(), load("digits"), None), TypeError, "net: expected a Module, got None"),
        (lambda: kmeans(torch.ones(3), 1), ValueError, "x: expected floating [N, d] with a row and a column at least"),
        (lambda: graph_cut_greedy(torch.ones(3, 2), 1.5), TypeError, "budget: expected a whole number, got 1.5"),
        (lambda: graph_cut_greedy([1, 2], 1), TypeError, "embeddings: expected a tensor, got list"),
        (lambda: engine(make("mlp", 1, 2, 4), (4, 4)), TypeError, "image: expected (C, H, W), got (4, 4)"),
        (lambda: SoftLabelDataset(IMAGES, "labels.store"), TypeError, "store: expected an open SoftLabelStore, got '"),
    ],
)
def test_an_argument_of_another_kind_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
