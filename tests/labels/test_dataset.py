"""Labels through torch's plain loader: which image, which epoch, whatever the workers."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from pydistill.augment import MultiCrop
from pydistill.labels import CROP_BYTES, SoftLabelDataset, SoftLabelStore, StoredBatches, collate_soft_labels
from pydistill.ops import multi_crop
from tests.labels.stores import EPOCHS, OPTIONS, N, batches, create, fill, records


@pytest.fixture
def store(tmp_path):
    with create(tmp_path / "labels.store") as writer:
        fill(writer)
    with SoftLabelStore(tmp_path / "labels.store") as store:
        yield store


IMAGES = torch.arange(N * 12.0).view(N, 3, 2, 2)


class PerItem(SoftLabelDataset):
    __getitems__ = None  # what loaders before torch 2.1 see


@pytest.mark.parametrize(
    ("workers", "kind"),
    [
        ({"num_workers": 0}, SoftLabelDataset),
        ({"num_workers": 0}, PerItem),
        ({"num_workers": 2, "multiprocessing_context": "fork"}, SoftLabelDataset),
        ({"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True}, SoftLabelDataset),
        ({"num_workers": 2, "multiprocessing_context": "fork"}, PerItem),
        ({"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True}, SoftLabelDataset),
    ],
)
def test_batches_come_as_they_were_written(store, workers, kind):
    data = kind(IMAGES, store)
    loader = DataLoader(data, batch_sampler=StoredBatches(data), collate_fn=collate_soft_labels, **workers)
    assert len(loader) == 4
    for epoch in (0, 2, 1):
        data.set_epoch(epoch)
        for ids, (images, labels) in zip(batches(epoch), loader, strict=True):
            assert (labels.epoch, labels.images.tolist()) == (epoch, ids.tolist())
            assert torch.equal(images, IMAGES[torch.from_numpy(ids)])
            assert np.array_equal(labels.records.numpy(), records(epoch, ids))
            assert torch.equal(labels.values, store.read(epoch, ids).values)
            assert labels.loss(torch.zeros(len(ids), OPTIONS["num_classes"])).isfinite()


def test_other_data_sets_and_samplers_serve_as_well(store):
    data = SoftLabelDataset(TensorDataset(IMAGES, torch.arange(N)), store, epoch=1)
    assert data.epoch == 1
    loader = DataLoader(data, batch_size=7, shuffle=True, collate_fn=collate_soft_labels)
    seen = []
    for (images, numbers), labels in loader:
        assert torch.equal(images, IMAGES[numbers])
        assert torch.equal(labels.images, numbers)
        assert torch.equal(labels.rows, store.read(1, numbers).rows)
        seen += numbers.tolist()
    assert sorted(seen) == list(range(N))
    (image, number), label = data[3]
    assert torch.equal(image, IMAGES[3])
    assert (int(number), len(label), label.images.tolist()) == (3, 1, [3])


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("images", [IMAGES, list(IMAGES), None], ids=["tensor", "list", "none"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_plain_loader_needs_no_collate_fn(store, images, drop_last, workers):
    data = SoftLabelDataset(images, store)
    loader = DataLoader(data, batch_size=4, shuffle=True, drop_last=drop_last, **workers)
    for epoch in (1, 0):
        data.set_epoch(epoch)
        seen = []
        for found, labels in loader:
            assert torch.equal(labels.rows, store.read(epoch, labels.images.numpy()).rows)
            assert found is None if images is None else torch.equal(found, IMAGES[labels.images])
            seen += labels.images.tolist()
        assert len(seen) == len(set(seen)) == (N // 4 * 4 if drop_last else N)


def test_items_one_by_one_need_none_either(store):
    data = PerItem(IMAGES, store)
    for images, labels in DataLoader(data, batch_size=4):
        assert torch.equal(images, IMAGES[labels.images])


@pytest.mark.parametrize("kind", [SoftLabelDataset, PerItem])
@pytest.mark.parametrize("workers", [0, 1])
def test_labels_come_without_images_too(store, kind, workers):
    data = kind(None, store)
    loader = DataLoader(data, batch_sampler=StoredBatches(data), collate_fn=collate_soft_labels, num_workers=workers)
    for ids, (images, labels) in zip(batches(0), loader, strict=True):
        assert images is None
        assert torch.equal(labels.rows, store.read(0, ids).rows)
        assert labels.images.tolist() == ids.tolist()


def test_wrong_data_sets_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match=r"images: expected 25 as the store .*labels\.store has, got 24"):
        SoftLabelDataset(IMAGES[1:], store)
    with pytest.raises(IndexError, match=r"epoch: expected one of 0\.\.2, got 3"):
        SoftLabelDataset(IMAGES, store, epoch=3)
    with pytest.raises(TypeError, match=r"epoch: expected a whole number, got 1\.5"):
        SoftLabelDataset(IMAGES, store, epoch=1.5)
    for images in (IMAGES, None):
        data = SoftLabelDataset(images, store)
        for index in (25, -1):
            with pytest.raises(IndexError, match=rf"index: expected one of 0\.\.24, got {index}"):
                data[index]
        for index in (1.5, "a", None, [0, 1]):
            with pytest.raises(TypeError, match="index: expected a whole number, got "):
                data[index]
    with create(tmp_path / "other") as other:
        fill(other, [0])
        with pytest.raises(ValueError, match="store: expected one that is open for reading"):
            SoftLabelDataset(IMAGES, other)
    with SoftLabelStore(tmp_path / "other") as other:
        data = SoftLabelDataset(IMAGES, other)
        with pytest.raises(ValueError, match="epoch 1 lacks the labels of 25 of 25 images, the first of them image 0"):
            data.set_epoch(EPOCHS - 2)
        assert data.epoch == 0


@pytest.fixture(params=["batch", "images"])
def mixed(request, tmp_path):
    """Stores of two batches of views with cutmix, and without, of 10 images; what the views are, by image."""
    images = torch.rand(10, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    stores, views = {}, {}
    for mix in ("cutmix", None):
        path = tmp_path / f"{mix}.store"
        options = {"num_images": 10, "num_classes": 4, "epochs": 1, "batch_size": 5, "sources": request.param}
        views[mix] = torch.empty(10, 3, 8, 8)
        with SoftLabelStore.create(path, **options, record_bytes=CROP_BYTES * (2 if mix else 1)) as store:
            for b, ids in enumerate(torch.randperm(10, generator=torch.Generator().manual_seed(1)).split(5)):
                crops = MultiCrop(8, mix=mix)
                shown, sources = (images, ids) if request.param == "images" else (images[ids], None)
                record = crops.draw(shown.shape, torch.Generator().manual_seed(b), sources=sources)
                views[mix][ids] = multi_crop(shown, record, 8)
                store.write(0, ids, torch.zeros(5, 4), record)
        stores[mix] = SoftLabelStore(path)
    yield images, stores, views
    for store in stores.values():
        store.close()


@pytest.mark.parametrize("kind", [SoftLabelDataset, PerItem])
def test_views_are_replayed_from_the_batch_in_whatever_order_it_comes(mixed, kind):
    images, stores, views = mixed
    for mix, store in stores.items():
        data = kind(images, store)
        batches = list(StoredBatches(data))
        orders = [batches, [batch[::-1] for batch in batches], [batches[0] + batches[1]]]
        for order in [*orders, *([] if mix else [[[3, 7], [0, 9, 1]], [[8]]])]:
            for batch, labels in DataLoader(data, batch_sampler=order, collate_fn=collate_soft_labels):
                assert torch.equal(multi_crop(batch, labels.crops(), 8), views[mix][labels.images])
                if not mix:
                    part = slice(1, 3)
                    assert torch.equal(
                        multi_crop(batch[part], labels[part].crops(), 8), views[mix][labels.images][part]
                    )


@pytest.mark.parametrize("kind", [SoftLabelDataset, PerItem])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_partner_that_is_not_in_the_batch_is_refused(mixed, kind, workers):
    images, stores, _ = mixed
    data = kind(images, stores["cutmix"])
    order = list(StoredBatches(data))
    shuffled = [order[0][:3] + order[1][:2], order[0][3:] + order[1][2:]]
    loader = DataLoader(data, batch_sampler=shuffled, collate_fn=collate_soft_labels, num_workers=workers)
    message = (
        r"records: image \d was mixed with an image of the batch that it was labelled in, which is not in this one"
    )
    refused = 0
    for _, labels in loader:
        with pytest.raises(ValueError, match=message):
            labels.crops()
        refused += 1
    assert refused == 2
    _, labels = next(iter(DataLoader(data, batch_sampler=StoredBatches(data), collate_fn=collate_soft_labels)))
    with pytest.raises(ValueError, match="StoredBatches"):
        labels[:2].crops()


def written(path, *, record_bytes=0, **options):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 10, generator=generator)
    options = {"epochs": 1, "batch_size": 4, "record_bytes": record_bytes, **options}
    records = {"records": torch.zeros(4, record_bytes, dtype=torch.uint8)} if record_bytes else {}
    with SoftLabelStore.create(path, num_images=4, num_classes=10, **options) as store:
        store.write(0, torch.arange(4), logits, **records)
    return SoftLabelStore(path)


def joined(stores):
    data = ConcatDataset([SoftLabelDataset(IMAGES[:4], store) for store in stores])
    return next(iter(DataLoader(data, batch_size=8)))[1]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"format": "fp16"}, {"format": "bf16"}, "labels: expected one layout in a batch, got .*fp16.* and .*bf16"),
        ({"T": 4.0}, {"T": 20.0}, "labels: expected one layout in a batch, got .*4.0.* and .*20.0"),
        (
            {"record_bytes": 58},
            {"record_bytes": 58},
            r"expected those of one store in a batch, got .*a\.store and .*b\.store",
        ),
    ],
)
def test_labels_that_do_not_go_together_are_refused(tmp_path, first, second, message):
    stores = [written(tmp_path / "a.store", **first), written(tmp_path / "b.store", **second)]
    with pytest.raises(ValueError, match=message):
        joined(stores)


def test_labels_of_equal_stores_are_one_batch(tmp_path):
    a, b = written(tmp_path / "a.store"), written(tmp_path / "b.store")
    found = joined([a, b])
    assert torch.equal(found.rows, torch.cat([store.read(0, np.arange(4)).rows for store in (a, b)]))
