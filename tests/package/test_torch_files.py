"""Files saved by torch elsewhere: damaged or executable content is refused, what training scripts add is read."""

import argparse
import collections
import datetime
import os
import pathlib
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from pydistill._torch_files import read_state_dict, read_torch

TENSORS = [torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.arange(5)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.pth"


def test_a_flipped_bit_is_refused_or_changes_nothing(path):
    torch.save(TENSORS, path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        for mmap in (False, True):
            try:
                found = read_torch(path, "tensors", mmap=mmap)
            except ValueError:
                refused += 1
            else:
                assert all(torch.equal(a, b) for a, b in zip(found, TENSORS, strict=True))
    assert refused


def test_damage_is_named(path):
    torch.save(TENSORS, path)
    whole = bytearray(path.read_bytes())
    whole[whole.find(TENSORS[0].numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(whole)
    assert torch.load(path, weights_only=True)[0][0, 0] != TENSORS[0][0, 0], "torch looks at checksums now"
    with pytest.raises(ValueError, match=r"c\.pth: expected tensors; it is truncated or damaged \(Bad CRC-32.*data/0'"):
        read_torch(path, "tensors")
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"c\.pth: expected tensors; it is truncated or damaged"):
        read_torch(path, "tensors")
    path.write_bytes(b"tensors")
    with pytest.raises(ValueError, match=r"c\.pth: expected tensors; it is truncated, damaged or foreign"):
        read_torch(path, "tensors")
    with pytest.raises(FileNotFoundError, match="absent: expected tensors, found no file"):
        read_torch(path.with_name("absent"), "tensors")


@pytest.mark.parametrize("kind", ["legacy", "no checksums"])
def test_files_without_checksums_are_read(path, kind):
    torch.serialization.set_crc32_options(kind == "legacy")
    try:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind != "legacy")
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipfile.is_zipfile(path) == (kind != "legacy")
    for mmap in (False, True):
        assert all(torch.equal(a, b) for a, b in zip(read_torch(path, "tensors", mmap=mmap), TENSORS, strict=True))


EXTRAS = {
    "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("/a/b"), when=datetime.timedelta(3)),
    "config": types.SimpleNamespace(depth=3),
    "best": np.float64(69.7),
    "step": np.int64(7),
    "flag": np.bool_(True),
    "curve": np.arange(6, dtype=np.float32).reshape(2, 3),
    "order": np.arange(3, dtype=">i2"),
    "dtype": np.dtype("float16"),
    "saved": datetime.datetime(2024, 2, 3, 4, 5),
    "history": collections.defaultdict(list, loss=[1.0, 0.5]),
    "counts": collections.Counter("abca"),
    "options": collections.OrderedDict(a=(1, {2}, 1j, 2**70, b"x")),
    "device": torch.device("cpu"),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_scripts_keep_beside_the_weights_is_read(path, legacy):
    torch.save({"tensors": TENSORS, **EXTRAS}, path, _use_new_zipfile_serialization=not legacy)
    found = read_torch(path, "a checkpoint")
    for name, value in EXTRAS.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype.kind == value.dtype.kind
            assert np.array_equal(found[name], value)
        else:
            assert found[name] == value, name


def test_a_path_is_read_as_a_pure_one(path):
    torch.save({"out": path, "other": pathlib.PureWindowsPath("C:/a")}, path)
    found = read_torch(path, "paths")
    assert found == {"out": pathlib.PurePosixPath(path), "other": pathlib.PureWindowsPath("C:/a")}
    assert not isinstance(found["out"], pathlib.Path)


class Own:
    pass


class Runs:
    def __init__(self, what, *arguments):
        self.call = what, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("what", "arguments", "named"),
    [
        (os.system, ("touch {ran}",), "system"),
        (eval, ("open({ran!r}, 'w')",), "eval"),
        (getattr, (argparse, "sys"), None),
        (np.fromfile, ("{ran}",), "fromfile"),
        (pathlib.Path.touch, ("{ran}",), None),
    ],
)
def test_what_acts_is_refused_and_does_not_run(path, tmp_path, what, arguments, named):
    ran = tmp_path / "ran"
    arguments = [each.format(ran=str(ran)) if isinstance(each, str) else None for each in arguments]
    torch.save({"state_dict": {}, "args": argparse.Namespace(x=Runs(what, *arguments))}, path)
    with pytest.raises(ValueError, match=rf"c\.pth: expected a checkpoint; .*{named or 'it asks for'}"):
        read_torch(path, "a checkpoint")
    assert not ran.exists()


def test_what_the_caller_trusts_is_read_and_stays_trusted(path):
    torch.save({"a": Own(), "b": argparse.Namespace(c=1)}, path)
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(ValueError, match=r"it asks for \S*Own, which may run code"):
        read_torch(path, "a checkpoint")
    assert set(torch.serialization.get_safe_globals()) == before
    torch.serialization.add_safe_globals([Own, argparse.Namespace])
    try:
        assert isinstance(read_torch(path, "a checkpoint")["a"], Own)
        assert set(torch.serialization.get_safe_globals()) == before | {Own, argparse.Namespace}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


STATE = network().state_dict()
AVERAGED = torch.optim.swa_utils.AveragedModel(network()).state_dict()


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        *({key: STATE, "epoch": 3} for key in ("state_dict", "model_state_dict", "model", "net", "ema", "model_ema")),
        {"model": STATE, "model_ema": AVERAGED, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1)},
        {"ema": AVERAGED},
        {"net": {f"module.{name}": value for name, value in STATE.items()}, "acc": 95.3, "epoch": 199},
        {"state_dict": {f"model.{name}": value for name, value in STATE.items()}, "hyper_parameters": {"lr": 1}},
        {"model": {f"module._orig_mod.{name}": value for name, value in STATE.items()}},
        {"model": {f"_orig_mod.module.{name}": value for name, value in STATE.items()}},
        {name.replace("0.", "0._orig_mod."): value for name, value in STATE.items()},
        {"model": {"state_dict": STATE}},
    ],
)
def test_a_state_is_found_in_what_training_scripts_save(path, content):
    torch.save(content, path)
    found = read_state_dict(path, "weights")
    assert found.keys() == STATE.keys()
    averaged = content.keys() == {"ema"} and content["ema"] is AVERAGED
    network().load_state_dict(found)
    assert averaged or all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_a_key_chooses_among_several_states(path):
    other = {name: value + 1 for name, value in STATE.items()}
    torch.save({"model": STATE, "ema": {"state_dict": other}, "epoch": 3}, path)
    assert torch.equal(read_state_dict(path, "weights")["0.weight"], STATE["0.weight"])
    assert torch.equal(read_state_dict(path, "weights", "ema")["0.weight"], other["0.weight"])
    for key, message in (("teacher", "under 'teacher'; got a dict of model, ema, epoch"), ("epoch", "got a int")):
        with pytest.raises(ValueError, match=rf"c\.pth: expected weights.*{message}"):
            read_state_dict(path, "weights", key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "a state_dict; got a dict of epoch"),
        ([STATE], "a state_dict; got a list"),
        ({}, "a state_dict; got a dict of nothing"),
        ({"model": STATE | {"0.bias": torch.tensor([1.0, float("nan"), 0.0])}}, r"0\.bias: expected finite numbers"),
    ],
)
def test_what_is_no_state_is_named(path, content, message):
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"c\.pth: .*{message}"):
        read_state_dict(path, "weights")
