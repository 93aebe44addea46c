"""A label store returns what was written, refuses what is damaged, and survives a write interrupted at any point."""

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pydistill import _atomic
from pydistill.augment import MultiCrop, multi_crop
from pydistill.labels import CROP_BYTES, SoftLabelStore

N, C, EPOCHS, BATCH, RECORD = 25, 12, 3, 8, 5
T = 4.0
OPTIONS = {
    **{"num_images": N, "num_classes": C, "epochs": EPOCHS, "batch_size": BATCH, "record_bytes": RECORD},
    **{"T": T, "format": "topk8", "k": 3},
}
BLOCK = 64 + 192  # bytes: images, and rows of 4 + 9 + 5 bytes, to the next multiple of 64
ENTRY = 24


def create(path, **options):
    return SoftLabelStore.create(path, **{**OPTIONS, **options})


def batches(epoch, images=None):
    ids = np.arange(N) if images is None else np.asarray(images)
    order = np.random.default_rng(epoch).permutation(ids)
    return np.split(order, range(BATCH, len(order), BATCH))


def logits(epoch, ids=None):
    values = torch.randn(N, C, generator=torch.Generator().manual_seed(epoch)) * 3
    return values if ids is None else values[torch.as_tensor(np.asarray(ids))]


def records(epoch, ids):
    return np.stack([np.frombuffer(struct.pack("<BI", epoch, 1000 + i), np.uint8) for i in ids])


def fill(store, epochs=range(EPOCHS), images=None):
    for epoch in epochs:
        for block, ids in enumerate(batches(epoch, images)):
            if not store.holds(epoch, block):
                labels = logits(epoch, ids)
                store.write(epoch, ids, labels.softmax(1) if store.target == "probs" else labels, records(epoch, ids))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.store"


@pytest.fixture
def filled(path):
    with create(path) as store:
        fill(store)
    return path


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL = (*DTYPES, "logits8", "topk", "topk8")  # that take logits
BOTH = [
    (format, target) for format in ALL for target in ("logits", "probs") if (format, target) != ("logits8", "probs")
]


@pytest.mark.parametrize(("format", "target"), BOTH)
def test_labels_come_back(path, format, target):
    with create(path, format=format, target=target, metadata={"teacher": "resnet18"}) as store:
        fill(store)
    ids = [7, 0, 24, 7]  # in any order, and twice
    with SoftLabelStore.open(path) as store:
        assert (store.completed, store.k, store.target) == (EPOCHS, 3 if "topk" in format else 0, target)
        assert (store.num_images, store.num_classes, store.epochs, len(store)) == (N, C, EPOCHS, N)
        assert (store.T, store.batch_size, store.blocks) == (T, BATCH, 4)
        assert store.metadata == {"teacher": "resnet18"}
        assert store.format in repr(store)
        store.verify()
        store.check_complete()
        for epoch in (2, 0, 1):
            labels = store.read(epoch, ids)
            assert (len(labels), labels.epoch, labels.images.tolist()) == (4, epoch, ids)
            assert np.array_equal(labels.records.numpy(), records(epoch, ids))
            truth = logits(epoch, ids)
            probs = (truth / T if target == "logits" else truth).softmax(1)
            if "topk" not in format:
                if format in DTYPES:
                    kind = DTYPES[format]
                    assert torch.equal(labels.dense, (truth if target == "logits" else truth.softmax(1)).to(kind))
                torch.testing.assert_close(labels.densify(), probs, rtol=2e-2, atol=1e-6)
            else:
                values, indices = probs.topk(3)
                assert torch.equal(labels.indices, indices)
                torch.testing.assert_close(labels.values, values, rtol=7e-2 if format == "topk8" else 1.1e-3, atol=0)
                torch.testing.assert_close(labels.tail, 1 - values.sum(1), rtol=1e-4, atol=1e-6)


def test_create_defaults_to_a_format_that_keeps_all_classes(path):
    with SoftLabelStore.create(path, num_images=4, num_classes=1000, epochs=1, batch_size=4) as store:
        assert (store.format, store.k, store.layout.label_bytes, store.layout.row_bytes) == ("fp16", 0, 2000, 2000)


