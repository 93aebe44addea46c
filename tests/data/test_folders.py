"""Folders of pictures are found as torchvision finds them; what is wrong with them is named."""

import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import torch

from pydistill.data import load
from pydistill.data.folders import FolderImages, folder_splits
from pydistill.data.pictures import read_picture
from tests.data.pictures import CLASSES, make_folders, make_tiny_imagenet, picture
from tests.peers import peer


def test_the_same_pictures_in_the_same_order_as_torchvisions(tmp_path):
    peer("torchvision")
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    make_folders(tmp_path, {"train": 3, "val": 1}, ("b", "a", "ä ö"), "JPEG")
    deep = tmp_path / "train" / "a" / "0" / "more"
    deep.mkdir(parents=True)
    picture(1, 9, 30).save(deep / "10.webp")
    picture(2, 8, 8).save(deep / "9.BMP")
    (deep / "notes.txt").write_text("no picture")
    to_pixels = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    theirs = ImageFolder(str(tmp_path / "train"), v2.Compose([v2.Resize(8), v2.CenterCrop(8), *to_pixels]))
    ours = FolderImages(tmp_path / "train", 8)
    assert [ours.name(i) for i in range(len(ours))] == [path for path, _ in theirs.imgs]
    assert ours.labels.tolist() == theirs.targets
    assert list(ours.class_names) == theirs.classes
    pixels = torch.stack([image for image, _ in theirs])
    np.testing.assert_array_equal(ours.read(range(len(ours))), (pixels * 255).round().byte().numpy())
    # what a data set was made of so far: every bit of it
    mean = pixels.mean(dim=(0, 2, 3), dtype=torch.float64)
    std = torch.stack([pixels[:, c].double().sub_(mean[c]).square_().mean().sqrt() for c in range(3)])
    expected = pixels.sub_(mean.float()[:, None, None]).div_(std.float()[:, None, None])
    assert torch.equal(load("image-folder", tmp_path, image_size=8).train_images, expected)


def test_image_folder(tmp_path):
    make_folders(tmp_path, {"train": 3, "val": 1})
    found = load("image-folder", tmp_path, image_size=8)
    assert found.train_images.shape == (6, 3, 8, 8)
    assert found.class_names == CLASSES
    assert found.test_labels.tolist() == [0, 1]
    pixels = np.stack([read_picture(tmp_path / "train" / n / f"{i}.png", 8) for n in CLASSES for i in range(3)])
    np.testing.assert_allclose(found.pixels(found.train_images).numpy() * 255, pixels, atol=1e-3)
    np.testing.assert_allclose(found.std.numpy(), pixels.std((0, 2, 3)) / 255, rtol=1e-5)
    assert load("image-folder", tmp_path).image_size == 32
    (tmp_path / "train" / "n01" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"train/n01/1\.png: expected a whole picture"):
        load("image-folder", tmp_path, image_size=8)


def test_tiny_imagenet_as_it_is_unzipped(tmp_path):
    train, test = folder_splits(make_tiny_imagenet(tmp_path), 8)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [1, 0]
    assert test.class_names == CLASSES
    assert test.name(1) == str(tmp_path / "val" / "images" / "val_1.JPEG")
    np.testing.assert_array_equal(test.read([1])[0], read_picture(test.name(1), 8))
    lines = (tmp_path / "val" / "val_annotations.txt").read_text().replace("n02", "n03")
    (tmp_path / "val" / "val_annotations.txt").write_text(lines)
    with pytest.raises(
        ValueError, match=r"val_annotations\.txt: line 1: .* one of train's 2, .*; got 'val_0\.JPEG\\tn03"
    ):
        folder_splits(tmp_path, 8)


def test_a_test_folder_without_classes_is_passed_over(tmp_path):
    make_folders(tmp_path, {"train": 1, "val": 2})
    (tmp_path / "test").mkdir()
    picture(1).save(tmp_path / "test" / "1.png")
    assert len(folder_splits(tmp_path, 8)[1]) == 4
    shutil.copytree(tmp_path / "train", tmp_path / "test", dirs_exist_ok=True)
    assert len(folder_splits(tmp_path, 8)[1]) == 2


def without(path):
    return lambda root: shutil.rmtree(root / path)


def emptied(path):
    return lambda root: [each.unlink() for each in (root / path).iterdir()]


def back(root):
    (root / "train" / "n01" / "more").mkdir()
    (root / "train" / "n01" / "more" / "all").symlink_to("../..")


def loose(root):
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    picture(1).save(root / "val" / "1.png")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (without("val"), FileNotFoundError, r"root: expected train/<class>/\* and test/<class>/\* .*, got train"),
        (without("train"), FileNotFoundError, r"root: .*, got val"),
        (without("val/n01"), ValueError, r"root: .* same classes in train and val of .*, 'n01' only in train$"),
        (without("train/n02"), ValueError, r"root: .* same classes in train and val of .*, 'n02' only in val$"),
        (emptied("train/n02"), ValueError, r"train: expected pictures .* none in 'n02': add some, or remove it"),
        (back, ValueError, r"train/n01/more/all: expected a link to other folders, it leads back to one"),
        (loose, ValueError, r"val: expected a folder of pictures for each class: .*; got none, and 1 pictures: sort"),
    ],
)
def test_what_is_wrong_with_folders_is_named(tmp_path, damage, error, message):
    damage(make_folders(tmp_path, {"train": 1, "val": 1}))
    with pytest.raises(error, match=message):
        load("image-folder", tmp_path, image_size=8)


def test_only_images_that_there_are(tmp_path):
    source = FolderImages(make_folders(tmp_path, {"train": 1}) / "train", 8)
    assert source.read([]).shape == (0, 3, 8, 8)
    for wrong in ([0, 2], [-1]):
        with pytest.raises(IndexError, match="indices: expected images 0 to 1, got"):
            source.read(wrong)


def test_what_a_started_worker_gets_of_an_index_is_shared(tmp_path):
    source = FolderImages(make_folders(tmp_path, {"train": 2}) / "train", 8)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read([3, 0]), source.read([3, 0]))
    # as for a process that is spawned: tensors go by reference
    sent = multiprocessing.reduction.ForkingPickler.dumps(source)
    assert len(sent) < 1500
    assert source._names._text.is_shared()
    assert source.labels.is_shared()
