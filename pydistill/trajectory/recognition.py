"""Which modules are ConvNets of the student engine, and why another is none."""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from pydistill import _library
from pydistill.nn import Conv2d, InstanceNormReLUAvgPool
from pydistill.nn.student import Student
from pydistill.ops.convnet_step import ConvNetShape
from pydistill.trajectory.flat import FlatModule

# which element of what a forward returns are its logits; "any": it does not matter
Output = int | Literal["any"] | None

_MAX_DEPTH = 8  # of the compiled step
_RUN = ("forward", "embed", "_conv_forward", "__call__", "_call_impl", "__getattr__")  # what a call of a module runs


class Unrecognised(ValueError):
    """A network is none of the student engine's; the message says why."""


def trains_at_once(net: nn.Module, images: Tensor) -> bool:
    """Whether students like ``net`` train on ``images`` at once: then they share all but parameters and data."""
    return is_recognised(FlatModule(net), images.shape[-3:], images.dtype, images.device)


def convnet_shape(
    net: nn.Module,
    image: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    output: Output = None,
) -> ConvNetShape:
    """The shape of ``net`` as a ConvNet of the student engine on images ``[C, H, W]``.

    The family: ``features``, an ``nn.Sequential`` of blocks 3x3 convolution (padding 1, in the first block any), norm,
    activation, 2x2 pool, possibly run through `pydistill.nn.accelerate`; then ``classifier``, an ``nn.Linear`` of the
    flattened features. All blocks are alike but for their widths. Norms: ``GroupNorm``, ``InstanceNorm2d``,
    ``BatchNorm2d`` and ``LayerNorm([C, H, W])``, with affine parameters, or none; activations: ``ReLU``, ``LeakyReLU``,
    ``Sigmoid``, ``Tanh`` and ``SiLU``; pools: ``AvgPool2d(2)``, ``MaxPool2d(2)`` or none; convolutions with or without
    biases. On CUDA devices: ``GroupNorm(C, C)``, ReLU, average pool and biases. Nothing else may run: no
    hooks, also none on all modules, no forward set on an instance or in place of a class's own. The forward of a class
    that is not that of `pydistill.nn`'s students is run on a tensor without values, with whatever attributes and in
    whatever mode ``net`` has now: what it does has to be just that, whatever the images. One that looks at their values
    or at their number, beyond ``size(0)`` for a ``view``, is not followed.

    Args:
        net: as for `FlatModule`.
        image: ``(C, H, W)`` of the images.
        dtype, device: theirs.
        output: which element of the tuple that ``net`` returns are the logits; None: it returns them alone; "any": it
            does not matter.

    Raises:
        ValueError: it is none of the family; the message says why.
    """
    return recognised(FlatModule(net), image, dtype, device, output)


def is_recognised(
    flat: FlatModule, image: Sequence[int], dtype: torch.dtype, device: torch.device | str, output: Output = None
) -> bool:
    try:
        recognised(flat, image, dtype, device, output)
    except Unrecognised:
        return False
    return True


