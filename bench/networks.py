"""`python -m bench.networks`: every network of torchvision and timm with BatchNorm, with and without what we attach.

Random weights and small images; logits, losses and what remains after removal are compared with the plain network's in
float64. Needs torchvision and timm; if torchvision's compiled part does not load with this torch, its Python part
suffices. A row per network goes to bench/results/networks.csv, smallest networks first, until the time is up; existing
rows from the same versions are kept.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pydistill import reference
from pydistill.nn import BNStatMatcher, freeze, frozen_convolutions

from . import ROOT

RESULTS = ROOT / "bench" / "results" / "networks.csv"
COLUMNS = [
    *("library", "source", "network", "parameters", "side", "batch_norms", "fused", "alone", "plain", "logits"),
    *("loss", "after_removal", "convolutions", "frozen", "frozen_logits", "note"),
]
SIDES = (64, 96, 128, 224, 256, 299, 448)
LARGEST = 60_000_000  # parameters
_kept: list[Any] = []


def import_torchvision() -> Any:
    """torchvision, without its operators if they cannot be loaded.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # torch drops the operators of a garbage-collected library
        return importlib.import_module("torchvision")


def names() -> Iterator[tuple[str, str, str]]:
    """Library, source file and name of every classification network."""
    import_torchvision()
    timm, models = importlib.import_module("timm"), importlib.import_module("torchvision.models")
    for name in models.list_models(module=models):
        yield "torchvision", models.get_model_builder(name).__module__.rpartition(".")[2], name
    for name in timm.list_models():
        yield "timm", timm.model_entrypoint(name).__module__.rpartition(".")[2], name


def build(library: str, name: str, **options: Any) -> nn.Module:
    """The network with random weights, in evaluation mode."""
    import_torchvision()
    if library == "timm":
        return importlib.import_module("timm").create_model(name, **options).eval()
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # slow, and overwritten
    return importlib.import_module("torchvision.models").get_model(name, weights=None, **options).eval()


def empty(library: str, name: str) -> nn.Module:
    """The network without its numbers, if it can be built that way."""
    try:
        with torch.device("meta"):
            return build(library, name)
    except (NotImplementedError, RuntimeError):  # it computes its sizes with tensors
        return build(library, name)


def batch_norms(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


def randomise(net: nn.Module) -> None:
    """Sets statistics, weights and biases for which every BatchNorm makes a difference."""
    with torch.no_grad():
        for bn in batch_norms(net):
            bn.running_mean.normal_(0, 0.1)
            bn.running_var.uniform_(0.5, 2)
            if bn.weight is not None:
                bn.weight.uniform_(0.5, 1)
                bn.bias.normal_(0, 0.1)


def hooked(net: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    """Output and loss, the repositories' way."""
    terms: list[Tensor] = []

    def hook(bn: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        terms.append(reference.bn_stat_match(inputs[0], bn.running_mean, bn.running_var))

    handles = [bn.register_forward_hook(hook) for bn in batch_norms(net)]
    try:
        return net(x), torch.stack(terms).sum()
    finally:
        for handle in handles:
            handle.remove()


def tensors(output: Any) -> list[Tensor]:
    """All tensors in an output of any form."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def apart(found: Any, truth: Any) -> float:
    """The largest difference of two outputs, relative to the largest number."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(tensors(found), tensors(truth), strict=True)]
    if not pairs or any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def things_set(net: nn.Module) -> list[tuple[Any, ...]]:
    """Everything set on a network's modules, for comparison before and after."""
    return [
        (name, [(key, id(value)) for key, value in vars(module).items()], *map(list, _hooks(module)))
        for name, module in net.named_modules()
    ]


def _hooks(module: nn.Module) -> Iterator[Any]:
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_with_kwargs):
        yield hooks.items()


def side_of(net: nn.Module) -> int:
    """The side of its images: the smallest of `SIDES` that it takes, or the one given by timm."""
    own = getattr(net, "default_cfg", {}).get("input_size", SIDES)[-1]
    errors = []
    for side in sorted({*SIDES, own}):
        try:
            with torch.no_grad():
                net(torch.randn(1, 3, side, side, dtype=next(net.parameters()).dtype))
        except Exception as error:  # whatever a network raises for images that are too small
            errors.append(error)
        else:
            return side
    raise errors[0]


def compared(library: str, name: str) -> dict[str, Any]:
    """The table row of a network."""
    torch.manual_seed(0)
    net = build(library, name).double()
    randomise(net)
    side = side_of(net)
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    row: dict[str, Any] = {"side": side}
    with torch.no_grad():
        plain, truth = net(x), hooked(net, x)
        before = things_set(net)
        with BNStatMatcher(net) as matcher:
            attached, loss = net(x), matcher.loss()
            report = list(matcher.report().values())
        same = things_set(net) == before and apart(net(x), plain) == 0
        frozen = freeze(net)
        kinds = list(frozen_convolutions(frozen).values())
        row |= {"batch_norms": len(report)}
        row |= {kind: sum(how.startswith(kind) for how in report) for kind in ("fused", "alone", "plain")}
        row |= {"logits": f"{apart(attached, plain):.1e}", "loss": f"{apart(loss, truth[1]):.1e}"}
        row |= {"after_removal": "same" if same else "other"}
        row |= {"convolutions": len(kinds), "frozen": kinds.count("frozen")}
        row |= {"frozen_logits": f"{apart(frozen(x), plain):.1e}"}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--again", action="store_true", help="measure also what the file has already")
    parser.add_argument("--only", nargs="*", help="names of networks; their rows are printed and not kept")
    options = parser.parse_args()
    if options.only:
        for library, _, name in names():
            if name in options.only:
                print(name, compared(library, name), flush=True)
        return
    start = time.monotonic()
    rows, there = [], {}
    if RESULTS.exists() and not options.again:
        with RESULTS.open(newline="") as file:
            there = {(row["library"], row["network"]): row for row in csv.DictReader(file) if not row["note"]}
    for library, source, name in names():
        if (library, name) in there:
            rows.append({**there[library, name], "parameters": int(there[library, name]["parameters"])})
            continue
        row = {"library": library, "source": source, "network": name}
        net = empty(library, name)
        row["parameters"] = sum(p.numel() for p in net.parameters())
        if not batch_norms(net):
            continue
        if row["parameters"] > LARGEST:
            row["note"] = "left out: large"
        rows.append(row)
    rows.sort(key=lambda row: row["parameters"])
    print(f"{len(rows)} networks, {time.monotonic() - start:.0f} s", flush=True)
    for i, row in enumerate(rows):
        if not row.get("note") and "side" not in row:
            if time.monotonic() - start > options.seconds:
                row["note"] = "left out: time"
            else:
                try:
                    row |= compared(row["library"], row["network"])
                except Exception as error:
                    row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}" if str(error) else "?"
                print(i, row, flush=True)
                gc.collect()
    rows.sort(key=lambda row: (row["library"], row["source"], row["network"]))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
