"""Distilled files and exported folders are read back as written, or not at all."""

import json
import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pydistill import data
from pydistill.data import DistilledSet, distilled, load, renormalise, write_atomic
from pydistill.whitening import ZCA
from tests.package.foreign import RunsCode


def test_a_whitened_set_and_what_is_distilled_from_it(tmp_path):
    digits = load("digits", image_size=8)
    white = digits.whitened(eps=0.01)
    pixels = digits.pixels(digits.train_images)
    torch.testing.assert_close(white.pixels(white.train_images), pixels, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(white.train_images, ZCA.fit(pixels, 0.01)(pixels))
    assert (white.mean.item(), white.std.item()) == (0, 1)
    with pytest.raises(ValueError, match="digits: expected a set that is not whitened yet"):
        white.whitened()
    space = (white.mean, white.std, {}, "hard", white.zca)
    written = DistilledSet(white.train_images[:4].clone(), torch.arange(4), 0.1, *space)
    torch.testing.assert_close(written.pixels(), pixels[:4].clamp(0, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(written.normalise(digits.test_images, digits), white.test_images, atol=1e-4, rtol=1e-4)
    written.save(tmp_path / "d.safetensors")
    written.export(tmp_path / "folder")
    for read in (DistilledSet.load(tmp_path / "d.safetensors"), DistilledSet.import_tensors(tmp_path / "folder")):
        assert torch.equal(read.zca.matrix, white.zca.matrix)
        assert torch.equal(read.images, written.images)
    with pytest.raises(ValueError, match="zca: expected a set that is not whitened"):
        written.renormalised(white.mean, white.std)


def distilled_set(label_kind: str = "hard") -> DistilledSet:
    labels = torch.arange(4) if label_kind == "hard" else torch.rand(4, 4)
    config = {"dataset": "digits", "lr_img": 1e-7, "batch_syn": None, "class_names": ["é", "b"]}
    return DistilledSet(torch.randn(4, 3, 5, 6), labels, 0.1 + 0.2, torch.rand(3), torch.rand(3), config, label_kind)


@pytest.mark.parametrize("label_kind", ["hard", "logits", "probs"])
def test_a_distilled_set_comes_back_bit_for_bit(tmp_path, label_kind):
    written = distilled_set(label_kind)
    written.save(tmp_path / "d.safetensors")
    read = DistilledSet.load(tmp_path / "d.safetensors")
    for name in ("images", "labels", "mean", "std"):
        assert torch.equal(getattr(read, name), getattr(written, name)), name
        assert getattr(read, name).dtype == getattr(written, name).dtype
    assert (read.lr, read.config, read.label_kind) == (written.lr, written.config, label_kind)
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        header = json.loads(file.metadata()["pydistill"])
    assert isinstance(header.pop("crc32"), int)
    assert header == {"kind": "distilled", "version": 1, "config": written.config, "label_kind": label_kind}


def test_pixels_undo_the_normalisation():
    written = distilled_set()
    written.images = (torch.full((4, 3, 5, 6), 0.25) - written.mean[:, None, None]) / written.std[:, None, None]
    torch.testing.assert_close(written.pixels(), torch.full((4, 3, 5, 6), 0.25))


def test_images_go_from_one_normalisation_to_another():
    pixels = torch.rand(3, 2, 4, 5)
    before, after = [(torch.rand(2), torch.rand(2) + 0.1) for _ in range(2)]
    images, wanted = ((pixels - mean[:, None, None]) / std[:, None, None] for mean, std in (before, after))
    torch.testing.assert_close(renormalise(images, before, after), wanted)
    assert renormalise(images, before, (before[0].clone(), before[1].clone())) is images


def test_damaged_distilled_files_are_refused_by_name(tmp_path):
    path = tmp_path / "d.safetensors"
    with pytest.raises(FileNotFoundError, match=r"d\.safetensors: expected a pydistill file of kind 'distilled'"):
        DistilledSet.load(path)
    distilled_set().save(path)
    whole = path.read_bytes()
    for part in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", b"PK\x03\x04" + whole):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"d\.safetensors: expected .* 'distilled', version 1; it is truncated or"):
            DistilledSet.load(path)
    for metadata in (None, {"pydistill": "{"}, {"pydistill": "[]"}, {"pydistill": '{"kind": "distilled"}'}):
        save_file({"images": torch.zeros(1)}, path, metadata)
        with pytest.raises(ValueError, match=r"d\.safetensors: expected .*; its metadata lacks that"):
            DistilledSet.load(path)
    data.write_safetensors(path, {"images": torch.zeros(1)}, "distilled", {})
    with pytest.raises(ValueError, match=r"d\.safetensors: expected images, labels, lr, .*; labels, lr, mean, std mis"):
        DistilledSet.load(path)
    data.write_safetensors(path, {"x": torch.zeros(1)}, "experts", {})
    with pytest.raises(ValueError, match=r"expected a pydistill file of kind 'distilled', version 1; got 'experts'"):
        DistilledSet.load(path)


def test_a_flipped_bit_is_never_read_as_another_number(tmp_path):
    """What the checksum does not cover, such as an extra space in the JSON, changes nothing that is read."""
    path = tmp_path / "d.safetensors"
    written = distilled_set()
    written.save(path)
    whole = path.read_bytes()
    refused = 0
    for place in range(8, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            read = DistilledSet.load(path)
        except ValueError:
            refused += 1
        else:
            assert all(torch.equal(getattr(read, name), getattr(written, name)) for name in ("images", "labels", "std"))
            assert (read.config, read.lr) == (written.config, written.lr)
    assert refused > 0.9 * len(whole) / 7
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 0x10]))
    with pytest.raises(ValueError, match=r"d\.safetensors: expected .*; it is damaged: expected crc32 \d+, got \d+"):
        DistilledSet.load(path)


def test_a_file_without_a_checksum_is_read(tmp_path):
    """As written by versions before it existed."""
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(2)}, path, {"pydistill": '{"kind": "x", "version": 1, "config": {"a": 1}}'})
    tensors, header = data.read_safetensors(path, "x")
    assert tensors["x"].tolist() == [1, 1]
    assert header["config"] == {"a": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 5, 6)}, r"images: expected float32 \[N, C, H, W\], got float32 \[4, 5, 6\]"),
        ({"images": torch.zeros(4, 3, 5, 6).double()}, "images: expected float32"),
        ({"labels": torch.zeros(4)}, r"labels: expected int64 \[4\] for hard labels, got float32 \[4\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"got int64 \[3\]"),
        ({"label_kind": "probs"}, r"labels: expected float32 \[4, K\] for probs labels"),
        ({"label_kind": "soft"}, "label_kind: expected 'hard', 'logits' or 'probs', got 'soft'"),
        ({"mean": torch.zeros(1)}, r"mean: expected float32 \[3\], got float32 \[1\]"),
        ({"lr": torch.tensor(0.1)}, "lr: expected a float, got Tensor"),
    ],
)
def test_a_distilled_set_that_does_not_fit_together_is_refused(change, message):
    fields = {name: getattr(distilled_set(), name) for name in ("images", "labels", "lr", "mean", "std")}
    with pytest.raises(ValueError, match=message):
        DistilledSet(**{**fields, **change})


