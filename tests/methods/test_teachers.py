"""Teachers, read back as they were kept; the labels that they give; and the students that learn from these."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydistill.data import DistilledSet
from pydistill.labels import SoftLabelStore
from pydistill.methods import RandomImages
from pydistill.methods.decoupled.post_train import PostTrain, post_train
from pydistill.methods.decoupled.relabel import Relabel, last_linear, relabel, replayed
from pydistill.methods.decoupled.squeeze import Squeeze, Teacher, build, import_weights, squeeze
from pydistill.nn import ConvNet, ResNet18
from pydistill.nn.description import from_description
from pydistill.ops import multi_crop
from tests.methods.teachers import SQUEEZE, make


def test_a_teacher_is_kept_and_read(teacher, data, tmp_path):
    teacher.save(tmp_path / "t.safetensors")
    again = Teacher.load(tmp_path / "t.safetensors")
    assert torch.equal(again.net(data.test_images), teacher.net(data.test_images))
    assert again.class_names == teacher.class_names
    assert again.config == teacher.config
    correct = (again.net(data.test_images).argmax(1) == data.test_labels).float().mean()
    assert correct > 0.9
    torch.save({"state_dict": {f"module.{k}": v for k, v in teacher.net.state_dict().items()}}, tmp_path / "w.pth")
    taken = import_weights(SQUEEZE, tmp_path / "w.pth", data)
    assert torch.equal(taken.net(data.test_images), teacher.net(data.test_images))
    with pytest.raises(ValueError, match=r"w.pth: expected the weights of a convnet; (?s:.*)size mismatch"):
        import_weights(replace(SQUEEZE, width=7), tmp_path / "w.pth", data)
    with pytest.raises(FileNotFoundError, match="expected the weights of a convnet, found no file"):
        import_weights(SQUEEZE, tmp_path / "none.pth", data)
    with pytest.raises(ValueError, match="network: expected 'convnet', 'resnet18' or 'resnet50', got 'vgg'"):
        build("vgg", 1, 2, 8, 4, 2)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_squeezing_goes_on_bit_for_bit(precision, data):
    kept, config = [], replace(SQUEEZE, precision=precision)
    whole = squeeze(config, data, on_epoch=lambda record, state: kept.append({k: v.clone() for k, v in state.items()}))
    rest = squeeze(config, data, state=kept[0])
    for (name, a), b in zip(whole.net.state_dict().items(), rest.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="state: expected one of this network"):
        squeeze(replace(SQUEEZE, width=7), data, state=kept[0])
    with pytest.raises(FloatingPointError, match=r"the loss of epoch 1 is nan: a smaller lr than 1e\+38 may help"):
        squeeze(replace(SQUEEZE, lr=1e38), data)


@pytest.fixture(scope="module")
def distilled(teacher, data, tmp_path_factory):
    return make(RandomImages(ipc=4), [teacher], tmp_path_factory.mktemp("random"), data)


VIEWS = Relabel(epochs=3, batch_size=5, crop=0.6)
STUDENT = PostTrain(network="convnet", width=6, depth=2)


def test_labels_are_the_teachers_mean_on_the_views_that_the_student_sees(teacher, data, distilled, tmp_path):
    other = squeeze(replace(SQUEEZE, seed=1), data)
    store = relabel(VIEWS, distilled, [teacher, other], tmp_path / "labels.store")
    side, seen, found = data.image_size, [], []
    student = post_train(STUDENT, distilled, VIEWS, store, num_classes=data.num_classes)
    assert not student.training
    for epoch in range(3):
        for index in store.batches(epoch):
            labels = store.read(epoch, index)
            x = replay(distilled.images, labels, side)
            with torch.no_grad():
                mean = (teacher.net(x) + other.net(x)) / 2
            z = torch.randn(len(index), data.num_classes, requires_grad=True)
            ours, wanted = (
                labels.loss(z),
                F.kl_div((z / 20).log_softmax(1), (mean.half().float() / 20).softmax(1), reduction="batchmean"),
            )
            torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-6)
            seen.append(x)
            found.append(torch.tensor(index))
    assert [torch.cat(found[i : i + 3]).sort()[0].tolist() for i in (0, 3, 6)] == [list(range(12))] * 3
    assert not torch.equal(seen[0][:2], seen[3][:2])


@pytest.mark.parametrize("static", [False, True])
def test_features_are_stored_for_the_logits_that_they_make(teacher, data, distilled, tmp_path, static):
    """With two teachers, whose mean is one layer on the features of both."""
    other = squeeze(replace(SQUEEZE, seed=1), data)
    views = replace(VIEWS, epochs=1, format="fp32", **({"static": True, "mix": "mixup"} if static else {}))
    found = {
        format: relabel(replace(views, format=format), distilled, [teacher, other], tmp_path / format)
        for format in ("fp32", "features8")
    }
    weights = [next(m for m in net.modules() if isinstance(m, nn.Linear)).weight for net in (teacher.net, other.net)]
    assert torch.equal(found["features8"].classifier[0], torch.cat([w.detach() / 2 for w in weights], 1))
    for index in found["fp32"].batches(0):
        wanted, labels = (found[format].read(0, index) for format in ("fp32", "features8"))
        assert torch.equal(labels.records, wanted.records)
        span = labels.features.amax(1) - labels.features.amin(1)
        bound = float(span.max()) / 255 * float(found["features8"].classifier[0].abs().sum(1).max())
        torch.testing.assert_close(labels.dense, wanted.dense, rtol=0, atol=bound)
        assert not torch.equal(labels.dense, wanted.dense)
    post_train(STUDENT, distilled, replace(views, format="features8"), found["features8"], num_classes=data.num_classes)
    with pytest.raises(ValueError, match="features8: expected labels of these teachers, got those of others"):
        relabel(replace(views, format="features8"), distilled, [other, teacher], tmp_path / "features8")


def test_features_are_those_of_a_last_linear_layer():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x, last = torch.randn(2, 4), nn.Linear(3, 2)
    assert last_linear(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), last), x) is last
    for wrong in (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), nn.Sequential(nn.Flatten()), Scaled(4, 2)):
        with pytest.raises(
            ValueError, match=r"teachers: expected networks that end in an nn\.Linear for 'features8', got"
        ):
            last_linear(wrong, x)


def test_static_labels_are_mixed_as_the_images_are(teacher, data, distilled, tmp_path):
    views = replace(VIEWS, static=True, mix="mixup", alpha=0.8, crop=1.0, flip=0.0)
    store = relabel(views, distilled, [teacher], tmp_path / "labels.store")
    with torch.no_grad():
        whole = teacher.net(distilled.images)
    mixes = 0
    for index in store.batches(0):
        labels = store.read(0, index)
        x = replay(distilled.images, labels, data.image_size)
        # the share with which an image of itself and its partner are mixed, found from the view alone
        given = labels.dense.float()
        for i, row in enumerate(index):
            best = min(
                (
                    float((x[i] - lam * distilled.images[row] - (1 - lam) * distilled.images[partner]).abs().max()),
                    k,
                    lam,
                )
                for k, partner in enumerate(index)
                for lam in [share(x[i], distilled.images[row], distilled.images[partner])]
            )
            assert best[0] < 1e-4
            wanted = best[2] * whole[row] + (1 - best[2]) * whole[index[best[1]]]
            torch.testing.assert_close(given[i], wanted, rtol=5e-3, atol=5e-3)
            mixes += 0.01 < best[2] < 0.99
    assert mixes > 3
    with pytest.raises(ValueError, match="static: expected mix='mixup' or 'none'"):
        Relabel(static=True)


def share(x, a, b):
    """lam of the least squares fit x = lam a + (1 - lam) b."""
    d = a - b
    return float(((x - b) * d).sum() / d.square().sum().clamp_min(1e-12)) if d.abs().max() > 0 else 1.0


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_relabelling_goes_on_where_the_store_ends_and_post_training_where_it_stopped(
    precision, teacher, data, distilled, tmp_path
):
    views, student = (replace(config, precision=precision) for config in (VIEWS, STUDENT))

    def stop(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relabel(views, distilled, [teacher], tmp_path / "cut", on_epoch=stop)
    with pytest.raises(ValueError, match=r"cut: expected all of 3 epochs, 2 lack labels \(1, 2\)"):
        post_train(student, distilled, views, SoftLabelStore.open(tmp_path / "cut"), num_classes=3)
    cut = relabel(views, distilled, [teacher], tmp_path / "cut")
    whole = relabel(views, distilled, [teacher], tmp_path / "whole")
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [cut.batches(epoch) for epoch in range(3)] == [whole.batches(epoch) for epoch in range(3)]
    for rank in (1, 0):
        relabel(views, distilled, [teacher], tmp_path / f"rank{rank}", rank=rank, world=2)
    SoftLabelStore.merge([tmp_path / "rank0", tmp_path / "rank1"], tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()

    for store in (whole, None):
        kept = []
        options = {"num_classes": data.num_classes}
        once = post_train(
            *(student, distilled, views, store),
            on_epoch=lambda record, state, kept=kept: kept.append({k: v.clone() for k, v in state.items()}),
            **options,
        )
        again = post_train(student, distilled, views, store, state=kept[1], **options)
        for a, b in zip(once.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_students_learn_from_soft_and_from_hard_labels(teacher, data, distilled, tmp_path):
    views = replace(VIEWS, epochs=60, batch_size=6)
    store = relabel(views, distilled, [teacher], tmp_path / "labels.store")
    student = replace(STUDENT, lr=0.01)
    for labels in (store, None):
        net = post_train(student, distilled, views, labels, num_classes=data.num_classes)
        assert (net(data.test_images).argmax(1) == data.test_labels).float().mean() > 0.8


def test_relabelling_refuses_what_does_not_fit(teacher, data, distilled, tmp_path):
    fewer = Teacher(teacher.net, teacher.mean, teacher.std, teacher.class_names[:-1], teacher.config)
    with pytest.raises(ValueError, match="teachers: expected 3 classes as the images have, got 2"):
        relabel(VIEWS, distilled, [fewer], tmp_path / "a")
    larger = Teacher(teacher.net, teacher.mean, teacher.std, teacher.class_names, {**teacher.config, "image_size": 9})
    with pytest.raises(ValueError, match=r"teachers: expected images of \[1, 6, 6\], got \[1, 9, 9\]"):
        relabel(VIEWS, distilled, [larger], tmp_path / "a")
    store = relabel(VIEWS, distilled, [teacher], tmp_path / "a")
    moved = DistilledSet(distilled.images + 1, distilled.labels, 0.01, distilled.mean, distilled.std, distilled.config)
    with pytest.raises(ValueError, match="expected labels of these images, got those of others"):
        relabel(VIEWS, moved, [teacher], tmp_path / "a")
    net = copy.deepcopy(teacher.net)
    next(net.parameters()).data.mul_(1.01)
    other = Teacher(net, teacher.mean, teacher.std, teacher.class_names, teacher.config)
    with pytest.raises(ValueError, match="a: expected labels of these teachers, got those of others"):
        relabel(VIEWS, distilled, [other], tmp_path / "a")
    with pytest.raises(ValueError, match=r"expected labels of .*, got some of crop=0.6"):
        relabel(replace(VIEWS, crop=0.7), distilled, [teacher], tmp_path / "a")
    with pytest.raises(ValueError, match="store: expected labels of 4 classes, got 3"):
        post_train(STUDENT, distilled, VIEWS, store, num_classes=4)
    with pytest.raises(ValueError, match="labels: expected hard labels of 2 classes where there is no store"):
        post_train(STUDENT, distilled, VIEWS, None, num_classes=2)


def replay(images, labels, side):
    return multi_crop(images, replayed(labels), side)


def test_imagenets_weights_need_no_images(tmp_path):
    torch.save(ResNet18().state_dict(), tmp_path / "resnet18.pth")
    teacher = import_weights(Squeeze.preset("imagenet-1k"), tmp_path / "resnet18.pth")
    assert teacher.shape == (3, 224, 224)
    assert teacher.num_classes == 1000
    low, high = (bound.flatten().tolist() for bound in teacher.bounds())
    assert low == pytest.approx([-2.1179, -2.0357, -1.8044], abs=1e-3)
    assert high == pytest.approx([2.2489, 2.4286, 2.6400], abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Squeeze(crop=0), "crop: expected a share above 0 and at most 1, got 0"),
        (lambda: Squeeze(flip=2), "flip: expected a probability, got 2"),
        (lambda: Squeeze(epochs=0), "epochs: expected at least 1, got 0"),
        (lambda: Relabel(batch_size=0), "batch_size: expected at least 1, got 0"),
        (lambda: Relabel(temperature=0), "temperature: expected a positive finite number, got 0"),
        (lambda: Relabel(flip=-1), "flip: expected a probability, got -1"),
        (lambda: Relabel(mix="cut"), "mix: expected 'cutmix', 'mixup' or 'none', got 'cut'"),
        (lambda: Relabel(static="no"), "static: expected True or False, got 'no'"),
    ],
)
def test_steps_name_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Branches(nn.Module):
    """A user's own network, not made of plain layers only."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        return self.left(x.flatten(1)) * self.right(x.flatten(1))


