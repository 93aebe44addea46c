"""``pydistill distill unip``: a teacher learns from labels, a student from its attention, and a probe compares."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import torch.nn.functional as F
import tyro
from torch import Tensor

from pydistill import __version__
from pydistill.cli.console import Stop, append_line, as_json, keep_lines, progress_bars
from pydistill.cli.phases import Phases, parse
from pydistill.cli.settings import DatasetName, load_for
from pydistill.data import read_safetensors, write_atomic, write_safetensors
from pydistill.methods.unip import UNIP, choose_layer, distill_attention, fit, linear_probe
from pydistill.nn.vit import ViT
from pydistill.seeding import Stream, seeded_net

_STATE, _NETWORK = "UNIP state", "ViT"


@dataclass(frozen=True)
class DistillUNIP:
    """Distil the attention of a teacher that is trained on labels into a student that sees none, and test its features.

    Options that are not given take the data set's preset. The folder --out receives teacher.safetensors and
    student.safetensors, metrics.jsonl, and results.json with the test accuracies of a linear classifier on the features
    of the teacher, the student, and the student as it was before; a run that was cut off goes on with --resume.
    """

    config: tyro.conf.OmitArgPrefixes[UNIP]
    """The method's hyper-parameters."""
    dataset: DatasetName = "digits"
    """What to train on; digits come with scikit-learn, the others are read from --root."""
    root: Path | None = None
    """Folder of the data set's files; fashion-mnist looks in /usr/share/datasets/fashion-mnist by itself."""
    image_size: int | None = None
    """Pixels to which digits (16) and image folders (32) are resized."""
    out: Path | None = None
    """Folder for the results, new or empty; a new one under runs/ by default."""
    resume: bool = False
    """Go on with the run in --out, with the same options."""
    device: str = "auto"
    """Where to compute, as torch names it; auto is cuda where there is one."""

    zca = False  # what load_for asks for

    def stored(self) -> dict[str, Any]:
        """The options that say what a run makes."""
        return {"method": "unip", "dataset": self.dataset, "image_size": self.image_size, "config": asdict(self.config)}


def run(argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows ``distill unip``."""
    options = parse(argv, "unip", DistillUNIP, UNIP.preset)
    _Run(options, Phases("unip", options, options.dataset, console, stop)).go()


class _Run:
    """The folder of a run, and the phases that fill it: each goes on where its files end."""

    def __init__(self, options: DistillUNIP, phases: Phases):
        self.options, self.config, self.phases = options, options.config, phases
        self.folder, self.console, self.stop = phases.folder, phases.console, phases.stop
        self.metrics = self.folder / "metrics.jsonl"

    def go(self) -> None:
        began = time.monotonic()
        self.data = load_for(self.options)
        make_teacher, make_student = self.config.networks(
            self.data.channels, self.data.num_classes, self.data.image_size
        )
        device = self.data.train_images.device
        self.teacher, self.student, self.random = (
            seeded_net(make, self.config.seed, key, device=device)
            for make, key in (
                (make_teacher, Stream.UNIP_TEACHER),
                (make_student, Stream.UNIP_STUDENT),
                (make_student, Stream.UNIP_STUDENT),
            )
        )
        with self.phases.opened(self.data.name, self._read_states), progress_bars(self.console) as self.progress:
            done = {name: int(state["epoch"]) if state else 0 for name, state in self.states.items()}
            keep_lines(self.metrics, lambda record: record["epoch"] <= done.get(record["phase"], 0))
            self._train_teacher(self.states["teacher"])
            layer, nmi = choose_layer(self.teacher, self.data.train_images[:256], self.config.target_nmi)
            layer = layer if self.config.layer < 0 else self.config.layer
            self._train_student(layer, self.states["student"])
            results = self._results(layer, nmi)
        self.console.print(_table(results, self.options.dataset))
        self.console.print(f"{time.monotonic() - began:.0f} s; student.safetensors is in {self.folder}")

    def _read_states(self) -> None:
        files = {name: self.folder / f"{name}-state.safetensors" for name in ("teacher", "student")}
        self.states = {
            name: read_safetensors(path, _STATE)[0] if path.exists() else None for name, path in files.items()
        }

    def _on_epoch(self, phase: str, epochs: int, done: int) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
        task = self.progress.add_task(phase, total=epochs, completed=done, note="")

        def on_epoch(record: dict[str, Any], state: dict[str, Tensor]) -> None:
            append_line(self.metrics, {"phase": phase, **record})
            write_safetensors(self.folder / f"{phase}-state.safetensors", state, _STATE, self.options.stored())
            self.progress.update(task, completed=record["epoch"], note=f"loss {record['loss']:.4f}")
            self.stop()

        return on_epoch

    def _keep(self, name: str, net: ViT, **more: Any) -> None:
        config = {**self.options.stored(), "pydistill": __version__, **more}
        write_safetensors(self.folder / f"{name}.safetensors", net.state_dict(), _NETWORK, config)

    def _train_teacher(self, state: dict[str, Tensor] | None) -> None:
        images, labels, epochs = self.data.train_images, self.data.train_labels, self.config.teacher_epochs

        def loss(index: Tensor) -> Tensor:
            return F.cross_entropy(self.teacher(images[index]), labels[index])

        on_epoch = self._on_epoch("teacher", epochs, int(state["epoch"]) if state else 0)
        fit(
            *(self.teacher, loss, len(images)),
            **{"epochs": epochs, "state": state, "on_epoch": on_epoch},
            **self.config.optimisation(),
        )
        self._keep("teacher", self.teacher)

    def _train_student(self, layer: int, state: dict[str, Tensor] | None) -> None:
        epochs = self.config.epochs
        distill_attention(
            *(self.teacher, self.student, self.data.train_images),
            layer=layer,
            epochs=epochs,
            state=state,
            on_epoch=self._on_epoch("student", epochs, int(state["epoch"]) if state else 0),
            **self.config.optimisation(),
        )
        self._keep("student", self.student, layer=layer)

    def _results(self, layer: int, nmi: list[float]) -> dict[str, Any]:
        data = self.data
        splits = data.train_images, data.train_labels, data.test_images, data.test_labels
        results: dict[str, Any] = {"layer": layer, "nmi": nmi}
        for name in ("teacher", "student", "random"):
            results[name] = {"linear_probe": linear_probe(getattr(self, name), *splits)}
            self.stop()
        write_atomic(self.folder / "results.json", as_json(results))
        return results


def _table(results: dict[str, Any], dataset: str) -> rich.table.Table:
    table = rich.table.Table(title=f"{dataset}, attention of layer {results['layer']} distilled without labels")
    table.add_column("features of")
    table.add_column("test accuracy of a linear classifier", justify="right")
    labels = {"random": "the student at the start", "student": "the student (unip)", "teacher": "the teacher"}
    for name, label in labels.items():
        table.add_row(label, f"{100 * results[name]['linear_probe']:.1f} %")
    return table
