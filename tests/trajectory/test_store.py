"""A store returns what was appended, refuses what is damaged, and survives a write interrupted at any point."""

import json
import os
import struct
import zlib
from collections import OrderedDict

import pytest
import torch
from torch import nn

from pydistill import ExpertStore, _atomic
from pydistill.trajectory import as_trajectories
from tests.interrupted import Disk, KilledError
from tests.trajectory.stores import EPOCHS, NUMEL, E, create, fill, make_net, trajectories, vectors


@pytest.fixture
def filled(path):
    with create(path) as store:
        fill(store, trajectories())
    return path


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_come_back(path, dtype):
    rows = trajectories()
    expected = rows if dtype == "fp32" else rows.bfloat16().float()
    options = {"lr": 0.1, "schedule": None}
    with create(path, dtype=dtype, dataset="bars", data_crc32=7, options=options) as store:
        fill(store, rows, [range(0, 3), range(3, 4)])
        assert torch.equal(store.row(2, 1), expected[2, 1])
    with ExpertStore(path) as store:
        assert (len(store), store.epochs, store.shape) == (E, EPOCHS, (E, EPOCHS + 1, NUMEL))
        assert (store.dtype, store.dataset, store.data_crc32, store.options) == (dtype, "bars", 7, options)
        assert store.parameters == [(name, tuple(p.shape)) for name, p in make_net().named_parameters()]
        assert store.architecture == repr(make_net())
        assert store.completed == [EPOCHS] * E
        store.verify()
        store.check_fits(make_net())
        found = store.tensor()
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        theta0, target = store.segment(1, 0, 2)
        assert torch.equal(theta0, expected[1, 0])
        assert torch.equal(target, expected[1, 2])
        theta0.zero_()  # a copy
        assert torch.equal(store.row(1, 0), expected[1, 0])
        assert dtype in repr(store)
    size = path.stat().st_size
    assert size == 4096 * (2 + E * (EPOCHS + 1) * -(-NUMEL * (4 if dtype == "fp32" else 2) // 4096))


def test_a_segment_reads_two_rows_of_the_file(filled, monkeypatch):
    rows = trajectories()
    with ExpertStore(filled) as store:
        damage_all_rows_but(store, [(2, 1), (2, 3)])
        read, original = [], ExpertStore._read
        monkeypatch.setattr(ExpertStore, "_read", lambda self, at, n: read.append((at, n)) or original(self, at, n))
        theta0, target = store.segment(2, 1, 2)
        assert read == [(store._row_at(2, 1), 4 * NUMEL), (store._row_at(2, 3), 4 * NUMEL)]
        assert torch.equal(theta0, rows[2, 1])
        assert torch.equal(target, rows[2, 3])


def test_what_is_damaged_is_said_and_the_file_is_closed(filled):
    with ExpertStore(filled) as store:
        damage_all_rows_but(store, [])
    for read in (lambda store: store.row(0, 1), ExpertStore.verify, ExpertStore.tensor):
        with pytest.raises(ValueError, match="the row of expert 0 at epoch") as found, ExpertStore(filled) as store:
            read(store)
        assert store._file.closed
        assert found.value.__context__ is None


def damage_all_rows_but(store, kept):
    with store.path.open("r+b") as file:
        for expert in range(E):
            for epoch in range(EPOCHS + 1):
                if (expert, epoch) not in kept:
                    file.seek(store._row_at(expert, epoch) + 5)
                    file.write(b"\x99\x77")


def test_a_damaged_row_is_named_and_the_others_stay(filled):
    with ExpertStore(filled) as store:
        at = store._row_at(1, 2) + 4 * NUMEL - 1
    damaged = bytearray(filled.read_bytes())
    damaged[at] ^= 1
    filled.write_bytes(damaged)
    with ExpertStore(filled) as store:
        for read in (lambda: store.row(1, 2), lambda: store.segment(1, 0, 2), store.verify, store.tensor):
            with pytest.raises(ValueError, match=r"the row of expert 1 at epoch 2 is damaged: expected crc32 \d+, got"):
                read()
        assert torch.equal(store.row(1, 3), trajectories()[1, 3])


@pytest.mark.parametrize("field", range(5))
def test_a_damaged_entry_makes_its_append_missing(filled, field):
    with ExpertStore(filled) as store:
        at = store._table_at + (2 * E + 1) * 20 + 4 * field
    damaged = bytearray(filled.read_bytes())
    damaged[at] ^= 1
    filled.write_bytes(damaged)
    with ExpertStore(filled) as store:
        assert store.completed == [1] * E
        with pytest.raises(ValueError, match="expert 0 has 1 whole epochs of 3, not 2"):
            store.row(0, 2)
        assert store.holds(0, 3)


def test_places_that_are_not_there_are_named(path):
    with create(path) as store:
        fill(store, trajectories()[:, :2])
        for expert in (-1, E):
            with pytest.raises(IndexError, match=rf"experts\.store: expert: expected one of 0\.\.3, got {expert}"):
                store.row(expert, 0)
        for epoch in (-1, EPOCHS + 1):
            with pytest.raises(IndexError, match=rf"epoch: expected one of 0\.\.3, got {epoch}"):
                store.row(0, epoch)
        with pytest.raises(IndexError, match=r"epoch: expected one of 0\.\.3, got 5"):
            store.segment(0, 1, 4)
        with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
            store.segment(0, 1, 0)
        with pytest.raises(ValueError, match=r"expert 2 has 1 whole epochs of 3, not 2"):
            store.segment(2, 1, 1)
        assert store.completed == [1] * E
    with pytest.raises(ValueError, match="the store is closed"):
        store.row(0, 0)


def test_a_file_that_is_cut_under_its_reader_is_named(filled):
    """And the process survives; what is still there can be read."""
    size = filled.stat().st_size
    with ExpertStore(filled) as store:
        os.truncate(filled, store._row_at(1, 2))
        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"experts\.store: expected {size} bytes as it had, it was cut to \d+"
            ):
                store.row(1, 2)
        assert torch.equal(store.row(1, 1), trajectories()[1, 1])
        with pytest.raises(ValueError, match="it was cut to"):
            store.verify()


def test_a_layout_that_differs_is_named(filled):
    with ExpertStore(filled) as store:
        message = r"whose parameter features\.0\.weight is \[5, 1, 3, 3\]; got features\.0\.weight \[4, 1, 3, 3\]"
        with pytest.raises(ValueError, match=message):
            store.check_fits(make_net(5))
        renamed = nn.Sequential(OrderedDict(make_net().named_children()))
        store.check_fits(renamed)
        renamed = nn.Sequential(OrderedDict(other=make_net().features, classifier=make_net().classifier))
        message = r"parameter other\.0\.weight is \[4, 1, 3, 3\]; got features\.0\.weight"
        with pytest.raises(ValueError, match=message):
            store.check_fits(renamed)
        with pytest.raises(ValueError, match=r"of 4 parameters up to features\.1\.bias; got 6 up to classifier\.bias"):
            store.check_fits(nn.Sequential(OrderedDict(features=make_net().features)))


def test_what_is_no_store_is_refused(filled, tmp_path):
    whole, path = filled.read_bytes(), tmp_path / "other.store"
    header_length = struct.unpack_from("<I", whole, 12)[0]

    def with_header(**changes):
        text = json.dumps(json.loads(whole[20 : 20 + header_length]) | changes).encode()
        return struct.pack("<8sIII", b"PYDEXPRT", 1, len(text), zlib.crc32(text)) + text

    for content, message in (
        (b"", r"expected an expert store, which starts with .*; got 0 bytes that start with nothing"),
        (b"PK\x03\x04" + bytes(99), "got 103 bytes that start with 50 4b 03 04"),
        (whole[:8] + struct.pack("<I", 2) + whole[12:], "of version 1, got 2, which a newer pydistill reads"),
        (whole[:30], r"expected a header of \d+ bytes, it is truncated to 10"),
        (whole[:25] + b"\0" + whole[26:], "its header is damaged: expected crc32"),
        (whole[:-1], r"expected \d+ bytes as its header says, it is truncated: \d+"),
        (whole + b"\0", "it is longer than it says"),
        (with_header(parameters=None), "its header has no right parameters, got None"),
        (with_header(dtype="fp8"), "its header has no right dtype, got 'fp8'"),
        (with_header(experts=0), "its header has no right experts, got 0"),
    ):
        path.write_bytes(content)
        for writable in (False, True):
            with pytest.raises(ValueError, match=message):
                ExpertStore(path, writable=writable)
        assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError, match=r"absent: expected an expert store, found no file"):
        ExpertStore(tmp_path / "absent")


