"""Pictures in shards are those of the folders that the shards were made of; what is wrong with a shard is named."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pydistill.data import load, open_sources
from pydistill.data.folders import folder_splits
from tests.data.pictures import CLASSES, make_folders
from tests.peers import peer


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tars(source, path, labels="cls"):
    """Two shards of a source's pictures, in order; labels as ``cls`` or ``json``."""
    path.mkdir(exist_ok=True)
    half = -(-len(source) // 2)
    for shard in range(2):
        with tarfile.open(path / f"set-{source.folder.name}-{shard:04d}.tar", "w") as tar:
            for index in range(len(source))[shard * half :][:half]:
                label = int(source.labels[index])
                content = str(label) if labels == "cls" else json.dumps({"label": label, "size": 3})
                add(tar, f"some/{index:06d}.{labels}", content.encode())
                add(tar, f"some/{index:06d}.png", Path(source.name(index)).read_bytes())
                add(tar, f"some/{index:06d}.txt", b"a caption")


def write_arrow(source, path, ending):
    import pyarrow
    from pyarrow import parquet

    path.mkdir(exist_ok=True)
    images = [{"bytes": Path(source.name(i)).read_bytes(), "path": f"{i}.png"} for i in range(len(source))]
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    table = pyarrow.table({"image": images, "label": source.labels.numpy()})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    split = {"train": "train", "val": "validation"}[source.folder.name]
    half = -(-len(table) // 2)
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        file = path / f"{split}-{number:05d}-of-00002.{ending}"
        if ending == "parquet":
            parquet.write_table(part, file, row_group_size=2)
        else:
            with pyarrow.OSFile(str(file), "wb") as out, pyarrow.ipc.new_stream(out, part.schema) as writer:
                writer.write_table(part)


@pytest.fixture
def folders(tmp_path):
    return folder_splits(make_folders(tmp_path / "set", {"train": 5, "val": 2}), 8)


@pytest.mark.parametrize("kind", ["cls", "json", "parquet", "arrow"])
def test_the_pictures_of_the_folders_by_any_index(folders, tmp_path, kind):
    if kind in ("parquet", "arrow"):
        peer("pyarrow")
    for source in folders:
        if kind in ("parquet", "arrow"):
            write_arrow(source, tmp_path / "shards", kind)
        else:
            write_tars(source, tmp_path / "shards", kind)
    found = open_sources("image-folder", tmp_path / "shards", image_size=8)
    for ours, theirs in zip(found, folders, strict=True):
        order = torch.randperm(len(theirs))
        np.testing.assert_array_equal(ours.read(order), theirs.read(order))
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.class_names == (CLASSES if kind in ("parquet", "arrow") else ("0", "1"))
        again = pickle.loads(pickle.dumps(ours))
        np.testing.assert_array_equal(again.read([1, 0]), theirs.read([1, 0]))
        assert f"set-{theirs.folder.name}-0000.tar: some/000001" in ours.name(1) or "-00000-of-00002" in ours.name(1)
    with_folders = load("image-folder", tmp_path / "set", image_size=8).train_images
    assert torch.equal(load("image-folder", tmp_path / "shards", image_size=8).train_images, with_folders)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("size", [0, 512, 700, 5 * 1024 + 300, -10240, -10239, -1000000])
def test_a_shard_that_ends_within_a_record_is_named(folders, tmp_path, size):
    for source in folders:
        write_tars(source, tmp_path / "shards")
    path = tmp_path / "shards" / "set-train-0001.tar"
    whole = len(path.read_bytes())
    end = whole - 10240 if whole > 20480 else 10240
    if size < 0:  # the end mark is missing; a byte of it is there; all that was written
        with tarfile.open(path) as tar:
            *_, last = tar
        end = last.offset_data + 512
        size = {-10240: end, -10239: end + 1, -1000000: last.offset}[size]
    cut(path, size)
    with pytest.raises(ValueError, match=r"set-train-0001\.tar: expected a whole tar file .*; it ends within a record"):
        open_sources("image-folder", tmp_path / "shards")


def test_records_that_lack_a_half_are_named(folders, tmp_path):
    for source in folders:
        write_tars(source, tmp_path / "shards")
    path = tmp_path / "shards" / "set-val-0000.tar"
    for name, content, message in (
        ("some/9.png", b"", "some/9: expected a picture and its .cls or .json; got a picture, no label"),
        ("some/9.cls", b"1", "some/9: expected a picture and its .cls or .json; got a label, no picture"),
        ("some/9.cls", b"cat", "expected the same classes"),
    ):
        with tarfile.open(path, "w") as tar:
            add(tar, name, content)
        with pytest.raises(ValueError, match=message):
            open_sources("image-folder", tmp_path / "shards")


def test_shards_of_one_side_and_classes_of_one_side_are_named(folders, tmp_path):
    write_tars(folders[0], tmp_path / "shards")
    with pytest.raises(FileNotFoundError, match=r"root: expected shards \*train\*\.tar and .* got those of train only"):
        open_sources("image-folder", tmp_path / "shards")
    folders[1].labels[:] = 0
    write_tars(folders[1], tmp_path / "shards")
    with pytest.raises(ValueError, match=r"the same classes in all of .*; 1 not in .*set-val-0000\.tar"):
        open_sources("image-folder", tmp_path / "shards")


def test_a_damaged_picture_in_a_shard_is_named(folders, tmp_path):
    for source in folders:
        write_tars(source, tmp_path / "shards")
    path = tmp_path / "shards" / "set-train-0000.tar"
    with tarfile.open(path) as tar:
        member = next(each for each in tar if each.name == "some/000002.png")
    content = bytearray(path.read_bytes())
    content[member.offset_data : member.offset_data + 8] = bytes(8)
    path.write_bytes(content)
    source = open_sources("image-folder", tmp_path / "shards", image_size=8)[0]
    source.read([1, 3])
    with pytest.raises(ValueError, match=r"set-train-0000\.tar: some/000002: expected a whole picture"):
        source.read([2])
    damaged = {}
    assert source.read([3, 2], damaged)[1].max() == 0
    assert list(damaged) == [1]


def test_wrong_arrow_files_are_named(folders, tmp_path):
    pyarrow = peer("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "shards" / "train-00000-of-00002.parquet"
    for source in folders:
        write_arrow(source, tmp_path / "shards", "parquet")
    whole = path.read_bytes()
    table = parquet.read_table(path)
    for wrong, message in (
        (table.drop_columns("label"), r"columns of pictures \(image, .*\) and labels .*, got image"),
        (table.set_column(1, "label", pyarrow.array([0, -1, 1, 1, 0])), "label: expected classes from 0 on, got -1"),
        (table.set_column(1, "label", pyarrow.array(list("abcde"))), "label: expected classes from 0 on, got object"),
        (None, "a whole parquet or arrow file of the Hugging Face hub; it is truncated or foreign"),
    ):
        if wrong is None:
            path.write_bytes(whole[:100])
        else:
            parquet.write_table(wrong, path)
        with pytest.raises(ValueError, match=rf"train-00000-of-00002\.parquet: .*{message}"):
            open_sources("image-folder", tmp_path / "shards")
    parquet.write_table(table.set_column(0, "image", pyarrow.array([{"path": "a"}] * 5)), path)
    with pytest.raises(ValueError, match="picture 1 of group 0: expected the bytes of a picture, got NoneType"):
        open_sources("image-folder", tmp_path / "shards", image_size=8)[0].read([1])