def plain():
    blocks = OrderedDict(norm=nn.GroupNorm(2, 8, affine=False), act=nn.LeakyReLU(0.2), pool=nn.MaxPool2d((1, 2)))
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8, momentum=0.2), nn.ReLU(inplace=True)),
        *(nn.Sequential(blocks), nn.Conv2d(8, 8, (2, 1), groups=2), nn.LayerNorm([8, 1, 1], bias=False)),
        *(nn.AvgPool2d(1, count_include_pad=False), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 3)),
    )


def kept(net, path, **options):
    images = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    config = {"channels": 3, "image_size": 2, "dataset": "mine"}
    teacher = Teacher(net.eval(), torch.zeros(3), torch.ones(3), ("a", "b", "c"), config)
    teacher.save(path, **options)
    return images, teacher.net(images)


def test_a_teacher_of_plain_layers_needs_no_more_than_its_file(tmp_path):
    net = plain()
    net[1].running_var.uniform_(0.5, 2)
    images, logits = kept(net, tmp_path / "t.safetensors")
    read = Teacher.load(tmp_path / "t.safetensors")
    assert torch.equal(read.net(images), logits)
    assert repr(read.net) == repr(net)
    assert all(p.requires_grad for p in read.net.parameters())
    assert (read.num_classes, read.shape) == (3, (3, 2, 2))