def test_nothing_is_overwritten_unasked(filled):
    whole = filled.read_bytes()
    with pytest.raises(FileExistsError, match="it exists already, and is replaced with overwrite=True only"):
        create(filled)
    assert filled.read_bytes() == whole
    with create(filled, overwrite=True) as store:
        assert store.completed == [0] * E
        assert not store.holds(0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts: expected at least 1, got 0"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"dtype": "fp16"}, "dtype: expected 'fp32' or 'bf16', got 'fp16'"),
    ],
)
def test_wrong_sizes_leave_no_file(path, options, message):
    with pytest.raises(ValueError, match=message):
        create(path, **options)
    assert not list(path.parent.iterdir())


def test_wrong_appends_are_refused(path):
    rows = trajectories()[:, 0]
    with create(path, state=["velocity"]) as store:
        store.append(range(2), 0, rows[:2], {"velocity": rows[:2]})
        before = path.read_bytes()
        for arguments, error, message in (
            ((range(2), 0, rows[:2], {"velocity": rows[:2]}), ValueError, "expert 0 has epoch 0 already"),
            (
                (range(2, 4), 1, rows[2:], {"velocity": rows[2:]}),
                ValueError,
                "expert 2 lacks epoch 0, 1 comes after it",
            ),
            ((range(4, 5), 0, rows[:1], {"velocity": rows[:1]}), IndexError, r"expert: expected one of 0\.\.3, got 4"),
            ((range(1), 9, rows[:1], {"velocity": rows[:1]}), IndexError, r"epoch: expected one of 0\.\.3, got 9"),
            ((range(0, 4, 2), 1, rows[:2], {}), ValueError, "experts: expected a range of consecutive ones"),
            ((range(0), 1, rows[:0], {}), ValueError, "experts: expected a range of consecutive ones"),
            ((range(2), 1, rows[:1], {}), ValueError, rf"theta: expected floating-point \[2, {NUMEL}\], got"),
            ((range(2), 1, rows[:2].long(), {}), ValueError, r"theta: expected floating-point .* got torch\.int64"),
            ((range(2), 1, rows[:2], {}), ValueError, r"state: expected \['velocity'\], got \[\]"),
            ((range(2), 1, rows[:2], {"velocity": rows[:2].double()}), ValueError, "state: expected torch.float32"),
        ):
            with pytest.raises(error, match=message):
                store.append(*arguments)
        assert path.read_bytes() == before
    with (
        ExpertStore(path) as store,
        pytest.raises(ValueError, match="the store is open for reading only"),
    ):
        store.append(range(2), 1, rows[:2], {"velocity": rows[:2]})