@pytest.mark.parametrize("format", ALL)
def test_the_loss_is_that_of_the_densified_labels(path, format):
    with create(path, format=format) as store:
        fill(store)
    student = torch.randn(6, C, requires_grad=True)
    with SoftLabelStore(path) as store:
        labels = store.read(1, range(6))
        for T2 in (False, True):
            found = labels.loss(student, scale_T2=T2)
            truth = F.kl_div((student / T).log_softmax(1), labels.densify(), reduction="batchmean") * (
                T**2 if T2 else 1
            )
            assert abs(found - truth) < 1e-6
            d_found, d_truth = (torch.autograd.grad(each, student)[0] for each in (found, truth))
            torch.testing.assert_close(d_found, d_truth, rtol=1e-5, atol=1e-7)
        rows = labels.loss(student, reduction="none")
        torch.testing.assert_close(rows.mean(), labels.loss(student))
        torch.testing.assert_close(labels[2:5].loss(student[2:5], reduction="none"), rows[2:5])
        with pytest.raises(ValueError, match=r"logits: expected \[6, 12\] as the labels, got \[6, 10\]"):
            labels.loss(student[:, :10])
        if "topk" not in format:  # logits serve any temperature
            truth = F.kl_div(student.log_softmax(1), labels.dense.float().softmax(1), reduction="batchmean")
            torch.testing.assert_close(labels.loss(student, T=1.0), truth)
            with pytest.raises(ValueError, match="indices, values, tail: expected top-k labels"):
                _ = labels.tail
        else:
            with pytest.raises(
                ValueError, match="T: expected 4, at which these labels' probabilities were taken, got 1"
            ):
                labels.loss(student, T=1.0)
            with pytest.raises(ValueError, match="dense: expected labels of all classes"):
                _ = labels.dense


@pytest.mark.parametrize("mix", [None, "cutmix", "mosaic"])
def test_records_of_crops_come_back_to_the_bit(path, mix):
    """The same views, through whatever order the labels are read in."""
    images = torch.rand(BATCH, 3, 20, 20)
    record = MultiCrop(10, mix=mix).draw(images.shape, torch.Generator().manual_seed(0))
    with create(path, num_images=BATCH, record_bytes=CROP_BYTES * record.shape[1]) as store:
        store.write(0, torch.arange(BATCH), logits(0, range(BATCH)), record)
        assert torch.equal(store.read(0, range(BATCH)).crops(), record)
        order = [3, 0, 7]
        views = multi_crop(images, store.read(0, order).crops(), 10)
        assert torch.equal(views, multi_crop(images, record, 10)[order])
    with create(path.with_name("short")) as store:
        fill(store, [0])
        with pytest.raises(ValueError, match="records: expected 29 bytes a part as multi_crop's have, got 5"):
            store.read(0, [0]).crops()


def test_all_classes_kept_is_the_whole_distribution(path):
    with create(path, format="topk", k=C) as store:
        fill(store)
        labels = store.read(0, range(N))
    assert not labels.tail.any()
    torch.testing.assert_close(labels.densify(), (logits(0) / T).softmax(1), rtol=1e-3, atol=1e-6)


def test_reading_decodes_only_what_is_asked_for(filled):
    """All but one block of one epoch damaged: its labels still come."""
    order = batches(1)
    with SoftLabelStore(filled) as store:
        places = [(e, b) for e in range(EPOCHS) for b in range(4) if (e, b) != (1, 2)]
        with filled.open("r+b") as file:
            for epoch, block in places:
                file.seek(row_at(store, epoch, block))
                file.write(b"\x99\x77")
        assert np.array_equal(store.read(1, order[2]).records.numpy(), records(1, order[2]))
        for epoch, block in places:
            with pytest.raises(ValueError, match=f"the rows of block {block} of epoch {epoch} are damaged"):
                store.read(epoch, batches(epoch)[block][:1])


def row_at(store, epoch, block):
    return store._blocks_at + (epoch * store.blocks + block) * store._block_bytes + store._ids_bytes


def flip(path, at):
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize("what", ["rows", "images"])
def test_a_damaged_block_is_named_and_the_others_stay(filled, what):
    with SoftLabelStore(filled) as store:
        start = row_at(store, 1, 0)
        flip(filled, start + BATCH * store.layout.row_bytes - 1 if what == "rows" else start - store._ids_bytes)
    ids = batches(1)[0]
    with SoftLabelStore(filled) as store:
        for read in (lambda: store.read(1, ids[-1:]), store.verify):
            message = rf"the {what} of block 0 of epoch 1 are damaged: expected crc32 \d+, got \d+"
            with pytest.raises(ValueError, match=message):
                read()
        assert np.array_equal(store.read(2, ids).records.numpy(), records(2, ids))


