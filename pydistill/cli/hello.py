"""``pydistill distill hello``: a projector in the place of stored soft labels, counted in bytes and accuracy."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import rich.console
import rich.table
import torch
import tyro
from torch import Tensor, nn

from pydistill.cli.console import Stop, append_line, as_json, keep_lines
from pydistill.cli.phases import Phases, parse
from pydistill.cli.settings import SETTINGS, DatasetName, convnet, load_for
from pydistill.data import Dataset, write_atomic
from pydistill.evaluate import accuracy, train_student
from pydistill.labels import Projector
from pydistill.methods.hello import (
    HeLlO,
    body_of,
    class_means,
    easiest,
    fit_projector,
    post_train,
    shrink_proof,
    stored_labels,
)
from pydistill.methods.self_supervised import barlow_twins
from pydistill.seeding import Stream, seeded_generator, seeded_net


@dataclass(frozen=True)
class DistillHeLlO:
    """Fit a label projector and train students on labels that it makes online; and others on stored and hard ones.

    Options that are not given take the data set's preset. The folder --out receives encoder.safetensors (in the place
    of a public one), teachers.safetensors, projector.safetensors, images.safetensors (x and y), labels.safetensors (the
    stored labels that it does without) and results.json with bytes and accuracies. A run that was cut off goes on with
    --resume at the phase that was under way.
    """

    config: tyro.conf.OmitArgPrefixes[HeLlO]
    """The method's hyper-parameters."""
    dataset: DatasetName = "digits"
    """What to distil; digits come with scikit-learn, the others are read from --root."""
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
        config = asdict(self.config)
        return {"method": "hello", "dataset": self.dataset, "image_size": self.image_size, "config": config}


