"""Soft labels: their losses, their bytes, and how fast they are read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from .. import ours
from ..case import Case, Check, Config, Entry, Medians, Point, check_float32, gate_float64, relative_error
from ..peers import label_losses, stored_labels


def _label_points(case: Case, config: Config) -> list[Point]:
    return [
        Point(
            config["batch"],
            partial(stored_labels.make_labels, config, workers=workers),
            tuple(case.providers),
            mode,
            per=config["batches"],
        )
        for mode, workers in (("no worker", 0), ("one worker", 1))
    ]


def _label_truths(case: Case, problem: stored_labels.Labels) -> Iterator[tuple[str, stored_labels.Trained]]:
    """For each provider, the loss against the distributions of its labels, in float64."""
    for name, entry in case.providers.items():
        if entry.mode:  # a form of the store; mode "" is the files
            labels = ours.densified_labels(problem, entry.mode)
        else:
            labels = [(problem.teacher(b).float() / problem.T).softmax(1) for b in range(problem.batches)]
        yield name, stored_labels.densified(problem, labels)


def _label_checks(
    case: Case, problem: stored_labels.Labels, outputs: dict[str, stored_labels.Trained]
) -> Iterator[Check]:
    """Within 1e-6 of the densified labels' loss; relative if that is above one, as is float32's rounding."""
    for name, truth in _label_truths(case, problem):
        if name not in outputs:
            continue
        output = outputs[name]
        double = problem.dtype == torch.float64
        errors = [
            abs(a - b) / (1.0 if double else max(1.0, b)) for a, b in zip(output.losses, truth.losses, strict=True)
        ]
        what = f"{problem.dtype} T={problem.T:g} loss".replace("torch.", "")
        yield Check(name, f"{what}, difference to that of the densified labels", max(errors), 1e-6)
        gradient = relative_error(output.d_logits, truth.d_logits)
        yield Check(name, f"T={problem.T:g} d_logits, relative error", gradient, 1e-4)


def _label_gate(case: Case, config: Config) -> Iterator[Check]:
    """Small: the loss and its gradient at several temperatures."""
    for T in config["gate"]["T"]:
        problem = stored_labels.make_labels({**config, **config["gate"]}, T=T, workers=0)
        outputs = {name: entry.prepare(problem)() for name, entry in case.providers.items()}
        yield from _label_checks(case, problem, outputs)


def _label_check(
    case: Case, point: Point, problem: stored_labels.Labels, outputs: dict[str, stored_labels.Trained]
) -> Iterator[Check]:
    yield from _label_checks(case, problem, outputs)


def _label_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    found = {(mode, provider): value for (mode, _, provider), value in medians.items()}
    for mode in ("no worker", "one worker"):
        speedup = found[mode, "torch.load"] / found[mode, "pydistill-topk8"]
        yield Check("pydistill-topk8", f"{mode}, labels a second over torch.load", speedup, 5.0, at_least=True)


SOFT_LABEL_READ = Case(
    name="soft_label_read",
    metric="time to read a batch of labels and take the loss and its gradient",
    unit="ms",
    x_name="batch",
    providers={
        "torch.load": Entry(stored_labels.prepare_load),
        "torch.load-compiled": Entry(partial(stored_labels.prepare_load, compiled=True)),
        "pydistill-fp16": Entry(partial(ours.stored_labels_epoch, form="fp16"), "fp16"),
        "pydistill-logits8": Entry(partial(ours.stored_labels_epoch, form="logits8"), "logits8"),
        "pydistill-topk": Entry(partial(ours.stored_labels_epoch, form="topk"), "topk"),
        "pydistill-topk8": Entry(partial(ours.stored_labels_epoch, form="topk8"), "topk8"),
    },
    full={"batch": 1024, "batches": 16, "classes": 1000, "k": 10, "T": 20.0, "record_bytes": 58}
    | {"gate": {"batch": 16, "batches": 2, "classes": 30, "T": (1.0, 4.0, 20.0)}},
    quick={"batch": 16, "batches": 2, "classes": 30, "k": 10, "T": 20.0, "record_bytes": 58, "gate": {"T": (1.0, 4.0)}},
    repeats=11,
    points=_label_points,
    gate=_label_gate,
    check=_label_check,
    must_show=_label_must_show,
)


def _bytes_points(case: Case, config: Config) -> list[Point]:
    """The files always have their records."""
    return [
        Point(config["k"], partial(stored_labels.make_labels, config, record_bytes=size, workers=0), providers, mode)
        for mode, size, providers in (
            ("labels", 0, tuple(name for name in case.providers if name != "torch.save")),
            ("labels and records", config["record_bytes"], tuple(case.providers)),
        )
    ]


def _bytes_gate(case: Case, config: Config) -> Iterator[Check]:
    """Small labels must still be right: the loss of the top-k forms at the measured size."""
    for T in config["gate"]["T"]:
        for dtype in (torch.float32, torch.float64):
            problem = stored_labels.make_labels(config, T=T, workers=0, dtype=dtype)
            forms = {name: entry.mode for name, entry in case.providers.items() if name.startswith("topk")}
            outputs = {name: ours.stored_labels_epoch(problem, form)() for name, form in forms.items()}
            yield from _label_checks(case, problem, outputs)


def _bytes_check(case: Case, point: Point, problem: stored_labels.Labels, outputs: dict[str, float]) -> Iterator[Check]:
    for name, output in outputs.items():
        least = 3 * problem.k + problem.record_bytes
        yield Check(name, f"{point.mode}, not fewer bytes than what is in them", output, least, at_least=True)


def _bytes_must_show(medians: Medians, config: Config) -> Iterator[Check]:
    found = {provider: value for (mode, _, provider), value in medians.items() if mode == "labels"}
    for name in ("topk", "topk8"):
        yield Check(name, "times smaller than fp16", 2 * config["classes"] / found[name], 40.0, at_least=True)


SOFT_LABEL_BYTES = Case(
    name="soft_label_bytes",
    metric="bytes a label, all of the file",
    unit="B",
    x_name="k",
    providers={
        "fp16": Entry(partial(ours.stored_bytes, form="fp16"), "fp16"),
        "torch.save": Entry(stored_labels.saved_bytes),
        "logits8": Entry(partial(ours.stored_bytes, form="logits8"), "logits8"),
        "topk": Entry(partial(ours.stored_bytes, form="topk"), "topk"),
        "topk8": Entry(partial(ours.stored_bytes, form="topk8"), "topk8"),
    },
    full={"batch": 1024, "batches": 8, "classes": 1000, "k": 10, "T": 20.0, "record_bytes": 58}
    | {"gate": {"T": (1.0, 4.0, 20.0)}},
    quick={"batch": 16, "batches": 2, "classes": 30, "k": 10, "T": 20.0, "record_bytes": 58, "gate": {"T": (1.0, 4.0)}},
    repeats=1,
    points=_bytes_points,
    gate=_bytes_gate,
    check=_bytes_check,
    must_show=_bytes_must_show,
    measure=lambda thunk: thunk(),
)


def _label_losses_points(case: Case, config: Config) -> list[Point]:
    return [Point(T, partial(label_losses.make_logits, config, T), tuple(case.providers)) for T in config["T"]]


def _label_losses_gate(loss: label_losses.Loss, case: Case, config: Config) -> Iterator[Check]:
    """Float64, an odd size, loss and gradient to 1e-10."""
    problem = label_losses.make_logits(config["gate"], T=3.0, dtype=torch.float64)
    truths = label_losses.prepare(problem, loss)()
    yield from gate_float64(case, problem, truths)


def _label_losses_check(
    loss: label_losses.Loss,
    case: Case,
    point: Point,
    problem: label_losses.Logits,
    outputs: dict[str, label_losses.Solved],
) -> Iterator[Check]:
    """Against plain torch in float64: 1e-6 in L2, or twice plain torch's own fp32 error."""
    truths = label_losses.prepare(problem.double(), loss)()
    yield from check_float32(case, outputs, truths, 1e-6, f"T={point.x}, ")


