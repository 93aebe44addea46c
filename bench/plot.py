"""`python -m bench.plot`: the README's pictures from bench/results/*.csv, and a caption."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .run import LINE, RATIO, RESULTS

INK, FAINT, OURS, PEER = "#1f2328", "#8c959f", "#0b6e4f", "#57606a"
NAMES = {
    "eager-plain": "eager loop",
    "eager-accelerated": "eager loop, our ops dropped in",
    "tesla": "TESLA (first order)",
    "compiled": "torch.compile'd adjoint",
    "compiled-bf16": "torch.compile'd adjoint, bf16 autocast",
    "exact": "pydistill, exact",
    "exact-bf16": "pydistill, exact, bf16",
    "first_order": "pydistill, first order",
}
COLOURS = {"eager-plain": "#b3541e"}
COLOURS |= dict.fromkeys(("eager-accelerated", "exact", "exact-bf16", "first_order"), OURS)
SIZES = {"T": "inner steps T", "B": "images per step B", "E": "students E"}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": PEER,
    "ytick.color": PEER,
    "svg.hashsalt": "pydistill",
}

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw_memory(axes: Axes, rows: list[Row]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["metric"] != RATIO:
            lines.setdefault(row["provider"], []).append((int(row["x_value"]), float(row["median"])))
    for provider, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, color=COLOURS.get(provider, PEER), linewidth=2, marker="o", markersize=4, clip_on=False)
    axes.set_title("Peak memory of one outer gradient")
    axes.set_xlabel("inner steps T")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda mib, _: f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB")
    axes.yaxis.set_minor_locator(plt.NullLocator())
    axes.set_xlim(left=0)
    axes.set_xticks(sorted({x for points in lines.values() for x, _ in points if x >= 5 or x == 1}))
    axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
    axes.set_axisbelow(True)

    below = -1.0
    for provider, points in sorted(lines.items(), key=lambda line: max(line[1])[1]):
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(max(points)))
        y = below = max(y, below + 0.075)  # one line of text apart if two curves end close together
        colour = COLOURS.get(provider, PEER)
        weight = "bold" if colour == OURS else "normal"
        name = NAMES.get(provider, provider)
        axes.text(x + 0.03, y, name, transform=axes.transAxes, va="center", color=colour, weight=weight)


def draw_time(axes: Axes, rows: list[Row]) -> None:
    ratios = {row["provider"]: float(row["median"]) for row in rows if row["metric"] == RATIO}
    bars = sorted((row for row in rows if row["metric"] != RATIO), key=lambda row: -float(row["median"]))
    widest = max(float(row["p80"]) for row in bars)
    for y, row in enumerate(reversed(bars)):
        provider = row["provider"]
        median, low, high = (float(row[key]) for key in ("median", "p20", "p80"))
        colour = COLOURS.get(provider, PEER)
        axes.barh(y, median, height=0.34, color=colour)
        axes.plot((low, high), (y, y), color=INK, linewidth=1.2)
        weight = "bold" if colour == OURS else "normal"
        axes.text(0, y + 0.24, NAMES.get(provider, provider), va="bottom", color=colour, weight=weight)
        figure = f"{median:.2f} s" + (f"  {ratios[provider]:.1f}x" if provider in ratios else "")
        axes.text(max(median, high) + 0.02 * widest, y, figure, va="center")
    axes.set_title("Time per inner step")
    axes.set_xlim(0, 1.3 * widest)
    axes.set_ylim(-0.4, len(bars) - 0.2)
    axes.set_axis_off()


def draw_scaling(axes: Sequence[Axes], rows: list[Row]) -> None:
    """One panel per size: medians, their 20 % to 80 %, and the line whose R^2 is in the rows."""
    straight = {row["mode"]: float(row["median"]) for row in rows if row["metric"] == LINE}
    for panel, (mode, label) in zip(axes, SIZES.items(), strict=True):
        found = [row for row in rows if row["mode"] == mode and row["metric"] not in (LINE, RATIO)]
        points = sorted((float(r["x_value"]), *(float(r[key]) for key in ("median", "p20", "p80"))) for r in found)
        x, y, low, high = (np.array(values) for values in zip(*points, strict=True))
        panel.plot(x, np.polyval(np.polyfit(x, y, 1), x), color=FAINT, linewidth=1.2)
        panel.errorbar(x, y, (y - low, high - y), fmt="o", color=OURS, markersize=5, linewidth=1.2, clip_on=False)
        panel.set_title(f"R² = {straight[mode]:.4f}")
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.set_xticks(x)
        panel.grid(axis="y", color="#d8dee4", linewidth=0.8)
        panel.set_axisbelow(True)
    axes[0].set_ylabel("s per outer gradient")


def caption(memory: list[Row], step: list[Row]) -> str:
    """The picture's conditions, in words and from the rows themselves."""
    config = json.loads(step[0]["config"])
    size = config["image_size"]
    places = " / ".join(dict.fromkeys(row["machine"] for row in (step[0], memory[0])))
    versions = " / ".join(dict.fromkeys(row["versions"] for row in (step[0], memory[0])))
    commits = " / ".join(dict.fromkeys(row["commit"] for row in (step[0], memory[0])))
    return (
        f"One trajectory-matching gradient (images and learning rate) of ConvNet-D{config['depth']}-W{config['width']} "
        f"with instance norm, {config['batch']} images of {config['channels']}x{size}x{size}, {config['dtype']}. "
        "Left: peak resident memory above the process's own baseline, a subprocess per provider. "
        f"Right: T={config['steps']}, median of {config['repeats']} interleaved rounds, the dark line is 20 % to 80 %, "
        f"ratios to the eager loop. TESLA and first order compute a biased estimator, the others the exact gradient. "
        f"{places}, {config['threads']} threads; {versions}; commit {commits}."
    )


def save(figure: Figure, stem: Path) -> None:
    for kind in ("png", "svg"):
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(stem.with_suffix(f".{kind}"), dpi=200, facecolor="white", metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files, and of the picture")
    results: Path = parser.parse_args().results
    memory, step = read(results / "unroll_memory.csv"), read(results / "unroll_step.csv")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(9.2, 2.9))
        draw_scaling(panels, read(results / "unroll_scaling.csv"))
        figure.tight_layout(w_pad=2.5)
        save(figure, results / "scaling")
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.2), width_ratios=(1.15, 1))
        draw_memory(left, memory)
        draw_time(right, step)
        figure.tight_layout(w_pad=5)
        save(figure, results / "unroll")
    text = caption(memory, step)
    (results / "unroll_caption.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