@pytest.mark.parametrize("field", range(6))
def test_a_damaged_entry_makes_its_block_missing_and_it_can_be_written_again(filled, field):
    whole = filled.read_bytes()
    with SoftLabelStore(filled) as store:
        flip(filled, store._table_at + ENTRY * (1 * store.blocks + 2) + 4 * field)
    ids = batches(1)[2]
    with SoftLabelStore(filled, writable=True) as store:
        assert (store.completed, store.holds(1, 2), store.missing(1).tolist()) == (1, False, sorted(ids))
        first = next(i for i in range(N) if i in ids)
        message = (
            rf"epoch 1 lacks the labels of 8 of the 25 images asked for, the first of them image {first}; it has 3 of"
        )
        with pytest.raises(ValueError, match=message):
            store.read(1, range(N))
        with pytest.raises(ValueError, match=r"all of 3 epochs, 1 lack labels \(1\): epoch 1 has those of 17 of 25"):
            store.check_complete()
        store.check_complete(1)
        fill(store)
    assert filled.read_bytes() == whole


def test_missing_epochs_and_places_are_named(path):
    with create(path) as store:
        fill(store, [0])
        assert (store.completed, store.missing(0).size, store.missing(2).tolist()) == (1, 0, list(range(N)))
        message = r"expected all of 3 epochs, 2 lack labels \(1, 2\): epoch 1 has those of 0 of 25 images"
        with pytest.raises(ValueError, match=message):
            store.check_complete()
        with pytest.raises(ValueError, match="expected 4 epochs of labels, it is made for 3"):
            store.check_complete(4)
        with pytest.raises(ValueError, match="epoch 1 lacks the labels of 2 of the 2 images asked for"):
            store.read(1, [3, 4])
        for epoch in (-1, 3):
            with pytest.raises(IndexError, match=rf"labels\.store: epoch: expected one of 0\.\.2, got {epoch}"):
                store.read(epoch, [0])
        for image in (-1, N):
            with pytest.raises(IndexError, match=rf"images: expected some of 0\.\.24, got {image}"):
                store.read(0, [3, image])
        with pytest.raises(ValueError, match=r"images: expected integers \[n\], got float64 \[1\]"):
            store.read(0, [0.5])
        with pytest.raises(IndexError, match=r"block: expected one of 0\.\.3, got 4"):
            store.holds(0, 4)
        assert len(store.read(0, [])) == 0
    with pytest.raises(ValueError, match="the store is closed"):
        store.read(0, [0])


def test_a_file_that_is_cut_under_its_reader_is_named(filled):
    """And the process survives; what is still there can be read."""
    size = filled.stat().st_size
    with SoftLabelStore(filled) as seen, SoftLabelStore(filled) as new:
        seen.read(2, range(N))
        new.missing(2)
        os.truncate(filled, row_at(new, 2, 0))
        for store in (seen, new):
            for _ in range(2):
                with pytest.raises(
                    ValueError, match=rf"labels\.store: expected {size} bytes as it had, it was cut to \d+"
                ):
                    store.read(2, [int(batches(2)[0][0])])
            assert np.array_equal(store.read(1, range(N)).records.numpy(), records(1, range(N)))
        with pytest.raises(ValueError, match="it was cut to"):
            new.verify()


def test_shuffled_rows_are_those_of_whole_blocks(filled):
    """Before blocks are verified and after, some of a block and all of it; and they outlive the store."""
    kept = []
    with SoftLabelStore(filled) as whole, SoftLabelStore(filled) as store:
        for epoch in range(EPOCHS):
            rows = whole.rows(epoch, range(N))
            order = np.random.default_rng(epoch).permutation(N)
            for some in (order[:3], order, order):
                kept.append((store.rows(epoch, some), rows[some]))
    for found, wanted in kept:
        assert np.array_equal(found, wanted)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="where Linux says what is mapped")
