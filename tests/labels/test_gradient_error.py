"""The gradient error of the stored forms, that a store reports it, and bounds for the 8-bit forms."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from pydistill.labels import SoftLabelDataset, SoftLabelStore, StoredBatches, collate_soft_labels, linear8
from pydistill.labels.gradient_error import GradientError

N, C, D = 48, 1000, 64


def teacher(n=N):
    """Logits of a teacher that knows its classes."""
    logits = 1.5 * torch.randn(n, C, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(n), torch.arange(n)] += 9
    return logits


def features(n=N):
    """Features of a network that ends in a ReLU and a mean over positions, and its last layer's output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, D, generator=generator).relu()
    return x, torch.randn(C, D, generator=generator) / 4, torch.randn(C, generator=generator) / 4


def students(logits):
    """An untrained one, and one near the teacher: see GradientError."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(tuple(logits.shape)))
    near = logits + 0.25 * logits.std(1, correction=0, keepdim=True) * noise
    return {"fresh": torch.zeros_like(logits), "near": near}


def store_of(path, labels, format, T=1.0, k=10, **options):
    sizes = {"num_images": len(labels), "num_classes": C, "epochs": 1, "batch_size": len(labels)}
    with SoftLabelStore.create(path, **sizes, format=format, k=k, T=T, **options) as store:
        store.write(0, torch.arange(len(labels)), labels)
    return SoftLabelStore.open(path)


def gradient_off(store, logits, student, T):
    """Through the loss itself, against torch on the logits."""
    z = student.clone().requires_grad_()
    wanted = F.kl_div((z / T).log_softmax(1), (logits / T).softmax(1), reduction="batchmean")
    (wanted,) = torch.autograd.grad(wanted, z)
    (found,) = torch.autograd.grad(store.read(0, range(len(logits))).loss(z), z)
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
@pytest.mark.parametrize(
    ("format", "k", "bounds"),
    [
        ("fp32", 0, (1e-6, 1e-5)),
        ("fp16", 0, (1e-3, 1e-2)),
        ("logits8", 0, (0.02, 0.02)),
        ("features8", 0, (0.02, 0.03)),
        ("topk8", C, (0.02, 0.06)),
        ("topk", 10, None),
    ],
)
def test_the_error_is_that_of_the_gradient(tmp_path, format, k, bounds, T):
    labels, options = teacher(), {}
    logits = labels.double()
    if format == "features8":
        labels, *layer = features()
        options["classifier"] = tuple(layer)
        logits = labels.double() @ layer[0].T.double() + layer[1]
    with store_of(tmp_path / "store", labels, format, T, k, **options) as store:
        for i, (name, student) in enumerate(students(logits).items()):
            found, said = gradient_off(store, logits, student, T), getattr(store.gradient_error, name)
            assert said == pytest.approx(found, rel=0.02, abs=1e-5)
            if bounds is not None:
                assert found <= bounds[i]
        if format == "topk" and T == 20:
            assert store.gradient_error.fresh > 0.9


def test_what_loses_nothing_says_nothing_is_lost(tmp_path):
    for format, labels in (("fp32", teacher()), ("fp16", teacher().half()), ("bf16", teacher().bfloat16())):
        with store_of(tmp_path / format, labels, format, 20.0) as store:
            assert store.gradient_error == GradientError(0.0, 0.0)
            assert torch.equal(store.read(0, range(N)).dense, labels)
    probs = (teacher() / 20).softmax(1)
    with store_of(tmp_path / "probs", probs, "fp32", 20.0, target="probs") as store:
        assert store.gradient_error.near < 1e-4


def test_a_store_says_its_error_from_the_first_batch_on_and_through_merging(tmp_path):
    logits = teacher()
    sizes = {"num_images": N, "num_classes": C, "epochs": 1, "batch_size": 12, "format": "topk8", "T": 20.0}
    found = []
    for rank in range(2):
        with SoftLabelStore.create(tmp_path / f"{rank}", **sizes, images=range(rank, N, 2)) as store:
            assert store.gradient_error is None
            assert "gradient error" not in repr(store)
            for ids in np.split(np.arange(rank, N, 2), 2):
                store.write(0, ids, logits[ids])
                assert store.gradient_error.fresh > 0.9
            assert f"gradient error {100 * store.gradient_error.fresh:.2g} % for a fresh student, " in repr(store)
            found.append(store.gradient_error)
    with SoftLabelStore.merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged") as merged:
        assert merged.gradient_error == pytest.approx(np.sqrt(np.square(found).mean(0)), rel=1e-9)


@pytest.mark.parametrize(("format", "T", "told"), [("topk8", 20.0, True), ("logits8", 20.0, False)])
def test_much_of_it_is_said_aloud_and_once(tmp_path, caplog, format, T, told):
    with caplog.at_level(logging.WARNING, "pydistill"):
        sizes = {"num_images": N, "num_classes": C, "epochs": 2, "batch_size": N, "format": format, "T": T}
        with SoftLabelStore.create(tmp_path / "store", **sizes) as store:
            for epoch in range(2):
                store.write(epoch, range(N), teacher())
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == told
    if told:
        assert "topk8 with k=10 of 1000 classes at temperature 20 changes gradients by 9" in messages[0]


@pytest.mark.parametrize("m", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("group", [1, 32, 70])
def test_numbers_come_back_within_half_a_step_of_their_group(m, group):
    noise = np.random.default_rng(m).standard_normal((5, m))
    values = (noise * [[1e-6], [1], [0], [30], [1e3]] + np.array([[0], [0], [-7.123], [1000], [0]])).astype(np.float32)
    rows = np.concatenate([linear8.pack(values, group), np.full((5, 3), 99, np.uint8)], 1)
    groups = -(-m // group)
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    found = linear8.unpack(torch.from_numpy(rows), m, group, torch.device("cpu")).numpy()
    for g in range(groups):
        part = values[:, g * group : (g + 1) * group]
        low, span = part.min(1), np.ptp(part, 1)
        step = (span + np.abs(low) * 2.0**-10 + 2.0**-24) / 255 * (1 + 2.0**-9) + 2.0**-24
        assert (
            np.abs(found[:, g * group : (g + 1) * group] - part).max(1) <= step / 2 + np.abs(part).max(1) * 3e-7
        ).all()


def test_features_take_fewer_bytes_than_logits(tmp_path):
    for D, times in ((512, 3.87), (1280, 1.55)):
        layer = torch.zeros(C, D), None
        sizes = {"num_images": 4, "num_classes": C, "epochs": 1, "batch_size": 4}
        with SoftLabelStore.create(tmp_path / f"{D}", **sizes, format="features8", classifier=layer) as store:
            assert store.layout.label_bytes == store.layout.row_bytes == D + 4
            assert 2 * C / store.layout.label_bytes > times


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "multiprocessing_context": "fork"}])
def test_features_are_labels_of_all_classes(tmp_path, workers):
    x, weight, bias = features()
    sizes = {"num_images": N, "num_classes": C, "epochs": 1, "batch_size": 20, "format": "features8", "record_bytes": 1}
    with SoftLabelStore.create(tmp_path / "store", **sizes, classifier=(weight, bias)) as store:
        for ids in np.split(np.arange(N)[::-1], [20, 40]):
            store.write(0, ids, x[ids.copy()], np.ones((len(ids), 1), np.uint8))
        with pytest.raises(IndexError):
            store.write(1, [0], x[:1])
    with SoftLabelStore(tmp_path / "store") as store:
        assert all(map(torch.equal, store.classifier, (weight, bias)))
        data = SoftLabelDataset(torch.arange(N), store)
        loader = DataLoader(data, batch_sampler=StoredBatches(data), collate_fn=collate_soft_labels, **workers)
        z = torch.randn(N, C, dtype=torch.float64)
        for images, labels in loader:
            torch.testing.assert_close(labels.features, x[images], rtol=0, atol=x.max() / 255)
            torch.testing.assert_close(labels.dense, labels.features @ weight.T + bias, rtol=1e-5, atol=1e-5)
            for T in (1.0, 4.0):  # logits serve any temperature
                wanted = F.kl_div((z[images] / T).log_softmax(1), labels.densify(T).double(), reduction="batchmean")
                torch.testing.assert_close(labels.loss(z[images], T=T), wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(labels[:3].dense, labels.dense[:3])
        at = store._fixed_at + 5
    with SoftLabelStore.merge([tmp_path / "store"], tmp_path / "merged") as merged:
        assert merged.path.read_bytes() == (tmp_path / "store").read_bytes()
    damaged = bytearray((tmp_path / "store").read_bytes())
    damaged[at] ^= 1
    (tmp_path / "store").write_bytes(damaged)
    with SoftLabelStore(tmp_path / "store") as store:
        for read in (store.verify, lambda: store.read(0, [0])):
            with pytest.raises(ValueError, match=r"store: the classifier is damaged: expected crc32 \d+, got \d+"):
                read()


def test_features_of_another_layer_are_refused(tmp_path):
    layer = torch.zeros(C, D), None
    sizes = {"num_images": 4, "num_classes": C, "epochs": 1, "batch_size": 4, "format": "features8"}
    with SoftLabelStore.create(tmp_path / "store", **sizes, classifier=layer) as store:
        with pytest.raises(ValueError, match=r"labels: expected \[4, 64\] of the store's classifier's inputs, got"):
            store.write(0, range(4), torch.zeros(4, C))
        with pytest.raises(ValueError, match="labels: row 2: expected finite numbers that features8 can hold"):
            store.write(0, range(4), torch.zeros(4, D).index_fill(0, torch.tensor([2]), 1e8))
        store.write(0, range(4), torch.zeros(4, D))
    with store_of(tmp_path / "logits", teacher(4), "logits8") as store:
        with pytest.raises(ValueError, match="features: expected labels in features8, got logits8"):
            _ = store.read(0, [0]).features
        assert store.classifier is None