def recognised(
    flat: FlatModule, image: Sequence[int], dtype: torch.dtype, device: torch.device | str, output: Output = None
) -> ConvNetShape:
    """`convnet_shape` of the network that ``flat`` stands for."""
    device, net = torch.device(device), flat.net
    if device.type not in ("cpu", "cuda"):
        raise Unrecognised(f"there is no student engine on {device.type}")
    if device.type == "cuda" and (missing := _library.unavailable("cuda", device)):
        raise Unrecognised(f"the student engine's CUDA kernels cannot run: {missing}")
    if dtype not in (torch.float32, torch.float64):
        raise Unrecognised(f"the student engine computes in float32 and float64, not {dtype}")
    if missing := _library.unavailable_steps(device):
        raise Unrecognised(missing)
    features, classifier = net._modules.get("features"), net._modules.get("classifier")
    if type(features) is not nn.Sequential or type(classifier) is not nn.Linear:
        raise Unrecognised("it has no nn.Sequential `features` followed by an nn.Linear `classifier`")
    _check_unchanged(net, [features, *features, classifier])
    own = _Names(flat)
    blocks = _blocks([layer for layer in features if type(layer) is not nn.Identity], own)
    if not blocks or len(blocks) > _MAX_DEPTH:
        raise Unrecognised(f"it has {len(blocks)} blocks, not 1 to {_MAX_DEPTH}")
    if not own.has(classifier, "bias"):
        raise Unrecognised("its classifier has no bias")
    for i, block in enumerate(blocks):
        if block.kind != blocks[0].kind:
            raise Unrecognised(f"block {i} is {dict(block.kind)}, block 0 {dict(blocks[0].kind)}")
    kind = dict(blocks[0].kind)
    layers = [layer for block in blocks for layer in (block.conv, block.norm) if layer is not None]
    if flat.names != [name for layer in (*layers, classifier) for name in own.of(layer)]:
        raise Unrecognised("it has other parameters, or in another order, than its features and its classifier")
    kept = [b for block in blocks if isinstance(block.norm, nn.BatchNorm2d) for b in block.norm.buffers()]
    if {id(b) for b in net.buffers()} != {id(b) for b in kept}:
        raise Unrecognised("it has other buffers than those of BatchNorm")
    try:
        shape = ConvNetShape(
            *cast(tuple[int, int, int], tuple(image)),
            tuple(block.conv.out_channels for block in blocks),
            cast(int, blocks[0].conv.padding[0]),
            classifier.out_features,
            **kind,
        )
    except ValueError as error:
        raise Unrecognised(str(error)) from None
    if device.type == "cuda" and not (shape.fused and shape.biased):
        raise Unrecognised("its CUDA kernels are for GroupNorm(C, C), ReLU, average pool and convolutions with biases")
    channels = [image[0], *shape.widths]
    for i, (block, layer) in enumerate(zip(blocks, shape.layers, strict=True)):
        if block.conv.in_channels != channels[i]:
            raise Unrecognised(f"its convolution {i} takes {block.conv.in_channels} channels, not {channels[i]}")
        size = (layer.out_channels, layer.height, layer.width)
        if isinstance(block.norm, nn.LayerNorm) and block.norm.normalized_shape != size:
            its = list(block.norm.normalized_shape)
            raise Unrecognised(f"its norm {i} is one of {its}, where {list(image)} images give {list(size)}")
    if classifier.in_features != shape.features:
        raise Unrecognised(
            f"its classifier takes {classifier.in_features} features where {list(image)} images give {shape.features}"
        )
    _check_forward(net, image, dtype, device, output)
    return shape


class _Names:
    """Which parameters of ``flat``'s network are whose: a wrapper may have taken them away from their modules."""

    def __init__(self, flat: FlatModule):
        self.shapes = dict(zip(flat.names, flat.shapes, strict=True))
        self.paths = {id(module): path for path, module in flat.net.named_modules()}

    def has(self, layer: nn.Module, name: str) -> bool:
        return f"{self.paths[id(layer)]}.{name}" in self.shapes

    def shape(self, layer: nn.Module, name: str) -> tuple[int, ...]:
        return tuple(self.shapes[f"{self.paths[id(layer)]}.{name}"])

    def of(self, layer: nn.Module) -> list[str]:
        return [f"{self.paths[id(layer)]}.{name}" for name in ("weight", "bias") if self.has(layer, name)]


class _Block(NamedTuple):
    conv: nn.Conv2d
    norm: nn.Module | None
    kind: tuple[tuple[str, Any], ...]  # fields of `ConvNetShape`


_ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.SiLU: "swish"}
_POOLS = {nn.AvgPool2d: "avg", nn.MaxPool2d: "max"}
_NORMS = (nn.GroupNorm, nn.InstanceNorm2d, nn.BatchNorm2d, nn.LayerNorm, InstanceNormReLUAvgPool)


