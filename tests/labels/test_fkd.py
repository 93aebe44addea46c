"""Reading what SRe2L's code saves, written here in the same way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from pydistill.labels import SoftLabelDataset, SoftLabelStore, StoredBatches, collate_soft_labels, import_fkd
from pydistill.ops import multi_crop

N, C, EPOCHS, BATCH, T = 22, 10, 3, 8, 20.0
SIZE, OUT = 32, 16
SIZES = {"image_size": SIZE, "out_size": OUT}


def content(ids, mix, seed):
    n, generator = len(ids), torch.Generator().manual_seed(seed)
    corner, far = (torch.randint(*ends, (n, 2), generator=generator) for ends in ((0, 16), (17, SIZE + 1)))
    coords = torch.cat([corner, far - corner], 1) / SIZE  # top, left, height, width
    flip = torch.rand(n, generator=generator) < 0.5
    index = lam = box = None
    if mix is not None:
        index, lam = torch.randperm(n, generator=generator), np.random.default_rng(seed).beta(0.8, 0.8)
        if mix == "cutmix":  # in that code some of them are NumPy's
            box = list(np.clip(np.array([-3, seed % 9, 11, OUT + 2]), 0, OUT))
    # so that a label tells its image
    logits = torch.nn.functional.one_hot(torch.as_tensor(ids) % C, C).half() * 30 + torch.as_tensor(ids)[:, None] / 64
    return [coords, flip, index, lam, box, logits.half()]


def save(folder, mix="cutmix", seed=42):
    """The loop of generate_soft_label.py: one sampler, and its generator, for all epochs."""
    sampler = RandomSampler(range(N), generator=torch.Generator().manual_seed(seed))
    batches = BatchSampler(sampler, BATCH, drop_last=False)
    saved = {}
    for epoch in range(EPOCHS):
        (folder / f"epoch_{epoch}").mkdir(parents=True)
        for b, ids in enumerate(batches):
            saved[epoch, b] = ids, content(ids, mix, 10 * epoch + b)
            torch.save(saved[epoch, b][1], folder / f"epoch_{epoch}" / f"batch_{b}.tar")
    return saved


@pytest.mark.parametrize("mix", ["cutmix", "mixup", None])
@pytest.mark.parametrize("format", ["fp16", "topk8"])
def test_files_are_imported(tmp_path, mix, format):
    saved = save(tmp_path / "fkd", mix)
    with import_fkd(
        tmp_path / "fkd", tmp_path / "store", format=format, k=4, metadata={"teacher": "t"}, **SIZES
    ) as store:
        assert (store.num_images, store.num_classes, store.epochs, store.batch_size) == (N, C, EPOCHS, BATCH)
        assert (store.T, store.completed) == (T, EPOCHS)
        assert store.metadata == {"teacher": "t", "imported": "fkd", "seed": 42}
        for (epoch, b), (ids, (*_, logits)) in saved.items():
            assert store.batches(epoch)[b] == ids
            labels = store.read(epoch, ids)
            if format == "fp16":
                assert torch.equal(labels.dense, logits)
            else:
                values, indices = (logits.float() / T).softmax(1).topk(1)
                assert torch.equal(labels.indices[:, :1], indices)
                torch.testing.assert_close(labels.values[:, :1], values, rtol=4e-2, atol=0)
            parts = 1 if mix is None else 2
            assert labels.crops().shape == (len(ids), parts, 14)


@pytest.mark.parametrize(
    ("dtype", "format"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_every_bit_of_the_logits_is_kept_by_default(tmp_path, dtype, format):
    saved = save(tmp_path / "fkd")
    for (epoch, b), (_, parts) in saved.items():
        parts[-1] = torch.randn(parts[-1].shape, generator=torch.Generator().manual_seed(b)).to(dtype)
        torch.save(parts, tmp_path / "fkd" / f"epoch_{epoch}" / f"batch_{b}.tar")
    with import_fkd(tmp_path / "fkd", tmp_path / "store", **SIZES) as store:
        assert store.format == format
        for (epoch, _), (ids, (*_, logits)) in saved.items():
            assert torch.equal(store.read(epoch, ids).dense, logits)
        assert store.gradient_error == (0, 0)
    (tmp_path / "store").unlink()
    torch.save([*saved[1, 1][1][:-1], saved[1, 1][1][-1].double()], tmp_path / "fkd" / "epoch_1" / "batch_1.tar")
    with pytest.raises(ValueError, match=rf"epoch_1/batch_1\.tar: logits: expected {dtype} as the first file has, got"):
        import_fkd(tmp_path / "fkd", tmp_path / "store", **SIZES)
    with import_fkd(tmp_path / "fkd", tmp_path / "store", format="logits8", **SIZES) as store:
        assert 0 < store.gradient_error.fresh < 0.02
    torch.save([*saved[0, 0][1][:-1], saved[0, 0][1][-1].double()], tmp_path / "fkd" / "epoch_0" / "batch_0.tar")
    with pytest.raises(ValueError, match=r"batch_0\.tar: logits: expected float32, float16 or bfloat16, got torch\.f"):
        import_fkd(tmp_path / "fkd", tmp_path / "other", **SIZES)


def replayed(images, coords, flip, index, lam, box):
    """The images of a batch as that code transforms them, except for PIL's rounding."""
    views = []
    for image, crop, mirrored in zip(images, (coords * SIZE).round().long().tolist(), flip, strict=True):
        top, left, height, width = crop
        view = image[None, :, top : top + height, left : left + width]
        view = F.interpolate(view, OUT, mode="bilinear", antialias=True, align_corners=False)[0]
        views.append(view.flip(-1) if mirrored else view)
    views = torch.stack(views)
    if index is None:
        return views
    if box is None:
        return lam * views + (1 - lam) * views[index]
    x1, y1, x2, y2 = (int(each) for each in box)
    mixed = views.clone()
    mixed[:, :, x1:x2, y1:y2] = views[index, :, x1:x2, y1:y2]
    return mixed