def run(argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows ``distill hello``."""
    options = parse(argv, "hello", DistillHeLlO, HeLlO.preset)
    phases = Phases("hello", options, options.dataset, console, stop)
    began, folder, data = time.monotonic(), phases.folder, load_for(options)
    phases.check_encoder(data)
    least = int(data.train_labels.bincount(minlength=data.num_classes).min())
    if options.config.ipc > least:
        raise ValueError(f"--ipc: expected at most {least}, the images of the smallest class, got {options.config.ipc}")
    run = _Run(options, phases, folder, data)
    run.networks()  # refuses images that are too small
    with phases.opened(data.name):
        results = run.go()
        write_atomic(folder / "results.json", as_json(results))
    console.print(_table(results, options))
    console.print(f"{time.monotonic() - began:.0f} s; projector.safetensors is in {folder}")


class _Run:
    """Phase after phase, each of which its file takes the place of."""

    def __init__(self, options: DistillHeLlO, phases: Phases, folder: Path, data: Dataset):
        self.config, self.phases, self.folder, self.data = options.config, phases, folder, data
        self.setting, self.device = SETTINGS[options.dataset], data.train_images.device

    def networks(self) -> tuple[Any, list[nn.Module]]:
        """The encoder and the teachers, untrained."""
        config, data = self.config, self.data
        encoder = seeded_net(
            lambda: config.encoder(data.channels, data.image_size), config.seed, Stream.ENCODER, device=self.device
        )
        return encoder, [self._convnet(Stream.PROJECTED_TEACHER, number) for number in range(config.teachers)]

    def go(self) -> dict[str, Any]:
        config, data, folder, stop = self.config, self.data, self.folder, self.phases.stop
        kept = self.phases.kept
        encoder, teachers = self.networks()
        epochs = config.encoder_epochs

        def train_encoder() -> dict[str, Tensor]:
            barlow_twins(encoder, data.train_images, epochs=epochs, seed=config.seed, on_step=stop)
            return encoder.state_dict()

        encoder.load_state_dict(kept(folder / "encoder.safetensors", train_encoder))
        encoder.eval()
        found = kept(folder / "teachers.safetensors", lambda: self._train(teachers))
        for number, teacher in enumerate(teachers):
            teacher.load_state_dict({name: found[f"{number}.{name}"] for name in teacher.state_dict()})
            teacher.eval()
        projector = self._projector(encoder, teachers)

        def choose() -> dict[str, Tensor]:
            index = easiest(teachers, data.train_images, data.train_labels, config.ipc, data.num_classes)
            return {
                "x": shrink_proof(config, projector.encoder, data.train_images[index]),
                "y": data.train_labels[index],
            }

        chosen = kept(folder / "images.safetensors", choose)
        x, y = (chosen[name].to(self.device) for name in "xy")
        labels = kept(folder / "labels.safetensors", lambda: {"labels": stored_labels(config, teachers, x)})["labels"]
        stop()
        sources = {"hard": None, "stored": labels.to(self.device), "projector": projector}
        results: dict[str, Any] = {
            "bytes": {name: (folder / f"{file}.safetensors").stat().st_size for name, file in _FILES.items()},
            "teachers": [accuracy(teacher, data.test_images, data.test_labels) for teacher in teachers],
            "labeller": accuracy(projector, data.test_images, data.test_labels),
        }
        metrics = folder / "metrics.jsonl"
        keep_lines(metrics, lambda _: False)  # of students that are trained again
        for name, source in sources.items():
            results[name] = []
            for student in range(config.students):
                net = self._convnet(Stream.PROJECTED_STUDENT, student)
                post_train(config, net, x, y, source, student, stop)
                results[name].append(accuracy(net, data.test_images, data.test_labels))
                append_line(metrics, {"labels": name, "student": student, "accuracy": results[name][-1]})
        return results

    def _convnet(self, stream: Stream, number: int) -> nn.Module:
        setting, data = self.setting, self.data
        return seeded_net(
            lambda: convnet(data, setting.width, setting.depth), self.config.seed, stream, number, device=self.device
        )

    def _train(self, teachers: list[nn.Module]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for number, teacher in enumerate(teachers):
            train_student(
                *(teacher, self.data.train_images, self.data.train_labels),
                lr=self.setting.lr_student,
                epochs=self.config.teacher_epochs,
                batch_size=self.setting.batch_train,
                generator=seeded_generator(self.config.seed, Stream.PROJECTED_TEACHER_BATCHES, number),
                on_step=self.phases.stop,
            )
            state |= {f"{number}.{name}": value for name, value in teacher.state_dict().items()}
        return state

    def _projector(self, encoder: Any, teachers: list[nn.Module]) -> Projector:
        config, data, path = self.config, self.data, self.folder / "projector.safetensors"
        with torch.no_grad():
            features = torch.cat([encoder.pooled(part) for part in data.train_images.split(500)])
        projector = config.projector(encoder, class_means(features, data.train_labels, data.num_classes))
        if not path.exists():
            began = time.monotonic()
            fit_projector(config, projector, teachers, data.train_images, data.train_labels, self.phases.stop)
            projector.save(path)
            self.phases.console.print(f"projector: {time.monotonic() - began:.0f} s")
        return Projector.load(path, body_of(encoder))


_FILES = {"projector": "projector", "encoder": "encoder", "stored": "labels"}


def _table(results: dict[str, Any], options: DistillHeLlO) -> rich.table.Table:
    table = rich.table.Table(
        title=f"{options.dataset}, {options.config.ipc} images a class, soft labels made or stored"
    )
    table.add_column("labels")
    table.add_column("bytes of labels", justify="right")
    table.add_column(f"test accuracy of {options.config.students} students", justify="right")
    sizes = results["bytes"]
    both = f"{sizes['projector']:,} (and the encoder's {sizes['encoder']:,})"
    rows = {"hard": ("hard", "0"), "stored": ("stored, float16", f"{sizes['stored']:,}")}
    rows |= {"projector": ("by the projector, online (hello)", both)}
    for name, (label, count) in rows.items():
        table.add_row(label, count, f"{100 * mean(results[name]):.1f} ± {100 * pstdev(results[name]):.1f} %")
    table.add_row("the projector itself", "", f"{100 * results['labeller']:.1f} %")
    table.add_row("the teachers, each", "", f"{100 * mean(results['teachers']):.1f} %")
    return table
