"""The repositories' replay buffers become stores and stores replay buffers, number for number; others are refused."""

import pytest
import torch

from pydistill import ExpertStore
from tests.trajectory.stores import EPOCHS, NUMEL, make_net, trajectories


def snapshots(rows):
    """Flat rows as kept by the repositories."""
    return [[[p.clone() for p in split(theta)] for theta in trajectory] for trajectory in rows]


def split(theta):
    shapes = [p.shape for p in make_net().parameters()]
    return [part.view(shape) for part, shape in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]


@pytest.fixture
def buffers(tmp_path):
    """Three experts in one file and two in another, the second in the format of old versions of torch."""
    rows, paths = trajectories(5), [tmp_path / "replay_buffer_0.pt", tmp_path / "replay_buffer_1.pt"]
    torch.save(snapshots(rows[:3]), paths[0])
    torch.save(snapshots(rows[3:]), paths[1], _use_new_zipfile_serialization=False)
    return paths, rows


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_replay_buffers_are_imported(buffers, path, dtype):
    paths, rows = buffers
    with ExpertStore.import_replay_buffers(paths, make_net(), path, dtype=dtype, dataset="bars") as store:
        assert (store.shape, store.completed, store.dataset) == ((5, EPOCHS + 1, NUMEL), [EPOCHS] * 5, "bars")
        assert store.options == {"replay_buffers": ["replay_buffer_0.pt", "replay_buffer_1.pt"]}
        assert torch.equal(store.tensor(), rows if dtype == "fp32" else rows.bfloat16().float())
    with pytest.raises(FileExistsError, match="it exists already"):
        ExpertStore.import_replay_buffers(paths, make_net(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="expert 0, snapshot 0: features"):
        ExpertStore.import_replay_buffers(paths, make_net(5), path, overwrite=True)
    assert path.read_bytes() == before
    ExpertStore.import_replay_buffers(paths[:1], make_net(), path, overwrite=True).close()
    assert len(ExpertStore(path)) == 3
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, *(each.name for each in paths)]


def test_an_export_is_what_was_imported(buffers, path, tmp_path):
    paths, rows = buffers
    exported = tmp_path / "exported.pt"
    with ExpertStore.import_replay_buffers(paths, make_net(), path) as store:
        store.export_replay_buffer(exported, range(1, 3))
        with pytest.raises(FileExistsError, match=r"exported\.pt: it exists already"):
            store.export_replay_buffer(exported)
        store.export_replay_buffer(exported, overwrite=True)
    found, expected = torch.load(exported, weights_only=True), snapshots(rows)
    assert [len(expert) for expert in found] == [EPOCHS + 1] * 5
    for expert, trajectory in zip(found, expected, strict=True):
        for ours, theirs in zip(expert, trajectory, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert len({p.untyped_storage().data_ptr() for p in ours}) == len(theirs)


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a replay buffer: a list of experts.*; got something else"),
        ({"a": torch.zeros(1)}, "got something else"),
        ([[torch.zeros(3)]], "got something else"),
        ([snapshots(trajectories(1))[0], snapshots(trajectories(1))[0][:2]], "expert 1: expected 4 snapshots .* got 2"),
        ([snapshots(trajectories(1))[0][:1]], "expected experts of at least 2 snapshots, got 1"),
        ([[split(trajectories()[0, 0])[:-1]] * 2], "expert 0, snapshot 0: expected 6 tensors as net has, got 5"),
        (
            [[split(trajectories()[0, 0]), split(trajectories()[0, 0].double())]],
            r"snapshot 1: features\.0\.weight: expected torch\.float32 \[4, 1, 3, 3\], got torch\.float64 \[4,",
        ),
        ([[[Evil()]]], "it asks for print, which may run code"),
    ],
)
def test_other_files_are_no_replay_buffers(tmp_path, path, capsys, content, message):
    source = tmp_path / "replay_buffer_0.pt"
    torch.save(content, source)
    with pytest.raises(ValueError, match=rf"replay_buffer_0\.pt: .*{message}"):
        ExpertStore.import_replay_buffers([source], make_net(), path)
    assert not path.exists()
    assert not capsys.readouterr().out


def test_a_flipped_bit_of_a_replay_buffer_is_not_another_number(buffers, path):
    paths, rows = buffers
    whole = bytearray(paths[0].read_bytes())
    whole[whole.find(rows[1, 2, :4].numpy().tobytes()) + 3] ^= 0x40
    paths[0].write_bytes(whole)
    with pytest.raises(ValueError, match=r"replay_buffer_0\.pt: .*; it is truncated or damaged \(Bad CRC-32"):
        ExpertStore.import_replay_buffers(paths, make_net(), path)
    assert not path.exists()


def test_experts_that_cannot_be_matched_are_named(tmp_path, path):
    """Non-finite numbers; epochs that changed nothing, as if each snapshot were the network itself."""
    source, wanted = tmp_path / "replay_buffer_0.pt", snapshots(trajectories(2))

    def refused(content):
        torch.save(content, source)
        with pytest.raises(ValueError, match=r"replay_buffer_0\.pt: expert 1") as found:
            ExpertStore.import_replay_buffers([source], make_net(), path)
        assert not path.exists()
        return str(found.value)

    first, second = wanted
    aliased, equal = [second[0]] * 4, [*second[:3], [p.clone() for p in second[2]]]
    message = "expert 1: expected an epoch to change its parameters, snapshots {} and {} are equal"
    assert refused([first, aliased]).endswith(
        message.format(0, 1) + " (they are the same tensors, which training on a CPU keeps changing: clone them)"
    )
    assert refused([first, equal]).endswith(message.format(2, 3))
    for value in (float("nan"), float("-inf")):
        second[2][-1][0] = value
        assert "expert 1, snapshot 2: classifier.bias: expected finite numbers" in refused(wanted)


def test_replay_buffers_that_cannot_be_read_are_named(buffers, path, tmp_path):
    paths, _ = buffers
    for each in paths:
        each.write_bytes(each.read_bytes()[:-500])
        with pytest.raises(ValueError, match=rf"{each.name}: expected a replay buffer: .*; it is truncated"):
            ExpertStore.import_replay_buffers([each], make_net(), path)
    with pytest.raises(FileNotFoundError, match=r"absent: expected a replay buffer: .*, found no file"):
        ExpertStore.import_replay_buffers([tmp_path / "absent"], make_net(), path)
    with pytest.raises(ValueError, match="paths: expected a replay buffer or more, got none"):
        ExpertStore.import_replay_buffers([], make_net(), path)