def test_a_teacher_of_ones_own_network_is_read_into_it(tmp_path):
    path, net = tmp_path / "t.safetensors", Branches()
    images, logits = kept(net, path, network="collections:OrderedDict")
    wanted = (
        r"t\.safetensors: network: expected .*: a Branches, by its maker's note 'collections:OrderedDict'; got None"
    )
    with pytest.raises(ValueError, match=wanted):
        Teacher.load(path)
    for network in (Branches(), Branches, f"{__name__}:Branches"):
        read = Teacher.load(path, network=network)
        assert torch.equal(read.net(images), logits)
        assert not read.net.training
    with pytest.raises(TypeError, match="network: expected a module or a function that makes one, got OrderedDict"):
        Teacher.load(path, network="collections:OrderedDict")
    for wrong in ("collections", "collections:Absent", "no.such.module:make"):
        with pytest.raises(ValueError, match=r"network: expected 'package\.module:function', got"):
            Teacher.load(path, network=wrong)
    with pytest.raises(ValueError, match=r"t\.safetensors: expected a whole teacher (?s:.*)Missing key"):
        Teacher.load(path, network=plain)


@pytest.mark.parametrize("change", ["hook", "forward", "subclass", "option"])
def test_what_only_looks_like_plain_layers_is_not_read_as_such(tmp_path, change):
    """Nor is a network named by the configuration, but with another activation, read as that one."""
    path, net = tmp_path / "t.safetensors", plain()
    if change == "hook":
        net[2].register_forward_hook(lambda module, inputs, output: output + 1)
    elif change == "forward":
        net[2].forward = torch.tanh
    elif change == "subclass":
        net[2] = type("ReLU", (nn.ReLU,), {"forward": lambda self, x: x})()
    else:
        net = ConvNet(3, 3, 4, 1, 2, norm="batch", act="leakyrelu")
    config = {"channels": 3, "image_size": 2, "dataset": "mine", "network": "convnet", "width": 4, "depth": 1}
    Teacher(net.eval(), torch.zeros(3), torch.ones(3), ("a", "b", "c"), config).save(path)
    with pytest.raises(ValueError, match="network: expected the module that its weights are of"):
        Teacher.load(path)
    assert Teacher.load(path, network=net).net is net


@pytest.mark.parametrize(
    "description",
    [
        {"layer": "Linear"},
        {"layer": "Linear", "options": {"in_features": -1, "out_features": 2}},
        {"layer": "Linear", "options": {"in_features": 1, "out_features": 2, "device": "cpu"}},
        {"layer": "Transformer", "options": {}},
        {"sequential": {"a.b": {"layer": "ReLU", "options": {}}}},
        {"sequential": [1]},
        ["Linear"],
        "os:system",
    ],
)
def test_a_description_of_something_else_is_refused(description):
    with pytest.raises(ValueError, match="description: expected layers of torch and their options, got others"):
        from_description(description)
