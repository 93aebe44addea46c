"""A label store returns what was written, and names what is damaged, cut off or missing."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pydistill.augment import MultiCrop
from pydistill.labels import CROP_BYTES, SoftLabelStore
from pydistill.ops import multi_crop
from tests.labels.stores import BATCH, ENTRY, EPOCHS, C, N, T, batches, create, fill, flip, logits, records, row_at

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
