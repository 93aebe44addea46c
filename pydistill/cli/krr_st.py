"""``pydistill distill krr_st``: images and targets for pre-training, distilled without labels; a probe compares."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import rich.console
import rich.table
import tyro
from torch import Tensor

from pydistill.cli.console import Stop, append_line, as_json
from pydistill.cli.phases import Phases, keep_iterations, parse
from pydistill.cli.settings import DatasetName, load_for
from pydistill.data import write_atomic
from pydistill.methods.krr_st import KRRST, initial, krr_st, pretrain, target_features
from pydistill.methods.options import check_numbers
from pydistill.methods.self_supervised import barlow_twins
from pydistill.methods.unip import linear_probe
from pydistill.seeding import Stream, seeded_net


@dataclass(frozen=True)
class DistillKRRST:
    """Distil unlabelled images into a few images and targets on which a network is pre-trained, and probe its features.

    Options that are not given take the data set's preset. The folder --out receives target.safetensors (the
    self-supervised network), distilled.safetensors (images x and targets y), metrics.jsonl and results.json: test
    accuracies of a linear classifier on the features of networks pre-trained on the distilled images, on random real
    ones with the same kind of targets, and on nothing. A run that was cut off goes on with --resume.
    """

    config: tyro.conf.OmitArgPrefixes[KRRST]
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
    checkpoint_every: int = 50
    """Iterations between checkpoints."""

    zca = False  # what load_for asks for

    def stored(self) -> dict[str, Any]:
        """The options that say what a run makes."""
        config = asdict(self.config)
        return {"method": "krr_st", "dataset": self.dataset, "image_size": self.image_size, "config": config}


def run(argv: list[str], console: rich.console.Console, stop: Stop) -> None:
    """``argv``: what follows ``distill krr_st``."""
    options = parse(argv, "krr_st", DistillKRRST, KRRST.preset)
    check_numbers(options, flags=True, checkpoint_every=1)
    phases = Phases("krr_st", options, options.dataset, console, stop)
    began, folder, data, config = time.monotonic(), phases.folder, load_for(options), options.config
    phases.check_encoder(data)
    for name in ("images", "batch_real"):
        if len(data.train_images) < getattr(config, name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: expected at most {len(data.train_images)}, got {getattr(config, name)}")
    images, device = data.train_images, data.train_images.device
    target = seeded_net(
        lambda: config.encoder(data.channels, 1, data.image_size), config.seed, Stream.TARGET, device=device
    )
    with phases.opened(data.name):

        def train_target() -> dict[str, Tensor]:
            barlow_twins(target, images, epochs=config.target_epochs, seed=config.seed, on_step=stop)
            return target.state_dict()

        target.load_state_dict(phases.kept(folder / "target.safetensors", train_target))
        targets = target_features(target, images)
        distilled = phases.kept(
            folder / "distilled.safetensors", lambda: _distil(options, phases, folder, images, targets)
        )
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        sets = {
            "nothing": None,
            "random": initial(config, images, targets),
            "distilled": (distilled["x"].to(device), distilled["y"].to(device)),
        }

        def probe(net: Any) -> float:
            some = slice(config.probe_images)
            splits = images[some], data.train_labels[some], data.test_images, data.test_labels
            return linear_probe(net.eval(), *splits)

        results: dict[str, Any] = {}
        for name, pair in sets.items():
            results[name] = []
            for student in range(config.students):
                net = seeded_net(
                    lambda: config.encoder(data.channels, targets.shape[1], data.image_size),
                    *(config.seed, Stream.PRETRAINED, student),
                    device=device,
                )
                if pair is not None:
                    pretrain(net, *pair, config, stop)
                results[name].append(probe(net))
                stop()
        results["target"] = [probe(target)]
        write_atomic(folder / "results.json", as_json(results))
    console.print(_table(results, options))
    console.print(f"{time.monotonic() - began:.0f} s; distilled.safetensors is in {folder}")


def _distil(options: DistillKRRST, phases: Phases, folder: Path, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    path, metrics = folder / "checkpoint.safetensors", folder / "metrics.jsonl"
    state = phases.checkpoint(path)
    keep_iterations(metrics, int(state["iteration"]) if state else 0)

    def on_step(record: dict[str, Any], now: Callable[[], dict[str, Tensor]]) -> None:
        append_line(metrics, record)
        if phases.stop.requested or record["iteration"] % options.checkpoint_every == 0:
            phases.write_checkpoint(path, now())
        phases.stop()

    x, y = krr_st(options.config, images, targets, state=state, on_step=on_step)
    return {"x": x, "y": y}


def _table(results: dict[str, list[float]], options: DistillKRRST) -> rich.table.Table:
    table = rich.table.Table(title=f"{options.dataset}, pre-trained on {options.config.images} images without labels")
    table.add_column("pre-trained on")
    table.add_column("test accuracy of a linear classifier", justify="right")
    labels = {"nothing": "nothing", "random": "random real images", "distilled": "distilled images (krr_st)"}
    labels |= {"target": "all images (the target network)"}
    for name, label in labels.items():
        table.add_row(label, f"{100 * mean(results[name]):.1f} ± {100 * pstdev(results[name]):.1f} %")
    return table