@pytest.mark.parametrize("label_kind", ["hard", "logits", "probs"])
def test_an_exported_set_comes_back_bit_for_bit(tmp_path, label_kind):
    written = distilled_set(label_kind)
    written.export(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["distilled.json", "images.pt", "labels.pt", "lr.pt"]
    read = DistilledSet.import_tensors(tmp_path / "a" / "b")
    for name in ("images", "labels", "mean", "std"):
        assert torch.equal(getattr(read, name), getattr(written, name)), name
        assert getattr(read, name).dtype == getattr(written, name).dtype
    assert (read.lr, read.config, read.label_kind) == (written.lr, written.config, label_kind)


def test_an_export_is_what_other_code_loads(tmp_path):
    """Plain torch.load, and the learning rate straight into an optimizer, as in DD-Ranking."""
    written = distilled_set("logits")
    written.images = written.images.requires_grad_()
    whole = torch.randn(50, 4)
    written.labels = whole[3:7]
    written.export(tmp_path)
    images, labels, lr = (
        torch.load(tmp_path / f"{name}.pt", map_location="cpu") for name in ("images", "labels", "lr")
    )
    assert torch.equal(images, written.images)
    assert torch.equal(labels, written.labels)
    assert not images.requires_grad
    assert labels.untyped_storage().nbytes() == labels.numel() * 4, "the rest of the tensor it is a view of is kept"
    assert lr.shape == ()
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    torch.optim.SGD([weight], lr=lr).step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.7))


