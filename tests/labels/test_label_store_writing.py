"""Writes of a label store are refused or whole, wherever they are interrupted; shards are merged."""

import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch

from pydistill import _atomic
from pydistill.labels import SoftLabelStore
from tests.interrupted import Disk, KilledError
from tests.labels.stores import BATCH, ENTRY, EPOCHS, C, N, batches, create, fill, flip, logits, records, row_at

BLOCK = 64 + 192  # bytes: images, and rows of 4 + 9 + 5 bytes, to the next multiple of 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images: expected at least 1, got 0"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"record_bytes": -1}, "record_bytes: expected at least 0, got -1"),
        ({"format": "fp8"}, "format: expected one of fp32, fp16, bf16, logits8, features8, topk, topk8, got 'fp8'"),
        ({"target": "hard"}, "target: expected 'logits' or 'probs', got 'hard'"),
        ({"T": 0.0}, "T: expected a positive number, got 0"),
        ({"sources": "place"}, "sources: expected 'batch' or 'images', got 'place'"),
        ({"format": "logits8", "target": "probs"}, "target: expected 'logits' for 'logits8', got 'probs'"),
        (
            {"format": "features8"},
            "classifier: expected the weight and bias of the last layer for 'features8', got None",
        ),
        ({"classifier": (torch.zeros(C, 2), None)}, "classifier: expected None for 'topk8', got"),
        (
            {"format": "features8", "classifier": (torch.zeros(2, C), None)},
            r"classifier: expected a weight of \[12, D\], got \[2, 12\]",
        ),
        (
            {"format": "features8", "classifier": (torch.zeros(C, 2), torch.zeros(2))},
            r"classifier: expected a bias of \[12\], got \[2\]",
        ),
        (
            {"format": "features8", "classifier": (torch.full((C, 2), float("nan")), None)},
            "classifier: expected finite numbers, got others",
        ),
        ({"k": 0}, "k: expected 1 to the 12 classes, got 0"),
        ({"k": C + 1}, "k: expected 1 to the 12 classes, got 13"),
        ({"num_classes": 65537}, "num_classes: expected up to 65536 for 'topk8', got 65537"),
        ({"images": [1, 1]}, "images: expected different integers, one or more, got"),
        ({"images": [0, N]}, r"images: expected some of 0\.\.24, got 0 to 25"),
    ],
)
def test_wrong_options_leave_no_file(path, options, message):
    with pytest.raises(ValueError, match=message):
        create(path, **options)
    assert not list(path.parent.iterdir())