def _blocks(layers: list[nn.Module], own: _Names) -> list[_Block]:
    blocks: list[_Block] = []
    rest = collections.deque(layers)

    def take(*types: type) -> nn.Module | None:
        return rest.popleft() if rest and type(rest[0]) in types else None

    while rest:
        i, first = len(blocks), rest.popleft()
        if type(first) not in (nn.Conv2d, Conv2d):
            raise Unrecognised(f"block {i} begins with {type(first).__name__}, not Conv2d")
        conv = cast(nn.Conv2d, first)
        settings = (conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
        padding = conv.padding if i == 0 else (1, 1)
        if settings != ((3, 3), (1, 1), (1, 1), 1, "zeros") or conv.padding != padding or padding[0] != padding[-1]:
            raise Unrecognised(f"block {i} has {conv}, not a plain 3x3 convolution with padding 1")
        kind: dict[str, Any] = {"biased": own.has(conv, "bias")}
        norm = take(*_NORMS)
        try:
            kind |= _norm_kind(norm, conv.out_channels, own)
        except Unrecognised as reason:
            raise Unrecognised(f"block {i} has {norm}, {reason}") from None
        with_relu, with_pool = (norm.relu, norm.pool) if isinstance(norm, InstanceNormReLUAvgPool) else (False, False)
        if with_pool and not with_relu:
            raise Unrecognised(f"block {i} has {norm}, which pools before there is an activation")
        activation = None if with_relu else take(*_ACTIVATIONS)
        if activation is None and not with_relu:
            found = type(rest[0]).__name__ if rest else "nothing"
            raise Unrecognised(f"block {i} has {found} where a norm or an activation was expected")
        kind["activation"] = "relu" if with_relu else _ACTIVATIONS[type(activation)]
        if isinstance(activation, nn.LeakyReLU):
            kind["slope"] = activation.negative_slope
        pool = None if with_pool else take(*_POOLS)
        if pool is not None:
            sizes = [getattr(pool, name) for name in ("kernel_size", "stride", "padding")]
            sizes = [(v, v) if isinstance(v, int) else tuple(v) for v in sizes]
            others = (pool.ceil_mode, getattr(pool, "divisor_override", None), getattr(pool, "return_indices", False))
            if sizes != [(2, 2), (2, 2), (0, 0)] or others != (False, None, False) or getattr(pool, "dilation", 1) != 1:
                raise Unrecognised(f"block {i} has {pool}, not a 2x2 pool")
        kind["pool"] = "avg" if with_pool else "none" if pool is None else _POOLS[type(pool)]
        blocks.append(_Block(conv, norm, tuple(sorted(kind.items()))))
    return blocks


def _norm_kind(norm: nn.Module | None, channels: int, own: _Names) -> dict[str, Any]:
    """The fields of `ConvNetShape`."""
    if norm is None:
        return {"norm": "none"}
    if not (own.has(norm, "weight") and own.has(norm, "bias")):
        raise Unrecognised("which has no affine parameters")
    kind: dict[str, Any] = {"eps": norm.eps}
    if isinstance(norm, nn.LayerNorm):
        return kind | {"norm": "layer"}
    if own.shape(norm, "weight") != (channels,):
        raise Unrecognised(f"not one of {channels} channels")
    if isinstance(norm, nn.GroupNorm) and norm.num_groups != channels:
        return kind | {"norm": "group", "groups": norm.num_groups}
    if isinstance(norm, nn.BatchNorm2d):
        return kind | {"norm": "batch" if norm.training or norm.running_mean is None else "running"}
    if isinstance(norm, nn.InstanceNorm2d) and norm.track_running_stats:
        raise Unrecognised("which keeps running statistics")
    return kind | {"norm": "instance"}


def _check_unchanged(net: nn.Module, layers: list[nn.Module]) -> None:
    """Nothing runs beside or instead of the modules' own code."""
    if torch.nn.modules.module._has_any_global_hook():
        raise Unrecognised("there are hooks on all modules")
    for module in net.modules():
        kind = type(module).__name__
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise Unrecognised(f"{kind} has hooks")
        for name in _RUN:
            if name in vars(module):
                raise Unrecognised(f"{kind} has a {name} set on the instance")
    for cls in {type(layer) for layer in layers}:
        if replaced := _replaced(cls):
            raise Unrecognised(f"{cls.__name__}.{replaced} is not the class's own")


def _replaced(kind: type) -> str | None:
    """The method that somebody has put in the place of one that ``kind``, or a class below it, was written with."""
    for name in _RUN:
        owner = next((base for base in kind.__mro__ if name in vars(base)), None)
        if owner is None:
            continue
        method = vars(owner)[name]
        code, file = getattr(method, "__code__", None), getattr(sys.modules.get(owner.__module__), "__file__", None)
        if code is None or code.co_filename != file or not method.__qualname__.startswith(f"{owner.__qualname__}."):
            return name
    return None


def _check_forward(
    net: nn.Module, image: Sequence[int], dtype: torch.dtype, device: torch.device, output: Output
) -> None:
    """``net``'s forward is ``classifier(flatten(features(x)))``, with its logits at ``output``."""
    kind = type(net)
    if kind.forward is Student.forward and getattr(kind, "embed", None) is Student.embed and not _replaced(kind):
        if isinstance(output, int):
            raise Unrecognised(f"output={output} takes an element of a tuple")
        return
    run = _Run(net, device, dtype, image)
    before = [(module, dict(vars(module))) for module in net.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        try:
            with run.standing_in():
                returned = net(run.current)
        except Exception as error:  # whatever a forward does with what is hardly a tensor
            run.refused = run.refused or f"it cannot be followed: {str(error).partition(chr(10))[0]}"
        finally:
            changed = [module for module, own in before if _restored(module, own)]
    if changed:
        raise Unrecognised(f"{kind.__name__}.forward sets attributes of {type(changed[0]).__name__}")
    found = run.refused or run.left() or _returned_else(returned, run.current, output)
    if found is not None:
        raise Unrecognised(f"{kind.__name__}.forward computes something else than {_FORM}: {found}")


_FORM = "classifier(flatten(features(x)))"


def _restored(module: nn.Module, own: dict[str, Any]) -> bool:
    """Whether the module's attributes had changed; they are as they were."""
    now = vars(module)
    if now.keys() == own.keys() and all(now[name] is value for name, value in own.items()):
        return False
    now.clear()
    now.update(own)
    return True


class _Refused(Exception):
    """A forward did what the engine does not."""


class _Unknown:
    """A size that a forward may pass on, and not look at."""

    def __init__(self, run: _Run):
        self.run = run

    def _refuse(self, *_: Any) -> Any:
        self.run.refuse("it looks at the number of images, or at sizes of its features")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __index__ = __hash__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __truediv__ = __mod__ = _refuse


class _Followed(Tensor):
    """Images, or what a network has made of them: a tensor without values, and all that is done to it is seen."""

    run: _Run
    sizes: tuple[Any, ...]

    @classmethod
    def of(cls, run: _Run, sizes: tuple[Any, ...]) -> _Followed:
        made = torch.empty(0, device="meta", dtype=run.dtype).as_subclass(cls)
        made.run, made.sizes = run, sizes
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.flatten:
            return args[0].flatten(*args[1:], **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            name = getattr(func.__self__, "__name__", name)
        reason = f"it runs {name}"
        for each in args:
            for one in each if isinstance(each, (tuple, list)) else [each]:
                if isinstance(one, cls):
                    one.run.refuse(reason)
        raise _Refused(reason)

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.sizes

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self.run.dtype

    @property
    def device(self) -> torch.device:
        return self.run.device

    def dim(self) -> int:
        return len(self.sizes)

    def size(self, dim: int | None = None) -> Any:
        return self.sizes if dim is None else self.sizes[dim]

    def contiguous(self) -> _Followed:
        return self

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> _Followed:
        if start_dim != 1 or end_dim not in (-1, 3):
            self.run.refuse("it runs flatten from another dimension than the first")
        return self.run.flattened(self)

    def view(self, *size: Any) -> _Followed:
        rows, *columns = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
        features = self.run.classifier.in_features
        known = len(columns) == 1 and isinstance(columns[0], int)
        if not known or not (
            (rows is self.run.count and columns[0] in (-1, features))
            or (isinstance(rows, int) and rows == -1 and columns[0] == features)
        ):
            self.run.refuse("it runs view or reshape to other sizes than [N, features]")
        return self.run.flattened(self)

    reshape = view  # type: ignore[assignment]


class _Run:
    """A call of ``net`` with its features' layers and its classifier standing aside, who note that they were called."""

    def __init__(self, net: nn.Module, device: torch.device, dtype: torch.dtype, image: Sequence[int]):
        self.net, self.device, self.dtype, self.count = net, device, dtype, _Unknown(self)
        self.features, self.classifier = cast(nn.Sequential, net.features), cast(nn.Linear, net.classifier)
        self.layers = [layer for layer in self.features if type(layer) is not nn.Identity]
        self.awaited: list[nn.Module | str] = [*self.layers, "flatten", self.classifier]
        self.refused: str | None = None
        self.context = self._context()
        self.current = _Followed.of(self, (self.count, *image))

    def _context(self) -> tuple:
        enabled = torch.is_autocast_enabled(self.device.type)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), enabled

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        self.context = self._context()
        alone = [*self.layers, self.classifier]
        aside: list[tuple[nn.Module, list[nn.Module]]] = [
            (self.features, self.layers),
            *((layer, [layer]) for layer in alone),
        ]
        for module, made in aside:
            module.forward = lambda *args, _made=made, **kwargs: self.called(_made, *args, **kwargs)
        try:
            yield
        finally:
            for module, _ in aside:
                del module.forward

    def refuse(self, reason: str) -> None:
        self.refused = self.refused or reason
        raise _Refused(reason)

    def called(self, modules: list[Any], *args: Any, **kwargs: Any) -> _Followed:
        kind = "flatten" if modules == ["flatten"] else type(modules[-1]).__name__
        if self._context() != self.context:
            self.refuse("it changes the grad mode or autocast")
        if len(args) != 1 or kwargs or args[0] is not self.current:
            self.refuse(f"it runs {kind} on something else than what comes before")
        for module in modules:
            if not self.awaited or self.awaited[0] is not module:
                self.refuse(f"it runs {kind} out of turn")
            self.awaited.pop(0)
        self.current = _Followed.of(
            self, (self.count, *[_Unknown(self) for _ in range(3 if len(self.awaited) > 1 else 1)])
        )
        return self.current

    def flattened(self, x: _Followed) -> _Followed:
        if x is self.current and len(self.awaited) == 1:  # once more, of what is flat already
            return x
        return self.called(["flatten"], x)

    def left(self) -> str | None:
        if not self.awaited:
            return None
        names = [each if isinstance(each, str) else type(each).__name__ for each in self.awaited]
        return f"it does not run {', '.join(names)}"


def _returned_else(returned: Any, logits: _Followed, output: Output) -> str | None:
    if output == "any":
        return None
    if isinstance(returned, (tuple, list)):
        if output is None:
            return f"it returns a tuple of {len(returned)}, of which output=i takes an element"
        if -len(returned) <= output < len(returned) and returned[output] is logits:
            return None
    elif output is None and returned is logits:
        return None
    return "it returns its logits alone" if returned is logits else "it returns something else than its logits"
