"""Packed sets hold the very images, in equal bytes; cut off they continue, damaged they are refused by name."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from pydistill.cli import main
from pydistill.data import PackedImages, load, open_sources, pack
from pydistill.data import packed as module
from pydistill.data.reading import cores, read_ahead
from tests.data.pictures import make_folders
from tests.interrupted import Disk, KilledError
from tests.package.test_data import write_fashion_mnist


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 3 * 3 * 8 * 8)  # three images


@pytest.fixture
def folder(tmp_path):
    return make_folders(tmp_path / "set", {"train": 4, "val": 1})


def packed(folder, path, **options):
    return pack(*open_sources("image-folder", folder, image_size=8), path, name="image-folder", **options)


def test_the_very_images_by_any_index(folder, tmp_path):
    sources = open_sources("image-folder", folder, image_size=8)
    found = packed(folder, tmp_path / "a.packed")
    for ours, theirs in zip((found.train, found.test), sources, strict=True):
        order = torch.randperm(len(theirs))
        np.testing.assert_array_equal(ours.read(order), theirs.read(order))
        assert torch.equal(ours.labels, theirs.labels)
        assert (ours.class_names, ours.shape, len(ours)) == (theirs.class_names, theirs.shape, len(theirs))
    whole = sources[0].read(range(8))
    counts = torch.stack([torch.from_numpy(whole[:, c].reshape(-1)).bincount(minlength=256) for c in range(3)])
    assert torch.equal(found.train.histogram, counts)
    assert found.skipped == 0
    found.verify()
    again = pickle.loads(pickle.dumps(found.test))
    np.testing.assert_array_equal(again.read([1, 0]), sources[1].read([1, 0]))
    memory, unpacked = load("image-folder", tmp_path / "a.packed"), load("image-folder", folder, image_size=8)
    assert torch.equal(memory.train_images, unpacked.train_images)
    assert torch.equal(memory.test_images, unpacked.test_images)


def writes_only(log):
    return [entry for entry in log if entry != "sync"]


def test_equal_bytes_whatever_the_workers_and_from_wherever_it_was_killed(folder, tmp_path, monkeypatch):
    packed(folder, tmp_path / "whole")
    wanted = (tmp_path / "whole").read_bytes()
    packed(folder, tmp_path / "workers", workers=2)
    assert (tmp_path / "workers").read_bytes() == wanted
    with monkeypatch.context() as patch:
        disk = Disk(patch, PackedImages, 1 << 30)
        packed(folder, tmp_path / "counted")
    writes = [entry[1] for entry in writes_only(disk.log)]
    assert disk.log[-6::2] == writes_only(disk.log)[-3:]  # synced after each of a block's three writes
    for left in np.cumsum([0, *writes])[:-1] + 5:
        with monkeypatch.context() as patch:
            Disk(patch, PackedImages, int(left))
            with pytest.raises(KilledError):
                packed(folder, tmp_path / "killed")
        assert not (tmp_path / "killed").exists()
        done = []
        packed(folder, tmp_path / "killed", on_step=done.append)
        assert sum(done) == 10
        assert done[0] == 3 * sum(end <= left for end in np.cumsum(writes)[2::3])
        assert (tmp_path / "killed").read_bytes() == wanted
        (tmp_path / "killed").unlink()
    assert not list(tmp_path.glob(".*"))


def test_what_was_left_of_other_images_is_not_continued(folder, tmp_path):
    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed(folder, tmp_path / "a", on_step=stop)
    assert (tmp_path / ".a.packing").exists()
    (folder / "train" / "n01" / "3.png").rename(folder / "train" / "n01" / "9.png")
    packed(folder, tmp_path / "a")
    packed(folder, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = make_folders(tmp_path / "other", {"train": 4, "val": 1})  # the same names
    for number, picture in enumerate(sorted((other / "train").rglob("*.png"))):
        shutil.copyfile(folder / "train" / "n02" / f"{number % 3}.png", picture)
    with pytest.raises(KeyboardInterrupt):
        packed(folder, tmp_path / "c", on_step=stop)
    packed(other, tmp_path / "c")
    packed(other, tmp_path / "d")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()


def test_a_damaged_picture_is_refused_by_name_or_left_out(folder, tmp_path):
    broken = folder / "train" / "n01" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    for workers in (0, 1):
        with pytest.raises(
            ValueError,
            match=r"^[^\n]*train/n01/1\.png: expected a whole picture[^\n]*: remove it, or leave it out[^\n]*$",
        ):
            packed(folder, tmp_path / "a", workers=workers)
    told = []
    found = packed(folder, tmp_path / "a", skip_damaged=True, tell=told.append)
    assert len(told) == found.skipped == 1
    assert "left out" in told[0]
    assert "train/n01/1.png" in told[0]
    source = open_sources("image-folder", folder, image_size=8)[0]
    kept = [0, 2, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(found.train.read(range(7)), source.read(kept))
    assert torch.equal(found.train.labels, source.labels[kept])
    assert len(found.train) == 7
    assert int(found.train.histogram[0].sum()) == 7 * 64
    found.verify()
    (folder / "val" / "n02" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="test: expected a whole picture of each class, 'n02' has none"):
        packed(folder, tmp_path / "b", skip_damaged=True)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_damaged_files_are_refused_by_name(folder, tmp_path):
    path = tmp_path / "a"
    store = packed(folder, path)
    whole = store.train.read([2, 4])
    flip(path, store._images_at + 3 * 192 + 5)
    again = PackedImages(path)
    np.testing.assert_array_equal(again.train.read([2, 4]), whole)
    for use in (lambda: again.train.read([3]), again.verify):
        with pytest.raises(ValueError, match="a: image 3 is damaged: pack the set again"):
            use()
    flip(path, store._counts_at + 7)
    with pytest.raises(ValueError, match="a: its counts of values are damaged"):
        _ = PackedImages(path).histogram
    flip(path, store._table_at + 5)
    with pytest.raises(ValueError, match="a: its table is damaged"):
        PackedImages(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a: expected .* bytes as its header says, it is truncated"):
        PackedImages(path)
    path.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="a: expected a packed image set, which starts with"):
        load("image-folder", path)


def test_a_file_that_is_copied_over_while_it_is_open_is_refused(folder, tmp_path):
    """Its table is mapped, so that the new checksums would fit the new images, beside the old labels."""
    packed, other = tmp_path / "packed", tmp_path / "other"
    for path in (packed, other):
        pack(*open_sources("image-folder", folder, image_size=8), path, name="image-folder")
    with PackedImages(packed) as images:
        images.train.read([0])
        shutil.copyfile(other, packed)
        with pytest.raises(ValueError, match="packed: it was written to since it was opened"):
            images.train.read([1])


def test_sets_that_are_no_pictures_keep_their_bits(tmp_path):
    write_fashion_mnist(tmp_path)
    pack(*open_sources("fashion-mnist", tmp_path), tmp_path / "packed", name="fashion-mnist")
    found, unpacked = load("fashion-mnist", tmp_path / "packed"), load("fashion-mnist", tmp_path)
    for name in ("train_images", "train_labels", "test_images", "test_labels", "mean", "std"):
        assert torch.equal(getattr(found, name), getattr(unpacked, name)), name
    assert found.class_names == unpacked.class_names


def test_a_folder_is_not_replaced(folder, tmp_path):
    begun = []
    with pytest.raises(FileExistsError, match="expected a file to make or to replace, it is a folder"):
        packed(folder, folder, overwrite=True, on_step=begun.append)
    assert not begun


def test_what_does_not_fit_is_named(folder, tmp_path):
    path = tmp_path / "a"
    packed(folder, path)
    with pytest.raises(FileExistsError, match="a: it exists already"):
        packed(folder, path)
    packed(folder, path, overwrite=True)
    with pytest.raises(ValueError, match="a: expected a packed cifar10, got a packed image-folder"):
        load("cifar10", path)
    with pytest.raises(ValueError, match=r"image_size: expected 8, to which .*a was packed, got 16"):
        load("image-folder", path, image_size=16)
    with pytest.raises(ValueError, match=r"name: expected one of fashion-mnist, .*, got 'digits'"):
        open_sources("digits")
    with pytest.raises(ValueError, match="test: expected images of the shape and the classes of train"):
        pack(PackedImages(path).train, open_sources("image-folder", folder)[1], tmp_path / "b", name="image-folder")


def test_reading_ahead_leaves_random_numbers_alone_and_keeps_the_order(folder):
    source = open_sources("image-folder", folder, image_size=8)[0]
    batches = torch.randperm(8).split(3)
    before = torch.get_rng_state()
    found = [images for images, _ in read_ahead(source, batches, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    for images, index in zip(found, batches, strict=True):
        np.testing.assert_array_equal(images.numpy(), source.read(index))


def test_the_command(folder, tmp_path, capsys):
    (folder / "train" / "n02" / "0.png").write_bytes(b"")
    arguments = ["pack", str(folder), str(tmp_path / "a"), "--image-size", "8", "--workers", "0"]
    for more, message in (
        ([], "n02/0.png: expected a whole picture"),
        (["--workers", str(cores() + 1)], f"workers: expected 0 to {cores()}, the cores"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *more])
        assert message in capsys.readouterr().err
    main([*arguments, "--skip-damaged"])
    shown = capsys.readouterr().out
    assert "left out" in shown
    assert "7 training and 2 test images of 2 classes, 3x8x8, 1 damaged ones left out ->" in shown
