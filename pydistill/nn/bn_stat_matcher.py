"""Matching every BatchNorm of a model: what DeepInversion, SRe2L, CDA, DWA and INFER do in hooks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pydistill.nn import _bn_patterns
from pydistill.ops.bn_stat_match import check_frozen, statistics_forward, summed_loss
from pydistill.reference.bn_stat_match import Reduction


class BNStatMatcher:
    """Attach to ``model``: each forward then leaves the match of its BatchNorms' inputs for `loss` to sum.

    The model is frozen (``requires_grad_(False)``) and its BatchNorms run on `pydistill.bn_match_forward`, which reads
    the input once for output and statistics and keeps no copy of it. Where a module's own ``forward`` shows that a
    BatchNorm's output goes to a ReLU and nowhere else, or to a sum that does (torchvision's ``bn1`` and ``bn2``, an
    ``nn.Sequential``), that is done in the same pass, and so is a max pooling of square windows behind the ReLU of a
    BatchNorm alone (a ResNet's stem); `fused` tells where. Hooks on the modules so taken in would not be called: those
    that have some when the matcher is attached are left alone. Everything else about the model stays as it is, and
    `remove` restores it::

        model.eval()
        with BNStatMatcher(model, first=10.0) as matcher:  # or matcher.remove() at the end
            logits = model(images)
            loss = cross_entropy(logits, labels) + 0.01 * matcher.loss()

    A BatchNorm that is called twice in a forward contributes two terms with its weight each. `loss` belongs to the last
    forward: terms are dropped when ``model`` is called again. Nothing synchronises with the device.

    Args:
        model: any module with ``nn.BatchNorm1d``, ``2d`` or ``3d`` in evaluation mode.
        w_mean: weight of the means' distance.
        w_var: weight of the variances' distance (DWA's decoupled coefficient).
        first: weight of the first BatchNorm, in the order of ``model.modules()``; SRe2L has 10.
        layer_weights: a weight for each BatchNorm in that order, times ``first`` for the first; all 1 by default.
        reduction: "norm" or "sq", as of `pydistill.bn_stat_match`.
        unbiased: see there.
        fuse: whether to look for ReLUs and sums to take in. For that the forward of every module with a BatchNorm of
            its own is traced (`torch.fx`), and its graph runs in its place, as the forward is now; one that cannot be
            traced or leaves something on its module runs as it is. Effects elsewhere (printing, a list that is
            appended to) are not seen: False keeps them.

    Attributes:
        layers: the names of the BatchNorms, in order.
        fused: of those fused with what follows, by name, "relu", "add, relu" or "relu, max pool".

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no BatchNorm, one in training mode or without running statistics (named), another number of
            ``layer_weights``, or another matcher on the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        w_mean: float = 1.0,
        w_var: float = 1.0,
        first: float = 1.0,
        layer_weights: Sequence[float] | None = None,
        reduction: Reduction = "norm",
        unbiased: bool = False,
        fuse: bool = True,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        if not found:
            raise ValueError("model: expected at least one BatchNorm to match, got a model without any")
        for name, bn in found.items():
            try:
                check_frozen(bn)
            except ValueError as error:
                raise ValueError(f"model: {name or 'itself'}: {error}") from None
            if "forward" in vars(bn):
                raise ValueError(
                    f"model: {name or 'itself'}: its forward is replaced already; remove that matcher first"
                )
        if reduction not in ("norm", "sq"):
            raise ValueError(f"reduction: expected 'norm' or 'sq', got {reduction!r}")
        if layer_weights is not None and len(layer_weights) != len(found):
            raise ValueError(f"layer_weights: expected {len(found)}, one for each BatchNorm, got {len(layer_weights)}")
        weights = [1.0] * len(found) if layer_weights is None else [float(w) for w in layer_weights]
        weights[0] *= first

        self.layers = tuple(found)
        self.fused: dict[str, str] = {}
        self._weights = dict(zip(found.values(), weights, strict=True))
        self._options = (w_mean, w_var, reduction, unbiased)
        self._found: list[tuple[nn.Module, Tensor]] | None = None  # in the last forward; None before the first
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        self._replaced: list[nn.Module] = []
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        names = {bn: name for name, bn in found.items()}
        for module in model.modules() if fuse else ():
            self._fuse(module, names)
        for bn in found.values():
            self._replace(bn, partial(self._match, bn))
        self._hook = model.register_forward_pre_hook(self._start)

    def loss(self) -> Tensor:
        """The sum over the BatchNorms of the last forward, each with its weight.

        Raises:
            RuntimeError: the model has not been called yet, or called no BatchNorm.
        """
        if not self._found:
            raise RuntimeError("loss: expected a forward of the model with a BatchNorm in it, got none since attaching")
        w_mean, w_var, reduction, _ = self._options
        norms, statistics = zip(*self._found, strict=True)
        weights = [(self._weights[bn] * w_mean, self._weights[bn] * w_var) for bn in norms]
        return summed_loss(statistics, norms, weights, reduction)

    def remove(self) -> None:
        """Give the model back as it was, ``requires_grad`` included. A second call does nothing."""
        self._hook.remove()
        for module in self._replaced:
            del module.forward
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._replaced, self._frozen, self._found = [], [], None

    def __enter__(self) -> BNStatMatcher:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def _start(self, *_: Any) -> None:
        self._found = []

    def _replace(self, module: nn.Module, forward: Any) -> None:
        module.forward = forward
        self._replaced.append(module)

    def _fuse(self, module: nn.Module, names: dict[nn.Module, str]) -> None:
        found = _bn_patterns.fused(module, partial(_Fused, self))
        if found is not None:
            graph, fusions = found
            self._replace(module, graph.forward)
            self.fused |= {names[bn]: what for bn, what in fusions}

    def _match(
        self,
        bn: nn.Module,
        x: Tensor,
        relu: bool = False,
        residual: Tensor | None = None,
        pool: tuple[int, int, int] | None = None,
    ) -> Tensor:
        bn._check_input_dim(x)
        _, _, reduction, unbiased = self._options
        y, statistics = statistics_forward(x, bn, relu, residual, pool, reduction, unbiased)
        if self._found is None:
            self._found = []
        self._found.append((bn, statistics))
        return y


class _Fused(nn.Module):
    """A BatchNorm of a matched model with the ReLU behind it, and what is added between them or pools it."""

    def __init__(self, matcher: BNStatMatcher, bn: nn.Module, pool: tuple[int, int, int] | None):
        super().__init__()
        self.run = partial(matcher._match, bn)  # holds the BatchNorm without being its parent
        self.pool = pool

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        if summand is None:
            return self.run(x, relu=True, pool=self.pool)
        if summand.shape == x.shape and summand.dtype == x.dtype:
            return self.run(x, relu=True, residual=summand)
        return (self.run(x) + summand).relu()  # it is broadcast, or of another precision