def test_wrong_writes_are_refused_and_write_nothing(path):
    ids = np.arange(BATCH)
    labels, record = logits(0, ids), records(0, ids)
    bad = labels.clone()
    bad[3, 2] = float("nan")
    with create(path) as store, create(path.with_name("probs"), target="probs") as probs:
        store.write(0, ids, labels, record)
        before = path.read_bytes()
        for arguments, error, message in (
            ((0, ids, labels, record), ValueError, "image 0 has its label of epoch 0 already"),
            ((3, ids, labels, record), IndexError, r"epoch: expected one of 0\.\.2, got 3"),
            (
                (1, ids[:5], labels[:5], record[:5]),
                ValueError,
                "images: expected 8, for 25 lack labels at epoch 1 .* got 5",
            ),
            ((1, ids // 2, labels, record), ValueError, "images: expected different ones, got one twice"),
            ((1, ids + N, labels, record), IndexError, "images: expected some of the store's 25, got 25"),
            ((1, ids + 0.5, labels, record), ValueError, "images: expected integers"),
            (
                (1, ids, labels[:, :10], record),
                ValueError,
                r"labels: expected \[8, 12\] of the store's classes, got \[8, 10\]",
            ),
            ((1, ids, bad, record), ValueError, "labels: row 3: expected finite numbers"),
            ((1, ids, labels, record[:, :4]), ValueError, r"records: expected uint8 \[8, 5\], got uint8 \[8, 4\]"),
            ((1, ids, labels, record.astype(int)), ValueError, r"records: expected uint8 .* got int64 \[8, 5\]"),
            ((1, ids, labels), ValueError, r"records: expected uint8 \[8, 5\], got uint8 \[8, 0\]"),
        ):
            with pytest.raises(error, match=message):
                store.write(*arguments)
        assert path.read_bytes() == before
        with pytest.raises(ValueError, match="labels: row 0: expected probabilities, got a negative number"):
            probs.write(0, ids, labels, record)
    with SoftLabelStore(path) as store, pytest.raises(ValueError, match="the store is open for reading only"):
        store.write(1, ids, labels, record)


@pytest.mark.parametrize(
    ("format", "target", "value", "message"),
    [
        ("fp16", "logits", 70000.0, "labels: row 1: expected finite numbers that fp16 can hold"),
        ("bf16", "logits", float("inf"), "labels: row 1: expected finite numbers that bf16 can hold"),
        ("fp16", "probs", 0.5, "labels: row 1: expected probabilities that add up to one"),
        ("fp32", "logits", float("nan"), "labels: row 1: expected finite numbers that fp32 can hold"),
        ("logits8", "logits", -1e5, "labels: row 1: expected finite numbers that logits8 can hold"),
        ("bf16", "probs", -0.1, "labels: row 1: expected probabilities that add up to one"),
    ],
)
def test_dense_labels_that_cannot_be_kept_are_refused(path, format, target, value, message):
    labels = torch.full((BATCH, C), 1 / C)
    labels[1, 0] = value
    with create(path, format=format, target=target) as store, pytest.raises(ValueError, match=message):
        store.write(0, np.arange(BATCH), labels, records(0, range(BATCH)))


def test_nothing_is_overwritten_unasked(filled, monkeypatch):
    whole = filled.read_bytes()
    with pytest.raises(FileExistsError, match="it exists already, and is replaced with overwrite=True only"):
        create(filled)
    with monkeypatch.context() as patch:
        patch.setattr(_atomic, "put_in_place", lambda *paths: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            create(filled, overwrite=True)
    assert filled.read_bytes() == whole
    assert list(filled.parent.iterdir()) == [filled]
    with create(filled, overwrite=True) as store:
        assert store.completed == 0


def test_one_writer_at_a_time_and_any_readers(filled):
    with SoftLabelStore(filled, writable=True) as writer, SoftLabelStore(filled) as reader:
        assert reader.completed == EPOCHS
        with pytest.raises(ValueError, match="expected a store that nobody writes to, another process does"):
            SoftLabelStore(filled, writable=True)
        with pytest.raises(ValueError, match="open for writing stays in its process"):
            pickle.dumps(writer)
        with pickle.loads(pickle.dumps(reader)) as other:
            assert torch.equal(other.read(1, [3]).rows, reader.read(1, [3]).rows)


@pytest.mark.parametrize("left", [0, 1, 31, 64, 65, 150, BLOCK, *range(BLOCK + 1, BLOCK + ENTRY, 4), BLOCK + ENTRY])
@pytest.mark.parametrize("block", [1, 3])
def test_a_write_cut_off_anywhere_is_wholly_there_or_not_at_all(path, filled, monkeypatch, left, block):
    whole, order = filled.read_bytes(), batches(1)
    filled.unlink()
    with create(path) as store:
        assert store._block_bytes == BLOCK
        fill(store, [0])
        for ids in order[:block]:
            store.write(1, ids, logits(1, ids), records(1, ids))
        ids = order[block]
        with monkeypatch.context() as patch:
            Disk(patch, SoftLabelStore, left)
            try:
                store.write(1, ids, logits(1, ids), records(1, ids))
                assert left == BLOCK + ENTRY
            except KilledError:
                assert left < BLOCK + ENTRY
    with SoftLabelStore(path, writable=True) as store:
        assert [store.holds(1, b) for b in range(4)] == [*[True] * block, left == BLOCK + ENTRY, *[False] * (3 - block)]
        store.verify()
        if left < BLOCK + ENTRY:
            with pytest.raises(ValueError, match="epoch 1 lacks the labels of 1 of the 1"):
                store.read(1, ids[:1])
        fill(store)
    assert path.read_bytes() == whole


def test_what_a_longer_write_left_behind_is_no_part_of_a_shorter_one(path, monkeypatch):
    """A batch cut off before its entry, then a run in another order, whose last block is at that place."""
    with create(path, num_images=10) as store:
        with monkeypatch.context() as patch:
            Disk(patch, SoftLabelStore, 200)
            ids = np.arange(8)
            with pytest.raises(KilledError):
                store.write(0, ids, logits(0, ids), records(0, ids))
        for ids in (np.arange(2, 10), np.arange(2)):
            store.write(0, ids, logits(0, ids), records(0, ids))
    with create(path.with_name("other"), num_images=10) as store:
        for ids in (np.arange(2, 10), np.arange(2)):
            store.write(0, ids, logits(0, ids), records(0, ids))
    assert path.read_bytes() == path.with_name("other").read_bytes()


def test_the_entry_is_written_once_its_block_is_on_the_disk(path, monkeypatch):
    ids = np.arange(BATCH)
    with create(path) as store:
        disk = Disk(monkeypatch, SoftLabelStore, 1 << 30)
        store.write(0, ids, logits(0, ids), records(0, ids))
        assert disk.log == [(store._blocks_at, BLOCK), "sync", (store._table_at, ENTRY), "sync"]


def relabel(path):
    """A separate process that makes the store or continues it."""
    if process := os.fork():
        return process
    status = 1
    try:
        torch.set_num_threads(1)  # a fork has none of its parent's threads, which torch would wait for
        with SoftLabelStore(path, writable=True) if path.exists() else create(path) as store:
            fill(store)
        status = 0
    finally:
        os._exit(status)


def test_a_relabelling_killed_at_random_moments_ends_in_the_same_file(filled, path, tmp_path):
    """SIGKILL, again and again, until a run finishes; each start continues where the last one stopped."""
    whole = filled.read_bytes()
    start = time.perf_counter()
    os.waitpid(relabel(tmp_path / "timed"), 0)
    seconds = time.perf_counter() - start
    filled.unlink()
    random = np.random.default_rng(0)
    for _ in range(5):  # if the machine was busy when the time was measured, a run may finish before it is killed
        path.unlink(missing_ok=True)
        killed, held = 0, []
        while not held or held[-1] < EPOCHS * 4:
            process = relabel(path)
            time.sleep(float(random.uniform(0, seconds / 3)))
            os.kill(process, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            assert status in (0, -signal.SIGKILL)
            killed += status != 0
            if path.exists():
                with SoftLabelStore(path) as store:
                    store.verify()
                    held.append(sum(store.holds(epoch, block) for epoch in range(EPOCHS) for block in range(4)))
        assert held == sorted(held)  # what was once there stays
        assert path.read_bytes() == whole
        if killed >= 2:
            break
        seconds /= 4
    assert killed >= 2


def test_shards_are_merged(path, tmp_path):
    """Three ranks, by interleaved and consecutive images, in any order of paths."""
    shards = [range(0, 12, 2), range(1, 12, 2), range(12, N)]
    paths = [tmp_path / f"rank{rank}" for rank in range(3)]
    for images, each in zip(shards, paths, strict=True):
        with create(each, images=images) as store:
            fill(store, images=images)
            assert store.images.tolist() == list(images)
            with pytest.raises(IndexError, match="images: expected some of the store's"):
                store.write(0, [(images[0] + 13) % N], logits(0, [0]), records(0, [0]))
    with SoftLabelStore.merge(paths, path) as merged:
        merged.verify()
        merged.check_complete()
        assert (len(merged), merged.blocks, merged.header["images"]) == (N, 4, [[0, N]])
        for images, each in zip(shards, paths, strict=True):
            with SoftLabelStore(each) as store:
                for epoch in range(EPOCHS):
                    assert torch.equal(merged.read(epoch, images).rows, store.read(epoch, images).rows)
    other = tmp_path / "other"
    SoftLabelStore.merge(paths[::-1], other).close()
    assert other.read_bytes() == path.read_bytes()


def test_shards_by_epochs_are_merged_into_the_file_of_one_process(filled, tmp_path):
    paths = [tmp_path / f"rank{rank}" for rank in range(2)]
    for rank, each in enumerate(paths):
        with create(each) as store:
            fill(store, range(rank, EPOCHS, 2))
    SoftLabelStore.merge(paths[::-1], tmp_path / "merged").close()
    assert (tmp_path / "merged").read_bytes() == filled.read_bytes()


def test_shards_that_do_not_fit_are_named(path, tmp_path):
    def shard(name, images, epochs=EPOCHS, **options):
        with create(tmp_path / name, images=images, **options) as store:
            fill(store, range(epochs), images)
        return tmp_path / name

    first = shard("first", range(10))
    for other, message in (
        (shard("twice", range(9, N)), "expected shards without common labels, image 9 has two at epoch 0"),
        (
            shard("short", range(10, N), 2),
            "epoch 2 lacks those of 15 of 25 images, the first of them image 10",
        ),
        (shard("other_k", range(10, N), k=4), r"other_k: k: expected 3 as .*first has, got 4"),
        (
            shard("other_T", range(10, N), T=1.0),
            r"other_T: temperature: expected 4\.0 as .*first has, got 1\.0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            SoftLabelStore.merge([first, other], path)
    damaged = shard("damaged", range(10, N))
    with SoftLabelStore(damaged) as store:
        at = row_at(store, 2, 1)
    flip(damaged, at)
    with pytest.raises(ValueError, match="damaged: the rows of block 1 of epoch 2 are damaged"):
        SoftLabelStore.merge([first, damaged], path)
    with pytest.raises(ValueError, match="paths: expected a shard or more, got none"):
        SoftLabelStore.merge([], path)
    with pytest.raises(FileNotFoundError, match="absent: expected a label store"):
        SoftLabelStore.merge([first, tmp_path / "absent"], path)
    with pytest.raises(FileExistsError, match="it exists already"):
        SoftLabelStore.merge([first], damaged)
    assert not path.exists()
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_an_odd_number_of_features(tmp_path):
    weight, features = torch.randn(12, 5), torch.randn(6, 5)
    sizes = {"num_images": 6, "num_classes": 12, "epochs": 1, "format": "features8", "classifier": (weight, None)}
    with SoftLabelStore.create(tmp_path / "labels.store", **sizes) as store:
        store.write(0, range(6), features)
    with SoftLabelStore(tmp_path / "labels.store") as store:
        found = store.read(0, range(6)).densify(1.0)
    torch.testing.assert_close(found, (features @ weight.T).softmax(1), rtol=0, atol=0.02)
