"""Files written by each version and in each format, which must stay readable: tests/labels/files.

``python -m tests.labels.test_files FOLDER`` writes those of the current version. Existing ones are never rewritten.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pydistill.augment import MultiCrop
from pydistill.labels import SoftLabelStore

FILES = Path(__file__).parent / "files"
N, C, EPOCHS, T, K = 5, 6, 2, 4.0, 3
BATCHES = ([4, 1, 2], [0, 3])
OLD, NEW = ("fp16", "bf16", "topk", "topk8"), ("fp32", "fp16", "bf16", "logits8", "features8", "topk", "topk8")


def logits(epoch):
    i, c = torch.arange(N)[:, None], torch.arange(C)
    return ((7 * i + 3 * c + 5 * epoch) % 11 - 5 + c / 8).float()


def features(epoch):
    i, d = torch.arange(N)[:, None], torch.arange(4)
    return ((3 * i + 5 * d + 2 * epoch) % 7 / 2).float()


WEIGHT, BIAS = ((torch.arange(C)[:, None] * 5 + torch.arange(4) * 3) % 13 - 6) / 4, torch.arange(C) / 8


def record(epoch, n):
    return MultiCrop(16, mix="cutmix").draw((n, 3, 32, 32), torch.Generator().manual_seed(epoch))


def make(folder: Path) -> None:
    for format in NEW:
        options = {"classifier": (WEIGHT, BIAS)} if format == "features8" else {}
        with SoftLabelStore.create(
            folder / f"v2-{format}.store",
            **{"num_images": N, "num_classes": C, "epochs": EPOCHS, "format": format, "k": K, "T": T},
            **{"target": "probs" if format == "bf16" else "logits", "record_bytes": 58 if format == "fp16" else 2},
            **{"batch_size": 3, "metadata": {"teacher": "made up"}, **options},
        ) as store:
            for epoch in range(EPOCHS):
                for ids in BATCHES:
                    labels = (features(epoch) if format == "features8" else logits(epoch))[ids]
                    records = np.array([[epoch, i] for i in ids], np.uint8)
                    store.write(
                        epoch,
                        ids,
                        (labels / T).softmax(1) if store.target == "probs" else labels,
                        record(epoch, len(ids)) if format == "fp16" else records,
                    )


@pytest.mark.parametrize(("version", "format"), [(1, format) for format in OLD] + [(2, format) for format in NEW])
def test_files_of_every_version_and_format_read(version, format):
    with SoftLabelStore(FILES / f"v{version}-{format}.store") as store:
        store.verify()
        store.check_complete()
        assert (store.version, store.format, store.T, store.num_images) == (version, format, T, N)
        assert (store.metadata, store.layout.sources, store.batch_size) == ({"teacher": "made up"}, "batch", 3)
        assert store.target == ("probs" if format == "bf16" else "logits")
        for epoch in range(EPOCHS):
            assert store.batches(epoch) == [list(ids) for ids in BATCHES]
            labels = store.read(epoch, range(N))
            given = features(epoch) @ WEIGHT.T + BIAS if format == "features8" else logits(epoch)
            probs = (given / T).softmax(1)
            if format in ("fp32", "fp16"):
                assert torch.equal(labels.dense.float(), given)  # which float16 can hold
            elif format == "bf16":
                assert torch.equal(labels.dense, probs.bfloat16())
            elif format in ("logits8", "features8"):
                torch.testing.assert_close(labels.dense, given, rtol=0, atol=0.03)
            else:
                values, indices = probs.topk(K)
                assert torch.equal(labels.indices, indices)
                bound = {"topk": 1e-3, "topk8": 0.04 if version == 1 else 0.01}[format]
                torch.testing.assert_close(labels.values, values, rtol=bound, atol=0)
                torch.testing.assert_close(labels.tail, 1 - values.sum(1), rtol=1e-5, atol=1e-6)
            if format == "fp16":
                for ids in BATCHES:
                    assert torch.equal(store.read(epoch, ids).crops(), record(epoch, len(ids)))
            else:
                assert labels.records.tolist() == [[epoch, i] for i in range(N)]
        if version == 1:
            assert store.gradient_error is None
        else:
            bounds = {"fp32": 0.0, "fp16": 0.0, "bf16": 0.01, "logits8": 0.03, "features8": 0.03}
            assert store.gradient_error.fresh <= bounds.get(format, 1.0)
            assert (store.gradient_error.near == 0) == (format in ("fp32", "fp16"))


def line(row, m):
    """Numbers on one line: offset and step in float16, then the codes."""
    offset, step = row[:4].view("<f2").astype(float)
    return offset + step * row[4 : 4 + m]


def topk8(row, finer):
    """Their probabilities: the mass of the others, classes, and logarithms in steps of a sixteenth or a part of it."""
    codes = row[4 + 2 * K : 4 + 3 * K].astype(float)
    step = 2 ** (-codes[0] / 16) / 16 if finer else 1 / 16
    weights = np.exp(-step * (codes - [codes[0] if finer else 0, 0, 0]))
    return (1 - row[:4].view("<f4").astype(float)) * weights / weights.sum()


@pytest.mark.parametrize("name", ["v1-topk8", "v2-topk8", "v2-logits8", "v2-features8"])
def test_bytes_mean_what_numpy_reads_in_them(name):
    with SoftLabelStore(FILES / f"{name}.store") as store:
        row, labels = store.rows(1, [3])[0], store.read(1, [3])
        if store.k:
            found, wanted = labels.values, topk8(row, finer=store.version == 2)
        elif name == "v2-logits8":
            found, wanted = labels.dense, line(row, C)
        else:
            data = np.frombuffer(store.classifier_bytes(), "<f4").astype(float)
            assert np.array_equal(data, np.concatenate([WEIGHT.numpy().ravel(), BIAS.numpy()]))
            found, wanted = labels.dense, line(row, 4) @ data[: 4 * C].reshape(C, 4).T + data[4 * C :]
        torch.testing.assert_close(found[0].double(), torch.from_numpy(wanted), rtol=1e-6, atol=1e-6)


def test_an_old_relabelling_goes_on_in_its_own_version(tmp_path):
    """To the bytes that it would have had; and old shards merge with new ones into a current file."""
    whole, cut = FILES / "v1-topk8.store", tmp_path / "cut.store"
    shutil.copy(whole, cut)
    with SoftLabelStore(whole) as store:
        at = store._table_at + (1 * store.blocks + 1) * 16
    with cut.open("r+b") as file:
        file.seek(at)
        file.write(bytes(16))
    with SoftLabelStore(cut, writable=True) as store:
        assert store.missing(1).tolist() == [0, 3]
        store.write(1, [0, 3], logits(1)[[0, 3]], np.array([[1, 0], [1, 3]], np.uint8))
    assert cut.read_bytes() == whole.read_bytes()
    with pytest.raises(ValueError, match=r"v2-topk8\.store: flags: expected \[\] as .*v1-topk8\.store has"):
        SoftLabelStore.merge([whole, FILES / "v2-topk8.store"], tmp_path / "mixed.store")
    with SoftLabelStore.merge([whole], tmp_path / "merged.store") as merged:
        assert (merged.version, merged.gradient_error) == (2, None)
        with SoftLabelStore(whole) as store:
            for epoch in range(EPOCHS):
                assert torch.equal(merged.read(epoch, range(N)).values, store.read(epoch, range(N)).values)


def test_what_a_relabelling_of_version_1_mixed_are_images_of_the_set(tmp_path):
    from pydistill.labels._reader import LabelReader

    with LabelReader(FILES / "v1-fp16.store") as reader:
        assert reader._current({"metadata": {"relabel": {}}}, 1)["sources"] == "images"
        assert reader._current({"metadata": {"imported": "fkd"}}, 1)["sources"] == "batch"


if __name__ == "__main__":
    make(Path(sys.argv[1]))