def test_an_export_takes_the_place_of_another_only_when_told(tmp_path):
    first, second = distilled_set("probs"), distilled_set()
    first.export(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(FileExistsError, match=r"distilled\.json: expected no file there"):
        second.export(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    second.export(tmp_path, overwrite=True)
    assert DistilledSet.import_tensors(tmp_path).label_kind == "hard"
    for name in ("images", "lr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.pt").write_bytes(b"precious")
        with pytest.raises(FileExistsError, match=rf"{name}\.pt: expected no file there"):
            first.export(tmp_path / name)
        assert os.listdir(tmp_path / name) == [f"{name}.pt"]


def test_an_overwriting_export_that_is_cut_off_leaves_no_description_of_other_tensors(tmp_path, monkeypatch):
    distilled_set("probs").export(tmp_path)

    def fail(path, content):
        if path.name == "labels.pt":
            raise OSError("no space left on device")
        write_atomic(path, content)

    monkeypatch.setattr(distilled, "write_atomic", fail)
    with pytest.raises(OSError, match="no space left"):
        distilled_set("logits").export(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="mean, std: expected"):
        DistilledSet.import_tensors(tmp_path)


def test_what_the_method_repositories_save_is_read(tmp_path):
    """Learnt leaves that require gradients, a float32 rate, no description; MTT's best iterate."""
    images, logits = torch.randn(4, 3, 5, 6), torch.randn(4, 7)
    for name, tensor in (("images", images), ("labels", logits), ("lr", torch.tensor(0.02))):
        torch.save(tensor.clone().requires_grad_(), tmp_path / f"{name}_best.pt")
    mean, std = data.REPOSITORY_NORMALISATION["cifar10"]
    read = DistilledSet.import_tensors(tmp_path, mean=mean, std=std, label_kind="logits")
    assert torch.equal(read.images, images)
    assert torch.equal(read.labels, logits)
    assert not read.images.requires_grad
    assert (read.lr, read.config, read.label_kind) == (torch.tensor(0.02).item(), {}, "logits")
    assert read.mean.tolist() == torch.tensor(mean).tolist()
    torch.save(torch.nn.Parameter(images.double()), tmp_path / "images.pt")
    torch.save(torch.tensor([0, 2, 1, 2], dtype=torch.int32), tmp_path / "labels.pt")
    read = DistilledSet.import_tensors(tmp_path, mean=mean, std=std, lr=0.5)
    assert (read.labels.tolist(), read.label_kind, read.lr) == ([0, 2, 1, 2], "hard", 0.5)
    torch.testing.assert_close(read.images, images)


def test_another_normalisation_keeps_the_pixels():
    written = distilled_set()
    mean, std = (torch.tensor(each) for each in data.REPOSITORY_NORMALISATION["cifar10"])
    other = written.renormalised(mean, std)
    assert torch.equal(other.mean, mean)
    torch.testing.assert_close(other.pixels(), written.pixels())
    assert (other.images - written.images).abs().max() > 0.1
    assert (other.lr, other.config) == (written.lr, written.config)


WHITENING = {"mean": torch.zeros(3, 5, 6), "matrix": torch.eye(90), "inverse_matrix": torch.eye(90)}


def save_export(folder, **contents):
    distilled_set("logits").export(folder, overwrite=True)
    for name, content in contents.items():
        path = folder / {"header": "distilled.json"}.get(name, f"{name}.pt")
        if content is None:
            path.unlink()
        elif isinstance(content, (bytes, str)):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            torch.save(content, path)


@pytest.mark.parametrize(
    ("contents", "error", "message"),
    [
        ({"images": None}, FileNotFoundError, r"images\.pt: expected a tensor that torch\.save wrote, found no file"),
        ({"labels": None}, FileNotFoundError, r"labels\.pt: expected a tensor"),
        ({"labels": b"PK"}, ValueError, r"labels\.pt: expected a tensor .*truncated, damaged or foreign"),
        ({"images": b""}, ValueError, r"images\.pt: expected a tensor .*truncated, damaged or foreign"),
        ({"images": [torch.zeros(4)]}, ValueError, r"images\.pt: expected a tensor .*got a list"),
        ({"images": torch.zeros(4, 5, 6)}, ValueError, r"images: expected float32 \[N, C, H, W\], got float32"),
        ({"images": torch.zeros(4, 1, 5, 6)}, ValueError, r"mean: expected float32 \[1\], got float32 \[3\]"),
        ({"labels": torch.zeros(3, 4)}, ValueError, r"labels: expected float32 \[4, K\] for logits labels"),
        ({"images": torch.full((4, 3, 5, 6), math.nan)}, ValueError, r"images\.pt: expected finite numbers"),
        ({"labels": torch.full((4, 4), math.inf)}, ValueError, r"labels\.pt: expected finite numbers"),
        ({"labels": torch.tensor([0, 1, -1, 2])}, ValueError, r"labels\.pt: expected classes from 0 on, got -1"),
        ({"lr": torch.tensor(math.nan)}, ValueError, r"lr\.pt: expected finite numbers"),
        ({"zca": {"mean": torch.zeros(3, 5, 6)}}, ValueError, r"zca\.pt: expected mean, matrix and .*something else"),
        ({"zca": WHITENING | {"matrix": torch.eye(3)}}, ValueError, r"zca\.pt: .*matrix: expected torch\.float32 \[90"),
        ({"zca": WHITENING | {"mean": torch.zeros(3, 6, 5)}}, ValueError, r"zca: expected .*\[3, 5, 6\], got one of"),
        ({"zca": WHITENING | {"matrix": torch.eye(90) * math.nan}}, ValueError, r"zca\.pt: expected finite numbers"),
        ({"zca": b"PK"}, ValueError, r"zca\.pt: expected mean, matrix and inverse_matrix .*truncated, damaged"),
        ({"lr": torch.zeros(2)}, ValueError, r"lr\.pt: expected one number, got float32 \[2\]"),
        ({"lr": None}, ValueError, r"lr: expected a learning rate, .*lr\.pt is not there"),
        ({"header": None}, ValueError, "mean, std: expected those of the images' normalised space"),
        ({"header": "{"}, ValueError, r"distilled\.json: expected mean, std, label_kind and config as JSON"),
        ({"header": '{"mean": [1], "std": 3}'}, ValueError, r"distilled\.json: expected mean, std, label_kind"),
    ],
)
def test_folders_of_tensors_that_do_not_fit_are_refused(tmp_path, contents, error, message):
    save_export(tmp_path, **contents)
    with pytest.raises(error, match=message):
        DistilledSet.import_tensors(tmp_path)


def test_a_folder_does_not_guess_what_its_soft_labels_are(tmp_path):
    save_export(tmp_path, header=None)
    with pytest.raises(ValueError, match=r"label_kind: expected 'logits' or 'probs', .* does not say"):
        DistilledSet.import_tensors(tmp_path, mean=[0.5] * 3, std=[1.0] * 3)


def test_a_tensor_file_that_runs_code_is_refused_and_does_not_run(tmp_path):
    save_export(tmp_path)
    torch.save(RunsCode(tmp_path / "ran"), tmp_path / "images.pt")
    with pytest.raises(ValueError, match=r"images\.pt: expected a tensor that torch\.save wrote; .*which may run code"):
        DistilledSet.import_tensors(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="no space left"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
