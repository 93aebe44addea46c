"""Reading what SRe2L's code saves, written here as that code does."""

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler

from pydistill.labels import FKD_RECORD, SoftLabelStore, import_fkd

N, C, EPOCHS, BATCH, T = 22, 10, 3, 8, 20.0


def content(ids, mix, seed):
    n, generator = len(ids), torch.Generator().manual_seed(seed)
    coords = torch.rand(n, 4, generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    index = lam = box = None
    if mix is not None:
        index, lam = torch.randperm(n, generator=generator), np.random.default_rng(seed).beta(0.8, 0.8)
        if mix == "cutmix":  # in that code some of them are NumPy's
            box = list(np.clip(np.array([-3, seed, 40, 224]), 0, 224))
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
    with import_fkd(tmp_path / "fkd", tmp_path / "store", format=format, k=4, metadata={"teacher": "t"}) as store:
        assert (store.num_images, store.num_classes, store.epochs, store.batch_size) == (N, C, EPOCHS, BATCH)
        assert (store.temperature, store.completed) == (T, EPOCHS)
        assert store.metadata == {"teacher": "t", "imported": "fkd", "seed": 42}
        for (epoch, b), (ids, (coords, flip, index, lam, box, logits)) in saved.items():
            assert store.batches(epoch)[b] == ids
            labels = store.read(epoch, ids)
            if format == "fp16":
                assert torch.equal(labels.dense, logits)
            else:
                values, indices = (logits.float() / T).softmax(1).topk(1)
                assert torch.equal(labels.indices[:, :1], indices)
                torch.testing.assert_close(labels.values[:, :1], values, rtol=4e-2, atol=0)
            record = labels.records.numpy().reshape(-1).view(FKD_RECORD)
            assert np.array_equal(record["crop"], coords.numpy())
            assert np.array_equal(record["flip"], flip.numpy())
            assert set(record["mix"]) == {{None: 0, "mixup": 1, "cutmix": 2}[mix]}
            partners = ids if index is None else [ids[int(i)] for i in index]
            assert record["partner"].tolist() == partners
            if mix:
                assert (record["lam"] == np.float32(lam)).all()
            assert record["box"].tolist() == [[int(each) for each in box] if box else [0] * 4] * len(ids)


def test_the_images_may_be_given(tmp_path):
    saved = save(tmp_path / "fkd", seed=7)
    order = [[i for b in range(3) for i in saved[epoch, b][0]] for epoch in range(EPOCHS)]
    by_seed = import_fkd(tmp_path / "fkd", tmp_path / "seed", seed=7)
    by_order = import_fkd(tmp_path / "fkd", tmp_path / "order", order=order)
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
        ([coords, flip, index[:5], lam, box, logits], r"mix_index: expected \[6\], got \[5\]"),
        ([coords, flip, index + 1, lam, box, logits], "mix_index: expected places in a batch of 6, got"),
        ([coords, flip, index, lam, box, logits * float("nan")], "labels: row 0: expected finite numbers"),
        ([coords, flip, index, lam, box], "expected a batch of FKD labels: .*; got something else"),
        ({"logits": logits}, "got something else"),
        ([coords, flip, index, lam, box, Evil()], "it is truncated or foreign"),
    ):
        torch.save(wrong, place)
        with pytest.raises(ValueError, match=rf"epoch_1/batch_2\.tar: .*{message}"):
            import_fkd(folder, store)
    place.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"epoch_1/batch_2\.tar: expected a batch of FKD labels.*truncated or foreign"):
        import_fkd(folder, store)
    place.write_bytes(whole)
    more = place.with_name("batch_3.tar")
    more.write_bytes(whole)
    with pytest.raises(ValueError, match=r"fkd/epoch_1: expected 3 batches as epoch_0 has, got 4"):
        import_fkd(folder, store)
    more.unlink()
    place.rename(place.with_name("batch_7.tar"))
    with pytest.raises(FileNotFoundError, match=r"epoch_1/batch_2\.tar: expected labels of FKD, found nothing there"):
        import_fkd(folder, store)
    with pytest.raises(FileNotFoundError, match=r"nothing/epoch_0: expected labels of FKD, found nothing there"):
        import_fkd(tmp_path / "nothing", store)
    (folder / "epoch_0").rename(folder / "epoch_9")
    with pytest.raises(FileNotFoundError, match=r"fkd/epoch_0: expected labels of FKD, found nothing there"):
        import_fkd(folder, store)
    assert not capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["fkd"]
    SoftLabelStore.create(store, num_images=1, num_classes=10, epochs=1).close()
    with pytest.raises(FileExistsError, match="it exists already"):
        import_fkd(folder, store)