@pytest.mark.parametrize("mix", ["cutmix", "mixup", None])
def test_what_is_imported_is_replayed_through_a_loader(tmp_path, mix):
    saved = save(tmp_path / "fkd", mix)
    images = torch.rand(N, 3, SIZE, SIZE)
    with import_fkd(tmp_path / "fkd", tmp_path / "store", **SIZES) as store:
        data = SoftLabelDataset(images, store)
        loader = DataLoader(data, batch_sampler=StoredBatches(data), collate_fn=collate_soft_labels)
        for epoch in range(EPOCHS):
            data.set_epoch(epoch)
            for b, (batch, labels) in enumerate(loader):
                ids, (coords, flip, index, lam, box, _) = saved[epoch, b]
                expected = replayed(images[ids], coords, flip, index, lam, box)
                torch.testing.assert_close(multi_crop(batch, labels.crops(), OUT), expected, rtol=1e-5, atol=1e-5)


def test_the_images_may_be_given(tmp_path):
    saved = save(tmp_path / "fkd", seed=7)
    order = [[i for b in range(3) for i in saved[epoch, b][0]] for epoch in range(EPOCHS)]
    by_seed = import_fkd(tmp_path / "fkd", tmp_path / "seed", seed=7, **SIZES)
    by_order = import_fkd(tmp_path / "fkd", tmp_path / "order", order=order, **SIZES)
    with by_seed, by_order:
        assert by_order.metadata["seed"] is None
        for epoch in range(EPOCHS):
            assert torch.equal(by_seed.read(epoch, range(N)).rows, by_order.read(epoch, range(N)).rows)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_do_not_fit_are_named_and_nothing_is_made(tmp_path, capsys):
    folder, store = tmp_path / "fkd", tmp_path / "store"
    save(folder)
    place = folder / "epoch_1" / "batch_2.tar"
    whole = place.read_bytes()
    ids = list(range(6))
    coords, flip, index, lam, box, logits = content(ids, "cutmix", 0)
    for wrong, message in (
        ([coords, flip, index, lam, box, logits[:, :9]], r"logits: expected \[6, 10\], got \[6, 9\]"),
        ([coords[:5], flip, index, lam, box, logits], r"coords: expected \[6, 4\], got \[5, 4\]"),
        ([coords * 2, flip, index, lam, box, logits], "coords: expected crops of images of 32, got some that are not"),
        ([coords, flip, index[:5], lam, box, logits], r"mix_index: expected \[6\], got \[5\]"),
        ([coords, flip, index + 1, lam, box, logits], "mix_index: expected places in a batch of 6, got"),
        ([coords, flip, index, lam, box, logits * float("nan")], "labels: row 0: expected finite numbers"),
        ([coords, flip, index, lam, box], "expected a batch of FKD labels: .*; got something else"),
        ({"logits": logits}, "got something else"),
        ([coords, flip, index, lam, box, Evil()], "it asks for print, which may run code"),
    ):
        torch.save(wrong, place)
        with pytest.raises(ValueError, match=rf"epoch_1/batch_2\.tar: .*{message}"):
            import_fkd(folder, store, **SIZES)
    place.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"epoch_1/batch_2\.tar: expected a batch of FKD labels.*truncated"):
        import_fkd(folder, store, **SIZES)
    place.write_bytes(whole)
    more = place.with_name("batch_3.tar")
    more.write_bytes(whole)
    with pytest.raises(ValueError, match=r"fkd/epoch_1: expected 3 batches as epoch_0 has, got 4"):
        import_fkd(folder, store, **SIZES)
    more.unlink()
    place.rename(place.with_name("batch_7.tar"))
    with pytest.raises(FileNotFoundError, match=r"epoch_1/batch_2\.tar: expected labels of FKD, found nothing there"):
        import_fkd(folder, store, **SIZES)
    with pytest.raises(FileNotFoundError, match=r"nothing/epoch_0: expected labels of FKD, found nothing there"):
        import_fkd(tmp_path / "nothing", store)
    (folder / "epoch_0").rename(folder / "epoch_9")
    with pytest.raises(FileNotFoundError, match=r"fkd/epoch_0: expected labels of FKD, found nothing there"):
        import_fkd(folder, store, **SIZES)
    assert not capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["fkd"]
    SoftLabelStore.create(store, num_images=1, num_classes=10, epochs=1).close()
    with pytest.raises(FileExistsError, match="it exists already"):
        import_fkd(folder, store, **SIZES)
