"""HeLlO: stored labels are the teachers' output for the same views, bytes are the files', runs can be resumed."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pydistill.cli import main
from pydistill.data import load, read_safetensors
from pydistill.methods.decoupled.hello import (
    HeLlO,
    class_means,
    easiest,
    fit_projector,
    post_train,
    stored_labels,
    views,
)
from tests.integration.commands import refused


def test_the_easiest_images_of_each_class_are_chosen():
    labels = torch.tensor([0, 1, 0, 1, 0])
    margins = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0])
    logits = torch.stack([margins * (1 - labels), margins * labels], 1)
    images = logits[:, :, None, None]
    assert easiest([nn.Flatten(), nn.Flatten()], images, labels, 2, 2).tolist() == [2, 4, 1, 3]
    with pytest.raises(ValueError, match="ipc: expected at most 2, the images of class 1, got 3"):
        easiest([nn.Flatten()], images, labels, 3, 2)


def test_class_means_leave_out_what_all_have_in_common():
    features = torch.tensor([[5.0, 1.0], [5.0, 3.0], [5.0, -2.0], [5.0, -2.0]])
    assert class_means(features, torch.tensor([0, 0, 1, 1]), 2).tolist() == [[0.0, 2.0], [0.0, -2.0]]


def test_stored_labels_are_the_teachers_at_the_views_that_a_student_sees():
    config = HeLlO(student_epochs=3, batch_size=4)
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 2
    teachers = [nn.Sequential(nn.Flatten(), nn.Linear(64, 2)) for _ in range(2)]
    stored = stored_labels(config, teachers, images)
    assert (stored.shape, stored.dtype) == ((3, 6, 2), torch.float16)
    seen = []

    class Student(nn.Linear):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x.flatten(1))

    post_train(config, Student(64, 2), images, labels, stored, 0)
    assert [len(x) for x in seen] == [4, 2] * 3
    for epoch in range(3):
        expected = views(images, 0, epoch)
        assert not torch.equal(expected, images)
        rows = torch.cat(seen[2 * epoch : 2 * epoch + 2])
        assert sorted(x.sum().item() for x in rows) == sorted(x.sum().item() for x in expected)
        truth = sum(teacher(expected) for teacher in teachers) / 2
        torch.testing.assert_close(stored[epoch].float(), truth, rtol=1e-3, atol=1e-3)


def test_what_is_refused():
    with pytest.raises(ValueError, match="teachers: expected at least 1, got 0"):
        HeLlO(teachers=0)
    projector = HeLlO(encoder_width=4).projector(HeLlO(encoder_width=4).encoder(1, 16), torch.randn(10, 16))
    with pytest.raises(ValueError, match="teachers: expected 2 as the projector has, got 1"):
        fit_projector(HeLlO(), projector, [nn.Flatten()], torch.randn(3, 1, 16, 16), torch.arange(3))


SMALL = [
    *("--encoder-epochs", "3", "--encoder-width", "8", "--teachers", "1", "--teacher-epochs", "3"),
    *("--fit-epochs", "8", "--lr", "5e-3", "--student-epochs", "25", "--students", "1", "--ipc", "3"),
    *("--rank", "1", "--image-steps", "2"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hello") / "run"
    main(["distill", "hello", "--out", str(folder), *SMALL])
    return folder


def test_bytes_and_accuracies(finished):
    results = json.loads((finished / "results.json").read_text())
    for name, file in (("projector", "projector"), ("stored", "labels"), ("encoder", "encoder")):
        assert results["bytes"][name] == (finished / f"{file}.safetensors").stat().st_size
    assert results["bytes"]["stored"] > 25 * 30 * 10 * 2  # epochs, images, classes, float16
    assert results["labeller"] > 0.6
    assert min(results["projector"][0], results["stored"][0]) > 0.4
    images = read_safetensors(finished / "images.safetensors", "hello images")[0]
    assert images["y"].tolist() == [k for k in range(10) for _ in range(3)]
    assert images["x"].shape == (30, *load("digits").train_images.shape[1:])
    assert F.mse_loss(images["x"], torch.zeros(())) > 0.1


def test_resumed_it_ends_in_the_same_bytes(finished, tmp_path, monkeypatch, capsys):
    from pydistill.cli.console import Stop

    folder = tmp_path / "run"
    command = ["distill", "hello", "--out", str(folder), *SMALL]
    with monkeypatch.context() as patched:
        patched.setattr(Stop, "requested", property(lambda self: (folder / "teachers.safetensors").exists()))
        with pytest.raises(SystemExit) as stopped:
            main(command)
    assert stopped.value.code == 130
    assert not (folder / "projector.safetensors").exists()
    main([*command, "--resume"])
    for path in finished.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    capsys.readouterr()
    message = "--ipc: expected at most 139, the images of the smallest class, got 5000"
    assert message in refused(capsys, "distill", "hello", "--ipc", "5000")