def _label_losses_must_show(bounds: dict[str, float], medians: Medians, config: Config) -> Iterator[Check]:
    """``bounds``: by peer, at every temperature."""
    for T in config["T"]:
        found = {provider: value for (_, x, provider), value in medians.items() if x == T}
        for peer, bound in bounds.items():
            if peer in found and "pydistill" in found:
                ratio = found[peer] / found["pydistill"]
                yield Check("pydistill", f"T={T}, speed-up over {peer}", ratio, bound, at_least=True)


def _label_losses_case(
    name: str, baseline: str, peer: label_losses.Loss, loss: label_losses.Loss, bounds: dict[str, float]
) -> Case:
    return Case(
        name=name,
        metric="time of loss and gradient",
        unit="ms",
        x_name="temperature",
        providers={
            baseline: Entry(partial(label_losses.prepare, loss=peer)),
            "compiled": Entry(partial(label_losses.prepare_compiled, loss=peer)),
            "pydistill": Entry(partial(label_losses.prepare, loss=loss)),
        },
        full={"rows": 1024, "classes": 1000, "k": 10, "T": (4.0, 20.0), "gate": {"rows": 7, "classes": 37, "k": 3}},
        quick={"rows": 8, "classes": 37, "k": 3, "T": (4.0,), "gate": {"rows": 7, "classes": 37, "k": 3}},
        repeats=25,
        points=_label_losses_points,
        gate=partial(_label_losses_gate, peer),
        check=partial(_label_losses_check, peer),
        must_show=partial(_label_losses_must_show, bounds),
    )


KD_DIVERGENCE = _label_losses_case(
    "kd_divergence", "eager", label_losses.dense, ours.kd_divergence, {"eager": 1.5, "compiled": 1.0}
)


SPARSE_LABEL_LOSS = _label_losses_case(
    "sparse_label_loss", "densify", label_losses.densified, ours.sparse_label_loss, {"densify": 3.0, "compiled": 1.0}
)
