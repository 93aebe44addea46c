"""Data sets are read whole, or refused by name."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pydistill.data import load
from pydistill.data.loading import FASHION_MNIST_ROOT
from tests.data.pictures import make_folders
from tests.package.foreign import RunsCode


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_fashion_mnist(folder: Path, suffix: str = "") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, count in (("train", 30), ("t10k", 10)):
        arrays[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    for stem, array in arrays.items():
        write_idx(folder / (stem + suffix), array)
    return arrays


def write_cifar10(folder: Path) -> np.ndarray:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 4, 3072), np.uint8)
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {b"data": pixels[index], b"labels": [index, 1, 2, 9], b"batch_label": b"a batch"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return pixels


def test_digits_are_split_evenly_and_normalised():
    digits = load("digits")
    assert digits.train_images.shape == (1433, 1, 16, 16)
    assert digits.test_images.shape == (364, 1, 16, 16)
    share = digits.test_labels.bincount() / (digits.train_labels.bincount() + digits.test_labels.bincount())
    assert (share - 0.2).abs().max() < 0.01
    assert digits.class_names == tuple("0123456789")
    torch.testing.assert_close(digits.train_images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(digits.train_images.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)
    pixels = digits.train_images * digits.std[:, None, None] + digits.mean[:, None, None]
    assert -1e-6 < pixels.min() < 1e-6
    assert 0.99 < pixels.max() <= 1 + 1e-6
    assert torch.equal(load("digits").train_images, digits.train_images)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_from_idx_files(tmp_path, suffix):
    arrays = write_fashion_mnist(tmp_path, suffix)
    found = load("fashion-mnist", tmp_path)
    pixels = arrays["train-images-idx3-ubyte"] / 255.0
    expected = (arrays["t10k-images-idx3-ubyte"] / 255.0 - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(found.test_images[:, 0].numpy(), expected, atol=1e-5)
    assert found.train_labels.tolist() == [i % 10 for i in range(30)]
    assert (found.channels, found.image_size, found.num_classes) == (1, 28, 10)
    np.testing.assert_allclose(found.std.numpy(), [pixels.std()], rtol=1e-6)


@pytest.mark.skipif(not FASHION_MNIST_ROOT.is_dir(), reason="Debian's Fashion-MNIST is not installed")
def test_fashion_mnist_where_debian_puts_it():
    found = load("fashion-mnist")
    assert found.train_images.shape == (60000, 1, 28, 28)
    assert found.test_labels.bincount().tolist() == [1000] * 10
    assert found.mean.item() == pytest.approx(0.2860, abs=1e-4)
    assert found.std.item() == pytest.approx(0.3530, abs=1e-4)


def break_magic(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(b"GIF89a and more")


def break_size(folder):
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def break_gzip(folder):
    plain = folder / "train-images-idx3-ubyte"
    whole = gzip.compress(plain.read_bytes())
    plain.unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])


def break_labels(folder):
    write_idx(folder / "train-labels-idx1-ubyte", np.full(30, 10, np.uint8))


def break_count(folder):
    write_idx(folder / "t10k-labels-idx1-ubyte", np.zeros(9, np.uint8))


def break_shape(folder):
    write_idx(folder / "train-images-idx3-ubyte", np.zeros((30, 14, 14), np.uint8))


def break_absence(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_magic, ValueError, r"train-images-idx3-ubyte: expected an IDX file .* 00 00 08 03; .* 47 49 46 38"),
        (break_size, ValueError, r"t10k-images-idx3-ubyte: expected 10x28x28 = 7840 bytes .*, got 7839"),
        (break_gzip, ValueError, r"train-images-idx3-ubyte\.gz: expected a whole gzip file"),
        (break_labels, ValueError, r"expected train labels in 0\.\.9, got 10"),
        (break_count, ValueError, r"expected 10 t10k labels as images, got 9"),
        (break_shape, ValueError, r"expected train images of 28x28, got 14x14"),
        (break_absence, FileNotFoundError, r"t10k-labels-idx1-ubyte\.gz: expected an IDX file of 1 dimensions"),
    ],
)
def test_damaged_idx_files_are_refused_by_name(tmp_path, damage, error, message):
    write_fashion_mnist(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_cifar10_from_python_batches(tmp_path, nested):
    folder = tmp_path / "cifar-10-batches-py" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    pixels = write_cifar10(folder)
    found = load("cifar10", tmp_path)
    assert found.train_images.shape == (20, 3, 32, 32)
    assert found.train_labels[::4].tolist() == [0, 1, 2, 3, 4]
    assert found.class_names[9] == "truck"
    restored = found.test_images * found.std[:, None, None] + found.mean[:, None, None]
    np.testing.assert_allclose(restored.reshape(4, 3072).numpy() * 255, pixels[5], atol=1e-3)


def write_cifar100(folder: Path) -> np.ndarray:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 5, 3072), np.uint8)
    for index, name in enumerate(("train", "test")):
        batch = {b"data": pixels[index], b"fine_labels": [index, 1, 2, 99, 50], b"coarse_labels": [0] * 5}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f"class {i}".encode() for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol=2))
    return pixels


@pytest.mark.parametrize("nested", [False, True])
def test_cifar100_from_python_batches(tmp_path, nested):
    folder = tmp_path / "cifar-100-python" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    pixels = write_cifar100(folder)
    found = load("cifar100", tmp_path)
    assert found.train_labels.tolist() == [0, 1, 2, 99, 50]
    assert (found.num_classes, found.class_names[99]) == (100, "class 99")
    restored = found.pixels(found.test_images)
    np.testing.assert_allclose(restored.reshape(5, 3072).numpy() * 255, pixels[1], atol=1e-3)
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"one"]}))
    with pytest.raises(ValueError, match=r"meta: expected CIFAR-100's meta file: .* 100 of them; got others"):
        load("cifar100", tmp_path)
    (folder / "test").write_bytes(pickle.dumps({b"data": pixels[1], b"fine_labels": [0, 1, 2, 3, 100]}))
    with pytest.raises(ValueError, match=r"test: expected a CIFAR-100 python batch.*'fine_labels'.*; got other"):
        load("cifar100", tmp_path)


def test_a_batch_that_runs_code_is_refused_and_does_not_run(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": RunsCode(tmp_path / "ran")}))
    with pytest.raises(ValueError, match=r"data_batch_3: expected a CIFAR-10 python batch.*asks for posix\.mkdir"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or foreign"),
        (b"\x89PNG", "truncated or foreign"),
        (pickle.dumps([1, 2]), "got a list"),
        (pickle.dumps({b"data": np.zeros((4, 3072), np.float32), b"labels": [0] * 4}), r"got float32 \[4, 3072\]"),
        (pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 10]}), "other 'labels'"),
        (pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1]}), "other 'labels'"),
    ],
)
def test_foreign_cifar10_batches_are_refused_by_name(tmp_path, content, message):
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=rf"test_batch: expected a CIFAR-10 python batch.*{message}"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "hidden", "message"),
    [
        ("digits", ("sklearn", "sklearn.datasets"), r"pip install 'pydistill\[demo\]'"),
        ("image-folder", ("PIL", "PIL.Image"), r"pip install 'pydistill\[cli\]'"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(tmp_path, monkeypatch, name, hidden, message):
    make_folders(tmp_path, {"train": 1, "val": 1})
    for module in hidden:
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(RuntimeError, match=message):
        load(name, None if name == "digits" else tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "mnist"}, ValueError, "name: expected one of digits, .*, got 'mnist'"),
        ({"name": "cifar10"}, ValueError, "root: expected the folder .* got None"),
        ({"name": "digits", "root": "/x"}, ValueError, "root: expected none"),
        ({"name": "fashion-mnist", "image_size": 32}, ValueError, "image_size: expected none"),
        ({"name": "digits", "image_size": 0}, ValueError, "image_size: expected at least 1"),
        ({"name": "cifar10", "root": "/no/such/folder"}, FileNotFoundError, "root: .* found none at /no/such/folder"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        load(**arguments)


def test_a_sample_has_each_class_and_no_image_twice():
    digits = load("digits", image_size=8)
    images, labels = digits.sample(5, torch.Generator().manual_seed(1))
    assert labels.tolist() == [label for label in range(10) for _ in range(5)]
    assert len(images.flatten(1).unique(dim=0)) == 50
    again, _ = digits.sample(5, torch.Generator().manual_seed(1))
    assert torch.equal(images, again)
    with pytest.raises(ValueError, match="ipc: expected at most 142, the training images of '0', got 1000"):
        digits.sample(1000)
    with pytest.raises(ValueError, match="ipc: expected at least 1"):
        digits.sample(0)


def test_a_sample_prefers_what_it_is_told_to():
    digits = load("digits", image_size=8)
    preferred = torch.zeros(len(digits.train_images), dtype=torch.bool)
    preferred[::7] = True
    images, _ = digits.sample(3, torch.Generator().manual_seed(1), preferred)
    wanted = {image.numpy().tobytes() for image in digits.train_images[preferred]}
    assert {image.numpy().tobytes() for image in images} <= wanted
    assert len(digits.sample(100, None, preferred)[0]) == 1000  # if they do not suffice, others follow