def test_a_closed_store_holds_no_map(filled):
    """Not even while an error from it is propagating, with its frames alive; labels read before stay."""

    def is_mapped():
        return str(filled) in Path("/proc/self/maps").read_text()

    def read_both():
        with SoftLabelStore(filled) as store:
            flip(filled, row_at(store, 1, 2))
            kept.append(store.read(0, range(N)))
            assert is_mapped()
            store.read(1, range(N))

    kept = []
    with pytest.raises(ValueError, match="rows of block 2 of epoch 1 are damaged") as failed:
        read_both()
    assert failed.tb is not None
    assert not is_mapped()
    assert np.array_equal(kept[0].records.numpy(), records(0, range(N)))


def test_batches_are_those_that_were_written(filled):
    with SoftLabelStore(filled) as store:
        for epoch in range(EPOCHS):
            assert store.batches(epoch) == [ids.tolist() for ids in batches(epoch)]


def test_what_is_no_store_is_refused(filled, tmp_path):
    whole, path = filled.read_bytes(), tmp_path / "other.store"
    length = struct.unpack_from("<I", whole, 12)[0]

    def with_header(**changes):
        text = json.dumps(json.loads(whole[20 : 20 + length]) | changes).encode()
        return struct.pack("<8sIII", b"PYDLABEL", 2, len(text), zlib.crc32(text)) + text

    for content, message in (
        (b"", r"expected a label store, which starts with .*; got 0 bytes that start with nothing"),
        (b"PK\x03\x04" + bytes(99), "got 103 bytes that start with 50 4b 03 04"),
        (whole[:8] + struct.pack("<I", 3) + whole[12:], "of version 1 or 2, got 3, which a newer pydistill reads"),
        (whole[:8] + struct.pack("<I", 0) + whole[12:], "of version 1 or 2, got 0"),
        (with_header(flags=["row_step", "zstd"]), "has 'zstd', which a newer pydistill reads"),
        (whole[:30], r"expected a header of \d+ bytes, it is truncated to 10"),
        (whole[:25] + b"\0" + whole[26:], "its header is damaged: expected crc32"),
        (whole[:-1], r"expected \d+ bytes as its header says, it is truncated: \d+"),
        (whole + b"\0", "it is longer than it says"),
        (with_header(format="int4"), "its header has no right format, got 'int4'"),
        (with_header(num_classes=0), "its header has no right num_classes, got 0"),
    ):
        path.write_bytes(content)
        for writable in (False, True):
            with pytest.raises(ValueError, match=message):
                SoftLabelStore(path, writable=writable)
        assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError, match="absent: expected a label store, found no file"):
        SoftLabelStore(tmp_path / "absent")


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


class KilledError(Exception):
    pass


class Disk:
    """Passes a number of bytes of the writes, in order, to the file, and is then interrupted."""

    def __init__(self, monkeypatch, left):
        self.left, self.log = left, []
        write, sync = SoftLabelStore._write, SoftLabelStore._sync

        def limited(store, at, data):
            self.log.append((at, len(data)))
            write(store, at, data[: self.left])
            sync(store)
            if len(data) > self.left:
                raise KilledError
            self.left -= len(data)

        def logged(store):
            self.log.append("sync")
            sync(store)

        monkeypatch.setattr(SoftLabelStore, "_write", limited)
        monkeypatch.setattr(SoftLabelStore, "_sync", logged)


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
            Disk(patch, left)
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
            Disk(patch, 200)
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
        disk = Disk(monkeypatch, 1 << 30)
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


def test_the_reader_imports_no_torch(filled):
    """With stand-ins for the packages around it, whose own modules do."""
    code = f"""
import sys, types, pathlib, importlib.util
spec = importlib.util.find_spec("pydistill")
sys.modules.pop("torch", None)
for name in ("pydistill", "pydistill.labels"):
    module = sys.modules[name] = types.ModuleType(name)
    parts = name.split(".")[1:]
    module.__path__ = [str(pathlib.Path(place, *parts)) for place in {[str(p) for p in package_paths()]!r}]
from pydistill.labels._reader import LabelReader
reader = LabelReader({str(filled)!r})
assert reader.rows(1, [3, 4]).shape == (2, reader.layout.row_bytes)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def package_paths():
    import pathlib

    import pydistill
    from pydistill import _host

    return [*map(pathlib.Path, pydistill.__path__), pathlib.Path(_host.__file__).parent]
