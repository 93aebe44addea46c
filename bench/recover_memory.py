"""Peak memory of recovering 1,000 classes at 224 pixels, against the batch: `python -m bench.recover_memory [B ...]`.

Each row is a separate process, which runs `recover` of `pydistill.methods.decoupled.recover` (SRe2L on ResNet-18, two
iterations) on one batch of B images out of the 1,000 of one image per class, and prints a JSON line. ``peak`` is the
peak resident size above that of the process with its network, before the first step; ``set`` is what all images of
``ipc`` per class would take at once with Adam's two moments, which no process ever holds.
"""

from __future__ import annotations

import argparse
import json
import tempfile

import psutil
import torch

from pydistill.methods.decoupled.recover import recover
from pydistill.methods.decoupled.squeeze import Teacher
from pydistill.methods.decoupled.sre2l import SRe2L
from pydistill.nn import ResNet18

from .memory import in_process, peak_of

BATCHES = (4, 8, 16, 32)


def teacher(classes: int) -> Teacher:
    """A ResNet-18 at its initial weights: memory does not depend on them."""
    about = {"network": "resnet18", "width": 64, "depth": 3, "channels": 3, "image_size": 224, "dataset": "imagenet-1k"}
    names = tuple(map(str, range(classes)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return Teacher(ResNet18(classes).eval(), mean, std, names, about)


def measure(batch: int, classes: int) -> dict[str, int]:
    """Runs one batch in this process."""
    config = SRe2L(ipc=1, iterations=2, batch_size=batch, crop=0.08, flip=0.5, jitter=32)
    net = teacher(classes)
    share = -(-classes // batch)  # parts, of which this process makes one
    with tempfile.TemporaryDirectory() as folder:
        baseline = psutil.Process().memory_info().rss
        peak = peak_of(lambda: recover(config, [net], folder, rank=0, world=share))
    ipc = 10
    return {
        **{"batch": batch, "classes": classes, "peak": peak - baseline},
        "set": 3 * 4 * classes * ipc * 3 * 224 * 224,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--here", action="store_true", help="in this process, one batch")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.batch[0], options.classes)), flush=True)
        return
    for batch in options.batch:
        finished = in_process(__spec__.name, str(batch), "--classes", str(options.classes), "--here")
        finished.check_returncode()
        print(finished.stdout, end="", flush=True)


if __name__ == "__main__":
    main()
