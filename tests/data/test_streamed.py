"""Streamed sets give the bits of sets in memory, in memory that does not depend on the number of images."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from pydistill.cli import main
from pydistill.data import DistilledSet, StreamedDataset, load, open_sources, pack, stream
from pydistill.data import streamed as module
from pydistill.evaluate import accuracy
from pydistill.methods import DATM, DM, MTT, TESLA, run
from pydistill.methods.decoupled.post_train import PostTrain
from pydistill.methods.decoupled.recover import RandomImages, real_images
from pydistill.methods.decoupled.relabel import Relabel
from pydistill.methods.decoupled.squeeze import Squeeze, Teacher, load_images, squeeze
from pydistill.methods.runs import Interrupted
from pydistill.trajectory import ExpertStore
from tests.data.pictures import CLASSES, make_folders, make_tiny_imagenet, picture

CONFIG = Squeeze(network="convnet", width=4, depth=1, epochs=2, batch_size=4)


@pytest.fixture
def sets(tmp_path, request):
    """A set in memory and the same streamed."""
    folder = make_folders(tmp_path / "set", {"train": 5, "val": 2})
    return load("image-folder", folder, image_size=8), stream("image-folder", folder, image_size=8)


@pytest.fixture
def _nothing_held(monkeypatch):
    monkeypatch.setattr(module, "_HELD", 0)


@pytest.mark.usefixtures("_nothing_held")
def test_another_default_device_changes_nothing(tmp_path):
    folder = make_folders(tmp_path, {"train": 5, "val": 2})
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            data = stream("image-folder", folder, image_size=8, workers=1)
            found.append((data.mean, data.train_labels, next(data.train_images.split(4)), *data.sample(2)[:1]))
    for cpu, other in zip(*found, strict=True):
        assert other.device.type == "cpu"
        assert cpu.shape == other.shape
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("limit", [0, 1 << 26])
def test_the_bits_of_a_set_in_memory(monkeypatch, sets, limit):
    monkeypatch.setattr(module, "_HELD", limit)
    whole, streamed = sets
    for name in ("mean", "std", "train_labels", "test_labels"):
        assert torch.equal(getattr(whole, name), getattr(streamed, name)), name
    for name in ("name", "class_names", "channels", "image_size", "num_classes"):
        assert getattr(whole, name) == getattr(streamed, name)
    assert streamed.train_images.shape == whole.train_images.shape
    for index in (torch.tensor([7, 0, 7]), slice(2, 6), whole.train_labels == 1):
        assert torch.equal(streamed.train_images[index], whole.train_images[index])
    for ours, theirs in zip(streamed.test_images.split(3), whole.test_images.split(3), strict=True):
        assert torch.equal(ours, theirs)
    drawn = [each.sample(2, torch.Generator().manual_seed(1)) for each in sets]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*drawn, strict=True))
    moved = streamed.to("meta")
    assert isinstance(moved, StreamedDataset)
    assert moved.train_images[:1].device.type == moved.train_labels.device.type == "meta"
    with pytest.raises(ValueError, match="image-folder: expected a set in memory to whiten"):
        streamed.whitened()


@pytest.mark.usefixtures("_nothing_held")
def test_squeeze_and_what_recovery_starts_from_have_the_bits_of_a_set_in_memory(sets):
    streamed = sets[1]
    streamed.train_images.workers = 1
    teachers = [squeeze(CONFIG, each) for each in sets]
    for ours, theirs in zip(*(t.net.state_dict().values() for t in teachers), strict=True):
        assert torch.equal(ours, theirs)
    found = [accuracy(teachers[0].net, each.test_images, each.test_labels, batch_size=3) for each in sets]
    assert found[0] == found[1]
    for start in ("random", "kmeans"):
        config = RandomImages(ipc=2, start=start)
        ours, theirs = (real_images(config, each, teachers[:1]) for each in sets)
        assert torch.equal(ours, theirs)


def peak(act) -> int:
    """The most memory, in bytes, that this process had in use during a call."""
    Path("/proc/self/clear_refs").write_text("5")
    act()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's count of peak memory")
@pytest.mark.usefixtures("_nothing_held")
def test_memory_does_not_depend_on_the_number_of_images(tmp_path):
    picture(0, 40, 40).save(tmp_path / "picture.png")
    roots = []
    for count in (200, 800):  # more than a batch of any pass
        for part, number in (("train", count), ("val", 1)):
            for name in ("a", "b"):
                (tmp_path / str(count) / part / name).mkdir(parents=True)
                for i in range(number):
                    os.link(tmp_path / "picture.png", tmp_path / str(count) / part / name / f"{i}.png")
        roots.append(tmp_path / str(count))

    def use(root):
        data = stream("image-folder", root, image_size=64)
        net = torch.nn.Sequential(torch.nn.AvgPool2d(64), torch.nn.Flatten(), torch.nn.Linear(3, 2))
        accuracy(net, data.train_images, data.train_labels, batch_size=20)

    for _ in range(2):
        use(roots[0])  # what is allocated once
    small, large = (peak(lambda root=root: use(root)) for root in roots)
    assert large - small < 7_000_000  # the larger set has 14.7 MB of bytes more


@pytest.mark.usefixtures("_nothing_held")
@pytest.mark.parametrize(
    "config",
    [
        DM(ipc=1, iterations=2, batch_real=3, augment="flip"),
        MTT(ipc=1, iterations=2, max_start_epoch=1, expert_epochs=1, syn_steps=2),
        DATM(ipc=1, iterations=2, max_start_epoch=1, expert_epochs=1, syn_steps=2),
    ],
    ids=lambda config: config.name,
)
def test_distillation_of_a_packed_set_reads_on_demand_to_the_same_bits(tmp_path, config):
    folder = make_folders(tmp_path / "set", {"train": 5, "val": 2})
    pack(*open_sources("image-folder", folder, image_size=16), tmp_path / "packed", name="image-folder")
    options = {"dataset": "image-folder", "image_size": 16, "width": 4, "depth": 1}
    options |= {"num_experts": 2, "train_epochs": 1} if config.needs_experts else {}
    options |= {"students": 2, "student_epochs": 1, "whole_epochs": 1, "batch_train": 4}
    results, made = [], []
    for root in (folder, tmp_path / "packed"):
        job = config.job(config.inputs.for_method(config, root=root, **options), torch.device("cpu"))
        assert isinstance(job.dataset.train_images, torch.Tensor) == root.is_dir()
        out = tmp_path / f"out {root.name}"
        results.append(run(config, out=out, root=root, **options))
        made.append(DistilledSet.load(out / "distilled.safetensors").images)
        if config.needs_experts:
            made[-1] = (made[-1], ExpertStore(out / "experts.store").tensor())
    assert results[0] == results[1]
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("_nothing_held")
def test_the_decoupled_steps_on_folders_packed_and_resumed(tmp_path):
    folder = make_folders(tmp_path / "set", {"train": 5, "val": 2})
    pack(*open_sources("image-folder", folder, image_size=8), tmp_path / "packed", name="image-folder")
    net, made = {"network": "convnet", "width": 4, "depth": 1}, {}
    for root in (folder, tmp_path / "packed"):
        out = tmp_path / f"out {root.name}"
        options = {"dataset": "image-folder", "root": root, "image_size": 8, "workers": 1, "out": out / "teacher"}
        config = Squeeze(**net, epochs=2, batch_size=4)
        epochs = []
        with pytest.raises(Interrupted):
            run(config, **options, on_progress=epochs.append, stop=lambda epochs=epochs: any(e.done for e in epochs))
        run(config, **options, resume=True)
        teacher, images = out / "teacher" / "teacher.safetensors", out / "images" / "distilled.safetensors"
        run(RandomImages(ipc=2), teacher=(teacher,), root=root, workers=0, out=images.parent)
        tested = out / "tested.json"
        sizes = ["--students", "1", "--epochs", "1", "--width", "4", "--depth", "1"]
        main(["evaluate", str(images), "--root", str(root), *sizes, "--json", str(tested)])
        run(Relabel(epochs=1), images=images, teacher=(teacher,), out=out / "labels")
        labels = out / "labels" / "labels.store"
        found = run(PostTrain(**net), images=images, labels=labels, root=root, out=out / "student")
        assert len(found["accuracy"]) == 1
        results = json.loads(tested.read_text())["nets"]
        student = out / "student" / "student.safetensors"
        made[root] = results, [path.read_bytes() for path in (teacher, images, student)]
    assert made[folder] == made[tmp_path / "packed"]
    streamed = stream("image-folder", folder, image_size=8)
    undisturbed = squeeze(config, streamed).net.state_dict()
    for name, value in Teacher.load(teacher).net.state_dict().items():
        assert torch.equal(value, undisturbed[name]), name


@pytest.mark.parametrize("config", [Squeeze(network="convnet", width=4, depth=1, epochs=1), DM(ipc=1, iterations=1)])
def test_a_run_goes_on_with_its_own_images_alone(tmp_path, config):
    """A set may lie elsewhere, or be packed; another one of the same names and numbers is refused."""
    root = make_folders(tmp_path / "set", {"train": 3, "val": 2})
    size = {} if config.name == "squeeze" else {"width": 4, "depth": 1, "students": 1, "student_epochs": 1}
    given = {"out": tmp_path / "run", "dataset": "image-folder", "image_size": 8, **size}
    run(config, **given, root=root)
    pack(*open_sources("image-folder", root, image_size=8), tmp_path / "packed", name="image-folder")
    run(config, **given, root=tmp_path / "packed", resume=True)
    for part, named in {"train": "6 images of train", "val": "4 images of test"}.items():
        for path in (root / part / CLASSES[0]).iterdir():
            picture(77 + int(path.stem)).save(path)
        with pytest.raises(ValueError, match=f"root: expected the {named} that the run in .* began with"):
            run(config, **given, root=root, resume=True)
        shutil.rmtree(root)
        make_folders(root, {"train": 3, "val": 2})


def test_the_presets_of_the_imagenets_can_be_reached(tmp_path):
    folder = make_tiny_imagenet(tmp_path)
    assert load("tiny-imagenet", folder).image_size == 64
    assert load("imagenet-1k", folder).image_size == 224
    for name, method in (("tiny-imagenet", MTT), ("imagenet-1k", TESLA)):
        config = method.preset(name, 1)
        inputs = method.inputs.for_method(config, dataset=name, root=folder)
        assert (inputs.depth, inputs.whole_epochs) == (4, 0)
    assert (load_images("imagenet-1k", folder, 8).mean * 1000).round().tolist() == [485, 456, 406]
