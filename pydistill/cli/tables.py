"""How the commands print a run's results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import rich.table

from pydistill.cli.console import accuracy_table, add_row, percentage
from pydistill.methods.decoupled.hello import HeLlOJob
from pydistill.methods.distilling import DistillJob
from pydistill.methods.matching.krr_st import KRRSTJob
from pydistill.methods.method import Job
from pydistill.methods.networks.unip import UNIPJob
from pydistill.methods.selection.picking import PickJob

__all__ = ["table_of"]


@singledispatch
def table_of(job: Job) -> Sequence[Any]:
    """A job's results as shown on the console: tables, or words before the last line."""
    shown = {name: value for name, value in job.results.items() if not isinstance(value, dict | None)}
    if isinstance(accuracy := shown.get("accuracy"), float):
        shown["accuracy"] = [accuracy]
    if "accuracy" in shown:
        shown["accuracy"] = percentage(shown["accuracy"])
    return [f"{name} {value}; " for name, value in shown.items()]


def _accuracies(title: str, job: Any, labels: dict[str, str]) -> list[rich.table.Table]:
    table = accuracy_table(title, "training set", job.inputs.students)
    for name, label in labels.items():
        if row := job.results.get(name):
            add_row(table, label, row["images"], row["epochs"], row["lr"], row["accuracies"])
    return [table]


def _title(job: Any) -> str:
    inputs = job.inputs
    return f"{inputs.dataset}, ipc {job.config.ipc}, ConvNet-D{inputs.depth}-W{inputs.width}"


@table_of.register
def _(job: DistillJob) -> Sequence[Any]:
    labels = {"random": "random real", "distilled": f"distilled ({job.config.name})", "whole": "whole set"}
    return _accuracies(_title(job), job, labels)


@table_of.register
def _(job: PickJob) -> Sequence[Any]:
    labels = {"random": "random real", "picked": f"picked ({job.config.name})"}
    return _accuracies(_title(job), job, labels) if job.inputs.students else []


def _probes(title: str, rows: str, found: dict[str, str]) -> list[rich.table.Table]:
    table = rich.table.Table(title=title)
    table.add_column(rows)
    table.add_column("test accuracy of a linear classifier", justify="right")
    for label, accuracy in found.items():
        table.add_row(label, accuracy)
    return [table]


@table_of.register
def _(job: UNIPJob) -> Sequence[Any]:
    labels = {"random": "the student at the start", "student": "the student (unip)", "teacher": "the teacher"}
    title = f"{job.inputs.dataset}, attention of layer {job.results['layer']} distilled without labels"
    found = {label: percentage([job.results[name]["linear_probe"]]) for name, label in labels.items()}
    return _probes(title, "features of", found)


@table_of.register
def _(job: KRRSTJob) -> Sequence[Any]:
    labels = {"nothing": "nothing", "random": "random real images", "distilled": "distilled images (krr_st)"}
    labels |= {"target": "all images (the target network)"}
    title = f"{job.inputs.dataset}, pre-trained on {job.config.images} images without labels"
    found = {label: percentage(job.results[name], deviation=True) for name, label in labels.items()}
    return _probes(title, "pre-trained on", found)


@table_of.register
def _(job: HeLlOJob) -> Sequence[Any]:
    config, results = job.config, job.results
    table = rich.table.Table(title=f"{job.inputs.dataset}, {config.ipc} images a class, soft labels made or stored")
    table.add_column("labels")
    table.add_column("bytes of labels", justify="right")
    table.add_column(f"test accuracy of {config.students} students", justify="right")
    sizes = results["bytes"]
    both = f"{sizes['projector']:,} (and the encoder's {sizes['encoder']:,})"
    rows = {"hard": ("hard", "0"), "stored": ("stored, float16", f"{sizes['stored']:,}")}
    rows |= {"projector": ("by the projector, online (hello)", both)}
    for name, (label, count) in rows.items():
        table.add_row(label, count, percentage(results[name], deviation=True))
    table.add_row("the projector itself", "", percentage([results["labeller"]]))
    table.add_row("the teachers, each", "", percentage(results["teachers"], deviation=False))
    return [table]
