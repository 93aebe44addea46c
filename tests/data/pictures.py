"""Made pictures in folders, as data sets lie on disk."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01", "n02")


def picture(seed: int, width: int = 20, height: int = 14) -> Image.Image:
    """Smooth colours and some noise, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8))


def make_folders(root: Path, counts: dict[str, int], classes=CLASSES, ending: str = "png", **sizes: int) -> Path:
    """``root/<part>/<class>/<number>.<ending>`` for each part with its number of pictures of each class."""
    for part, count in counts.items():
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                path = root / part / name / f"{number}.{ending}"
                picture(1000 * label + 10 * number + (part != "train"), **sizes).save(path)
    return root


def make_tiny_imagenet(root: Path) -> Path:
    """Tiny-ImageNet as it is unzipped, with two classes of three and one pictures."""
    for label, name in enumerate(CLASSES):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text("0\t0\t1\t1\n")
        for number in range(3):
            picture(1000 * label + 10 * number).save(root / "train" / name / "images" / f"{name}_{number}.JPEG")
    for part in ("val", "test"):
        (root / part / "images").mkdir(parents=True)
        for number in range(2):
            picture(7 + number).save(root / part / "images" / f"{part}_{number}.JPEG")
    lines = [f"val_{number}.JPEG\t{name}\t0\t0\t9\t9\n" for number, name in enumerate(CLASSES[::-1])]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(CLASSES))
    return root
