"""Expert trajectories in one file.

A `StoreFile`. All integers are little-endian::

    header    JSON: sizes, layout of the parameters, architecture, data set, training options
    table     [epochs + 1, experts] entries: checksums of a row and its state, the append that wrote them
    rows      [experts, epochs + 1, P] in float32 or bfloat16, each at a multiple of 4096 bytes
    states    [experts, 2, S, P] float32: what training continues from, odd and even epochs in turn

An append writes rows and states, syncs, and only then writes its table entries, which count once all of them are
there. So a process killed at any moment leaves a file that lacks at most the append in progress; and since an epoch's
state never overwrites that of the epoch before, what the append started from is still there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pydistill import _host
from pydistill._arguments import check_choice, check_whole
from pydistill._atomic import PathLike, check_replaceable, replacing
from pydistill._store_file import StoreFile, check_of, round_up
from pydistill.trajectory.flat import FlatModule
from pydistill.trajectory.replay_buffers import check_replay_buffers, read_replay_buffer, write_replay_buffer

__all__ = ["ExpertStore"]

_PAGE = 4096
_ENTRY = np.dtype([(name, "<u4") for name in ("row", "state", "first", "count", "check")])
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HEADER: dict[str, Callable[[Any], bool]] = {  # what each field has to be
    "experts": lambda value: isinstance(value, int) and value >= 1,
    "epochs": lambda value: isinstance(value, int) and value >= 1,
    "dtype": lambda value: value in _DTYPES,
    "parameters": lambda value: isinstance(value, list) and len(value) > 0,
    "state": lambda value: isinstance(value, list),
    "architecture": lambda value: isinstance(value, str),
    "dataset": lambda value: value is None or isinstance(value, str),
    "data_crc32": lambda value: value is None or isinstance(value, int),
    "options": lambda value: isinstance(value, dict),
}

StoreDtype = Literal["fp32", "bf16"]


class ExpertStore(StoreFile):
    """Trajectories of experts, ``[experts, epochs + 1, P]``; snapshot 0 is the initialisation.

    Reading touches only the rows asked for. A row's checksum is verified the first time that an
    object reads it, and those of all rows by `verify`. A store is a context manager that closes its file.

    Attributes:
        path: the file.
        epochs: epochs of every expert, once complete.
        dtype: "fp32" or "bf16", of the stored rows; what is read is float32 either way.
        parameters: names and shapes, in ``net.parameters()`` order, in which a row of P numbers is laid out.
        architecture: the network's repr.
        dataset: name of the data set that the experts were trained on, or None.
        data_crc32: checksum of its images and labels as `train_experts` takes it, or None.
        options: how they were trained, as JSON values.

    Args:
        path: a file that `create`, `train_experts` or `import_replay_buffers` made.
        writable: whether `append` may be called; one process at a time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, foreign, damaged in its header, of a newer version, or being written.
    """

    _kind, _magic, _version, _fields = "an expert store", b"PYDEXPRT", 1, _HEADER

    def _open(self) -> None:
        super()._open()
        grid = self.epochs + 1, len(self)
        self._table = self._read(self._table_at, math.prod(grid) * _ENTRY.itemsize).view(_ENTRY).reshape(grid)
        self._complete = _complete(self._table)
        self._verified: set[tuple[int, int]] = set()

    def _layout(self, start: int) -> None:
        header = self.header
        self.epochs, self.dtype = header["epochs"], header["dtype"]
        self.architecture, self.dataset, self.data_crc32 = (
            header[k] for k in ("architecture", "dataset", "data_crc32")
        )
        self.options, self.state_names = header["options"], tuple(header["state"])
        self.parameters = [(name, tuple(shape)) for name, shape in header["parameters"]]
        self._numel = sum(math.prod(shape) for _, shape in self.parameters)
        self._row_bytes = self._numel * _DTYPES[self.dtype].itemsize
        self._state_bytes = self._numel * 4 * len(self.state_names)
        self._table_at = _pages(start)
        self._rows_at = _pages(self._table_at + len(self) * (self.epochs + 1) * _ENTRY.itemsize)
        self._states_at = self._rows_at + len(self) * (self.epochs + 1) * _pages(self._row_bytes)
        self._size = self._states_at + len(self) * 2 * _pages(self._state_bytes)

    @classmethod
    def create(
        cls,
        path: PathLike,
        net: nn.Module,
        *,
        experts: int,
        epochs: int,
        dtype: StoreDtype = "fp32",
        state: Sequence[str] = (),
        dataset: str | None = None,
        data_crc32: int | None = None,
        options: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> ExpertStore:
        """Makes an empty store, open for `append`; all but its rows depends on the arguments alone.

        Args:
            path: the file to make.
            net: a network of the experts' structure; names and shapes of its parameters are kept.
            experts, epochs: at least one of each.
            dtype: "fp32", or "bf16" for half the size.
            state: names of the float32 vectors ``[P]`` that training needs to continue; each expert's are kept for the
                last two epochs.
            dataset, data_crc32, options: see the class; the options must be what JSON can hold.
            overwrite: whether a file at ``path`` may be replaced.

        Raises:
            FileExistsError: there is a file at ``path``, and ``overwrite`` is False.
            ValueError: a count below 1, or an unknown dtype.
        """
        path = Path(path)
        _check_counts(experts=experts, epochs=epochs)
        check_choice("dtype", dtype, _DTYPES)
        check_replaceable(path, overwrite)
        header = {
            "experts": experts,
            "epochs": epochs,
            "dtype": dtype,
            "parameters": _parameters_of(net),
            "state": list(state),
            "architecture": repr(FlatModule(net).net),
            "dataset": dataset,
            "data_crc32": data_crc32,
            "options": dict(options or {}),
        }
        cls._make(path, header)
        return cls(path, writable=True)

    def __len__(self) -> int:
        return self.header["experts"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(experts, epochs + 1, P)``."""
        return len(self), self.epochs + 1, self._numel

    @property
    def completed(self) -> list[int]:
        """How many complete epochs the store holds of each expert."""
        rows = np.logical_and.accumulate(self._complete, axis=0).sum(0)
        return (rows - 1).clip(min=0).tolist()

    def holds(self, expert: int, epoch: int) -> bool:
        """Whether the snapshot after ``epoch`` epochs (0: the initialisation) is there."""
        self._check_place(expert, epoch)
        return bool(self._complete[epoch, expert])

    def row(self, expert: int, epoch: int) -> Tensor:
        """The parameters of an expert after ``epoch`` epochs, float32 ``[P]``, a copy.

        Raises:
            IndexError: there is no such expert or epoch.
            ValueError: that epoch is not trained yet, or its row is damaged.
        """
        if not self.holds(expert, epoch):
            have = self.completed[expert]
            raise ValueError(f"{self.path}: expert {expert} has {have} whole epochs of {self.epochs}, not {epoch}")
        raw = self._read(self._row_at(expert, epoch), self._row_bytes)
        if (expert, epoch) not in self._verified:
            self._check_crc(raw, "row", expert, epoch)
            self._verified.add((expert, epoch))
        return torch.frombuffer(raw, dtype=_DTYPES[self.dtype]).float()

    def segment(self, expert: int, epoch: int, length: int) -> tuple[Tensor, Tensor]:
        """What a student starts from and should reach: the rows at ``epoch`` and ``epoch + length``.

        Nothing else of the file is read. Errors are those of `row`, and ValueError for a length below 1.
        """
        _check_counts(length=length)
        return self.row(expert, epoch), self.row(expert, epoch + length)

    def tensor(self) -> Tensor:
        """All of it in memory, float32 ``[experts, epochs + 1, P]``; errors as for `row`."""
        return torch.stack(
            [torch.stack([self.row(expert, t) for t in range(self.epochs + 1)]) for expert in range(len(self))]
        )

    def verify(self) -> None:
        """Reads every complete row; ValueError for the first whose checksum does not match its bytes."""
        for epoch, expert in np.argwhere(self._complete).tolist():
            raw = self._read(self._row_at(expert, epoch), self._row_bytes)
            self._check_crc(raw, "row", expert, epoch)

    def check_fits(self, net: nn.Module) -> None:
        """ValueError if the parameters of ``net`` are not laid out like the rows; says which parameter differs."""
        have, wanted = self.parameters, _parameters_of(net)
        for (name, shape), (net_name, net_shape) in zip(have, wanted, strict=False):
            if (name, shape) != (net_name, net_shape):
                raise ValueError(
                    f"{self.path}: expected experts of this net, whose parameter {net_name} is {list(net_shape)}; "
                    f"got {name} {list(shape)}"
                )
        if len(have) != len(wanted):
            raise ValueError(
                f"{self.path}: expected experts of this net, of {len(wanted)} parameters "
                f"up to {wanted[-1][0]}; got {len(have)} up to {have[-1][0]}"
            )

    def check_whitening(self, zca: bool) -> None:
        """Checks that imported experts may be matched on images that are ZCA-whitened (``zca``) or not.

        Raises:
            ValueError: they were imported as experts that saw the other kind.

        Warns:
            UserWarning: their import did not say what they saw.
        """
        saw, are = self.options.get("zca"), "ZCA-whitened" if zca else "not whitened"
        if saw is None and "replay_buffers" in self.options:
            warnings.warn(
                f"{self.path}: expected experts that saw images as these are, {are}; their import did not say whether "
                "they did: zca=True or zca=False there does (pydistill experts: --zca, --no-zca)",
                stacklevel=2,
            )
        elif saw not in (None, zca):
            raise ValueError(
                f"{self.path}: expected experts that saw images as these are, {are} (zca={zca}), got experts imported "
                f"with zca={saw}"
            )

    def append(self, experts: range, epoch: int, theta: Tensor, state: Mapping[str, Tensor] | None = None) -> None:
        """Adds the snapshot of some experts after ``epoch`` epochs; all or nothing, on disk when it returns.

        Args:
            experts: consecutive ones that all have the epoch before, and none of them this one.
            epoch: 0 for the initialisation.
            theta: floating ``[len(experts), P]``, rounded to the store's dtype.
            state: float32 ``[len(experts), P]`` for each of the store's ``state`` names.

        Raises:
            IndexError: there is no such expert or epoch.
            ValueError: the store is open for reading only, or an argument is not as described.
        """
        self._check_append(experts, epoch, theta, state or {})
        rows = theta.detach().to("cpu", _DTYPES[self.dtype]).contiguous()
        vectors = [(state or {})[name].detach().cpu() for name in self.state_names]
        states = torch.stack(vectors, 1).contiguous() if vectors else rows.new_empty(len(experts), 0)
        entries = np.zeros(len(experts), _ENTRY)
        entries["first"], entries["count"] = experts.start, len(experts)
        at = self._table_at + (epoch * len(self) + experts.start) * _ENTRY.itemsize
        here = slice(experts.start, experts.stop)
        if any(self._read(at, entries.nbytes)):  # left by an interrupted append: must not count for other rows
            self._write(at, bytes(entries.nbytes))
            self._sync()
        for i, expert in enumerate(experts):
            row, kept = _bytes_of(rows[i]), _bytes_of(states[i])
            entries["row"][i], entries["state"][i] = _host.crc32(row), _host.crc32(kept)
            self._write(self._row_at(expert, epoch), row)
            if self.state_names:
                self._write(self._state_at(expert, epoch), kept)
        self._sync()
        entries["check"] = check_of(entries)
        self._write(at, entries.tobytes())
        self._sync()
        self._table[epoch, here] = entries
        self._complete[epoch, here] = True

    def state(self, expert: int) -> dict[str, Tensor]:
        """The vectors, float32 ``[P]`` by name, that came with an expert's last complete epoch.

        Raises:
            ValueError: there is no complete epoch, or they are damaged.
        """
        epoch = self.completed[expert]
        if not self.holds(expert, epoch):
            raise ValueError(f"{self.path}: expert {expert} has no snapshot yet")
        raw = self._read(self._state_at(expert, epoch), self._state_bytes)
        self._check_crc(raw, "state", expert, epoch)
        if not self.state_names:
            return {}
        vectors = torch.frombuffer(raw, dtype=torch.float32).view(len(self.state_names), self._numel)
        return dict(zip(self.state_names, vectors, strict=True))

    @classmethod
    def import_replay_buffers(
        cls,
        paths: Sequence[PathLike],
        net: nn.Module,
        path: PathLike,
        *,
        dtype: StoreDtype = "fp32",
        dataset: str | None = None,
        zca: bool | None = None,
        overwrite: bool = False,
    ) -> ExpertStore:
        """Makes a store from the ``replay_buffer_*.pt`` files that the code of MTT, TESLA, FTD and others writes.

        Each file is a list of experts, an expert a list of epochs + 1 snapshots, a snapshot a list of float32 tensors
        in ``net.parameters()`` order. Files are read by ``torch.load(weights_only=True)``, one at a time, and all are
        checked before anything is written: the checksums of the archives (files of torch before 1.6 have none), every
        shape, that every number is finite and that every epoch changed something.

        Args:
            paths: the files, in the order of their experts.
            net: a network of the experts' structure.
            path: the store to make, atomically.
            dtype, dataset, overwrite: as for `create`.
            zca: whether the experts saw ZCA-whitened images (``buffer.py --zca``), which the files do not say and the
                store keeps; None: unknown.

        Returns:
            The store, open for reading.

        Raises:
            FileExistsError: there is a file at ``path``, and ``overwrite`` is False.
            FileNotFoundError: one of ``paths`` is not there.
            ValueError: a file is truncated, foreign or damaged, does not fit ``net``, or holds experts that cannot be
                matched; says where.
        """
        if isinstance(paths, str) or not isinstance(paths, Sequence):
            raise TypeError(f"paths: expected a sequence of paths, got {paths!r}")
        path, files = Path(path), [Path(each) for each in paths]
        if not files:
            raise ValueError("paths: expected a replay buffer or more, got none")
        check_replaceable(path, overwrite)
        found, snapshots = check_replay_buffers(files, _parameters_of(net))
        options: dict[str, Any] = {"replay_buffers": [each.name for each in files]}
        options |= {} if zca is None else {"zca": zca}
        with (
            replacing(path, "import") as partial,
            cls.create(
                partial,
                net,
                experts=found,
                epochs=snapshots - 1,
                dtype=dtype,
                dataset=dataset,
                options=options,
                overwrite=True,
            ) as store,
        ):
            first = 0
            for each in files:
                for epoch, theta in enumerate(read_replay_buffer(each)):
                    store.append(range(first, first + len(theta)), epoch, theta)
                first += len(theta)
        return cls(path)

    def export_replay_buffer(self, path: PathLike, experts: range | None = None, *, overwrite: bool = False) -> None:
        """Writes experts (all by default) as one ``replay_buffer_*.pt``, for code that reads those.

        Raises:
            FileExistsError: there is a file at ``path``, and ``overwrite`` is False.
            IndexError, ValueError: as for `row`.
        """
        path = Path(path)
        check_replaceable(path, overwrite)
        chosen = range(len(self)) if experts is None else experts
        rows = ((self.row(expert, epoch) for epoch in range(self.epochs + 1)) for expert in chosen)
        write_replay_buffer(path, rows, self.parameters)

    def __repr__(self) -> str:
        experts, snapshots, numel = self.shape
        return f"ExpertStore({str(self.path)!r}, [{experts}, {snapshots}, {numel}], {self.dtype})"

    def _row_at(self, expert: int, epoch: int) -> int:
        return self._rows_at + (expert * (self.epochs + 1) + epoch) * _pages(self._row_bytes)

    def _state_at(self, expert: int, epoch: int) -> int:
        return self._states_at + (2 * expert + epoch % 2) * _pages(self._state_bytes)

    def _check_place(self, expert: int, epoch: int) -> None:
        for name, number in (("expert", expert), ("epoch", epoch)):
            if not isinstance(number, (int, np.integer)):
                raise TypeError(f"{name}: expected a whole number, got {number!r}")
        if not 0 <= expert < len(self):
            raise IndexError(f"{self.path}: expert: expected one of 0..{len(self) - 1}, got {expert}")
        if not 0 <= epoch <= self.epochs:
            raise IndexError(f"{self.path}: epoch: expected one of 0..{self.epochs}, got {epoch}")

    def _check_crc(self, raw: np.ndarray, what: str, expert: int, epoch: int) -> None:
        wanted, found = int(self._table[epoch, expert][what]), _host.crc32(raw)
        if wanted != found:
            raise ValueError(
                f"{self.path}: the {what} of expert {expert} at epoch {epoch} is damaged: "
                f"expected crc32 {wanted}, got {found}"
            )

    def _check_append(self, experts: range, epoch: int, theta: Tensor, state: Mapping[str, Tensor]) -> None:
        self._check_writable()
        if not isinstance(experts, range) or experts.step != 1 or not len(experts):
            raise ValueError(f"experts: expected a range of consecutive ones, got {experts!r}")
        shape = (len(experts), self._numel)
        for name, tensor in {"theta": theta, **{f"state {name}": tensor for name, tensor in state.items()}}.items():
            if tensor.shape != shape or not tensor.is_floating_point():
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{name}: expected floating-point {list(shape)}, got {got}")
        if state.keys() != set(self.state_names):
            raise ValueError(f"state: expected {list(self.state_names)}, got {list(state)}")
        if any(tensor.dtype != torch.float32 for tensor in state.values()):
            raise ValueError(f"state: expected torch.float32, got {[tensor.dtype for tensor in state.values()]}")
        for expert in experts:
            if self.holds(expert, epoch):
                raise ValueError(f"{self.path}: expert {expert} has epoch {epoch} already")
            if epoch and not self.holds(expert, epoch - 1):
                raise ValueError(f"{self.path}: expert {expert} lacks epoch {epoch - 1}, {epoch} comes after it")


def _complete(table: np.ndarray) -> np.ndarray:
    """Which of the entries ``[epochs + 1, experts]`` count: intact ones of an append whose entries are all there."""
    experts = np.arange(table.shape[1])
    first = table["first"].astype(np.int64)
    end = first + table["count"]
    whole = (table["check"] == check_of(table)) & (first <= experts) & (experts < end) & (end <= len(experts))
    before = np.zeros((table.shape[0], len(experts) + 1), np.int64)
    whole.cumsum(1, out=before[:, 1:])
    first, end = (np.where(whole, each, 0) for each in (first, end))
    there = np.take_along_axis(before, end, 1) - np.take_along_axis(before, first, 1)
    return whole & (there == end - first)


def _pages(size: int) -> int:
    return round_up(size, _PAGE)


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


def _parameters_of(net: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    flat = FlatModule(net)
    return [(name, tuple(shape)) for name, shape in zip(flat.names, flat.shapes, strict=True)]


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        check_whole(name, value, 1)