def test_one_writer_at_a_time_and_any_readers(filled):
    with ExpertStore(filled, writable=True), ExpertStore(filled) as reader:
        assert reader.completed == [EPOCHS] * E
        with pytest.raises(ValueError, match="expected a store that nobody writes to, another process does"):
            ExpertStore(filled, writable=True)
    ExpertStore(filled, writable=True).close()


def test_the_state_of_the_last_epoch_comes_back(path):
    rows = trajectories()
    with create(path, dtype="bf16", state=["theta", "velocity"]) as store:
        with pytest.raises(ValueError, match="expert 0 has no snapshot yet"):
            store.state(0)
        for epoch in range(EPOCHS + 1):
            store.append(range(E), epoch, rows[:, epoch], {"velocity": rows[:, epoch] - 1, "theta": rows[:, epoch]})
            with ExpertStore(path) as reader:
                for expert in range(E):
                    state = reader.state(expert)
                    assert list(state) == ["theta", "velocity"]
                    assert torch.equal(state["theta"], rows[expert, epoch])
                    assert torch.equal(state["velocity"], rows[expert, epoch] - 1)
        at = store._state_at(3, EPOCHS)
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    with ExpertStore(path) as store:
        with pytest.raises(ValueError, match="the state of expert 3 at epoch 3 is damaged"):
            store.state(3)
        assert torch.equal(store.row(3, 3), rows[3, 3].bfloat16().float())


APPENDED = 3 * (4 + 2 * 4) * NUMEL + 3 * 20  # bytes: rows, states and entries of three experts


