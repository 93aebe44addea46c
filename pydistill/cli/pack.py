"""``pydistill pack``: an image set in one file that is quick to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import rich.console
import tyro

from pydistill.cli.console import Bars, Stop
from pydistill.data import open_sources, pack
from pydistill.data.reading import check_workers, cores

__all__ = ["Pack"]


@dataclass(frozen=True)
class Pack:
    """Resize and decode a set's pictures once, into a file that every --root takes in place of the folder.

    Interrupted, the same command continues.
    """

    source: tyro.conf.Positional[Path]
    """Folder of the data set's files: for image-folder with train and val (or test)."""
    file: tyro.conf.Positional[Path]
    """The file to make."""
    dataset: Literal["fashion-mnist", "cifar10", "cifar100", "image-folder", "tiny-imagenet", "imagenet-1k"] = (
        "image-folder"
    )
    """What the folder holds."""
    image_size: int | None = None
    """Size in pixels to which pictures are resized and cropped: by default 32, of the two ImageNets 64 and 224."""
    workers: int | None = None
    """Processes that decode; by default one for each core."""
    skip_damaged: bool = False
    """Leave out damaged pictures and count them."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self, console: rich.console.Console, stop: Stop) -> None:
        workers = cores() if self.workers is None else self.workers
        check_workers(workers)
        train, test = open_sources(self.dataset, self.source, image_size=self.image_size)
        with Bars(console) as bars:
            advance = bars.bar("pack", len(train) + len(test))

            def on_step(count: int) -> None:
                advance(count)
                stop()

            packed = pack(
                *(train, test, self.file),
                name=self.dataset,
                workers=workers,
                skip_damaged=self.skip_damaged,
                overwrite=self.overwrite,
                tell=console.print,
                on_step=on_step,
            )
        left_out = f", {packed.skipped} damaged ones left out" if packed.skipped else ""
        shape = "x".join(map(str, packed.shape))
        counts = f"{len(packed.train)} training and {len(packed.test)} test images"
        console.print(f"{counts} of {len(packed.class_names)} classes, {shape}{left_out} -> {self.file}")