@pytest.mark.parametrize(
    "left", [0, 1, 4 * NUMEL, 4 * NUMEL + 9, 30 * NUMEL, *range(APPENDED - 62, APPENDED, 7), APPENDED]
)
@pytest.mark.parametrize("epoch", [0, 2])
def test_an_append_cut_off_anywhere_is_wholly_there_or_not_at_all(path, monkeypatch, left, epoch):
    rows = trajectories()
    group = range(1, 4)
    whole = path.with_name("whole.store")
    for each in (path, whole):
        with create(each, state=["theta", "velocity"]) as store:
            fill(store, rows[:, :epoch], [range(1), group])
    theta = rows[1:4, epoch]
    with ExpertStore(whole, writable=True) as store:
        store.append(group, epoch, theta, vectors(store, theta))
    with ExpertStore(path, writable=True) as store, monkeypatch.context() as patch:
        Disk(patch, ExpertStore, left)
        if left < APPENDED:
            with pytest.raises(KilledError):
                store.append(group, epoch, theta, vectors(store, theta))
        else:
            store.append(group, epoch, theta, vectors(store, theta))
    with ExpertStore(path, writable=True) as store:
        there = [store.holds(expert, epoch) for expert in range(E)]
        assert there == [False] + [left == APPENDED] * 3
        store.verify()
        if left < APPENDED:
            assert store.completed == [max(epoch - 1, 0)] * E
            for expert in group if epoch else ():  # what it started from is still there
                assert torch.equal(store.state(expert)["velocity"], rows[expert, epoch - 1] + 2)
            store.append(group, epoch, theta, vectors(store, theta))
    assert path.read_bytes() == whole.read_bytes()


def test_entries_are_written_once_their_rows_are_on_the_disk(path, monkeypatch):
    theta = trajectories()[:, 0]
    with create(path, state=["velocity"]) as store:
        disk = Disk(monkeypatch, ExpertStore, 1 << 30)
        store.append(range(2), 0, theta[:2], {"velocity": theta[:2]})
        rows = [(at(expert, 0), 4 * NUMEL) for expert in range(2) for at in (store._row_at, store._state_at)]
        assert disk.log == [*rows, "sync", (store._table_at, 40), "sync"]


def test_entries_of_a_cut_off_append_never_stand_for_the_rows_of_another(path, monkeypatch):
    """Three experts interrupted between their entries; then the middle one alone, interrupted within its row."""
    rows = trajectories()[:, 0]
    with create(path) as store:
        for left, group in ((3 * 4 * NUMEL + 2 * 20, range(3)), (20 + 8, range(1, 2))):
            with monkeypatch.context() as patch:
                Disk(patch, ExpertStore, left)
                with pytest.raises(KilledError):
                    store.append(group, 0, rows[group.start : group.stop])
    with ExpertStore(path, writable=True) as store:
        store.append(range(2, 3), 0, rows[2:3])
        store.append(range(1), 0, rows[:1])
    with ExpertStore(path) as store:
        assert [store.holds(expert, 0) for expert in range(E)] == [True, False, True, False]


def test_a_creation_that_is_cut_off_leaves_the_old_file(filled, monkeypatch):
    whole = filled.read_bytes()

    def killed(source, target):
        raise KilledError

    monkeypatch.setattr(_atomic, "put_in_place", killed)
    with pytest.raises(KilledError):
        create(filled, overwrite=True)
    assert filled.read_bytes() == whole
    assert list(filled.parent.iterdir()) == [filled]


def test_trajectories_may_be_a_store_or_a_tensor(filled):
    with ExpertStore(filled) as store:
        in_file, in_memory = (as_trajectories(each, make_net(), EPOCHS) for each in (store, trajectories()))
        assert in_file.shape == in_memory.shape
        assert in_file.completed == in_memory.completed
        for place in ((0, 0, 1), (3, 1, 2)):
            for a, b in zip(in_file.segment(*place), in_memory.segment(*place), strict=True):
                assert torch.equal(a, b)
        with pytest.raises(ValueError, match="experts: expected at least 4 epochs of each, got 3"):
            as_trajectories(store, make_net(), 4)
        with pytest.raises(ValueError, match=r"got features\.0\.weight \[4, 1, 3, 3\]"):
            as_trajectories(store, make_net(5), 1)
