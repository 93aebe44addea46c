"""Which modules are ConvNets of the student engine, and why another is none."""

from __future__ import annotations

import collections
import operator
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from pydistill import _library
from pydistill.nn import Conv2d, InstanceNormReLUAvgPool
from pydistill.nn.student import Student
from pydistill.ops.convnet_step import ConvNetShape
from pydistill.trajectory.flat import FlatModule

Output = (
    int | Literal["any"] | None
)  # which element of what a forward returns are its logits; "any": it does not matter

_MAX_DEPTH = 8  # of the compiled step
_RUN = ("forward", "embed", "_conv_forward", "__call__", "_call_impl", "__getattr__")  # what a call of a module runs


def trains_at_once(net: nn.Module, images: Tensor) -> bool:
    """Whether students like ``net`` train on ``images`` at once: then they share all but parameters and data."""
    return isinstance(convnet_shape(net, images.shape[-3:], images.dtype, images.device), ConvNetShape)


def convnet_shape(
    net: nn.Module,
    image: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    output: Output = None,
) -> ConvNetShape | str:
    """The shape of ``net`` as a ConvNet of the student engine on images ``[C, H, W]``, or why it is none.

    The family: ``features``, an ``nn.Sequential`` of blocks 3x3 convolution (padding 1, in the first block any), norm,
    activation, 2x2 pool, possibly run through `pydistill.nn.accelerate`; then ``classifier``, an ``nn.Linear`` of the
    flattened features. All blocks are alike but for their widths. Norms: ``GroupNorm``, ``InstanceNorm2d``,
    ``BatchNorm2d`` and ``LayerNorm([C, H, W])``, with affine parameters, or none; activations: ``ReLU``, ``LeakyReLU``,
    ``Sigmoid``, ``Tanh`` and ``SiLU``; pools: ``AvgPool2d(2)``, ``MaxPool2d(2)`` or none; convolutions with or without
    biases. On CUDA devices: ``GroupNorm(C, C)``, ReLU, average pool and biases. Nothing else may run: no
    hooks, also none on all modules, no forward set on an instance or in place of a class's own. The forward of a class
    that is not `pydistill.nn.Student`'s is followed by ``torch.fx``, with whatever attributes and in whatever mode
    ``net`` has now: what it does has to be just that, whatever the images. A forward that looks at its images' shape or
    values, beyond ``size(0)`` for a ``view``, cannot be followed.

    Args:
        net: as for `FlatModule`.
        image: ``(C, H, W)`` of the images.
        dtype, device: theirs.
        output: which element of the tuple that ``net`` returns are the logits; None: it returns them alone; "any": it
            does not matter.
    """
    return recognised(FlatModule(net), image, dtype, device, output)


def recognised(
    flat: FlatModule, image: Sequence[int], dtype: torch.dtype, device: torch.device | str, output: Output = None
) -> ConvNetShape | str:
    """`convnet_shape` of the network that ``flat`` stands for."""
    device, net = torch.device(device), flat.net
    if device.type not in ("cpu", "cuda"):
        return f"there is no student engine on {device.type}"
    if device.type == "cuda" and (missing := _library.unavailable("cuda")):
        return f"the student engine's CUDA kernels cannot run: {missing}"
    if dtype not in (torch.float32, torch.float64):
        return f"the student engine computes in float32 and float64, not {dtype}"
    features, classifier = net._modules.get("features"), net._modules.get("classifier")
    if type(features) is not nn.Sequential or type(classifier) is not nn.Linear:
        return "it has no nn.Sequential `features` followed by an nn.Linear `classifier`"
    if changed := _changed(net, [features, *features, classifier]):
        return changed
    own = _Names(flat)
    blocks = _blocks([layer for layer in features if type(layer) is not nn.Identity], own)
    if isinstance(blocks, str):
        return blocks
    if not blocks or len(blocks) > _MAX_DEPTH:
        return f"it has {len(blocks)} blocks, not 1 to {_MAX_DEPTH}"
    if not own.has(classifier, "bias"):
        return "its classifier has no bias"
    for i, block in enumerate(blocks):
        if block.kind != blocks[0].kind:
            return f"block {i} is {dict(block.kind)}, block 0 {dict(blocks[0].kind)}"
    kind = dict(blocks[0].kind)
    layers = [layer for block in blocks for layer in (block.conv, block.norm) if layer is not None]
    if flat.names != [name for layer in (*layers, classifier) for name in own.of(layer)]:
        return "it has other parameters, or in another order, than its features and its classifier"
    kept = [b for block in blocks if isinstance(block.norm, nn.BatchNorm2d) for b in block.norm.buffers()]
    if {id(b) for b in net.buffers()} != {id(b) for b in kept}:
        return "it has other buffers than those of BatchNorm"
    try:
        shape = ConvNetShape(
            *image,
            tuple(block.conv.out_channels for block in blocks),
            blocks[0].conv.padding[0],
            classifier.out_features,
            **kind,
        )
    except ValueError as error:
        return str(error)
    if device.type == "cuda" and not (shape.fused and shape.biased):
        return "its CUDA kernels are for GroupNorm(C, C), ReLU, average pool and convolutions with biases"
    channels = [image[0], *shape.widths]
    for i, (block, layer) in enumerate(zip(blocks, shape.layers, strict=True)):
        if block.conv.in_channels != channels[i]:
            return f"its convolution {i} takes {block.conv.in_channels} channels, not {channels[i]}"
        size = (layer.out_channels, layer.height, layer.width)
        if isinstance(block.norm, nn.LayerNorm) and block.norm.normalized_shape != size:
            its = list(block.norm.normalized_shape)
            return f"its norm {i} is one of {its}, where {list(image)} images give {list(size)}"
    if classifier.in_features != shape.features:
        return (
            f"its classifier takes {classifier.in_features} features where {list(image)} images give {shape.features}"
        )
    return _other_forward(net, device, output) or shape


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


def _blocks(layers: list[nn.Module], own: _Names) -> list[_Block] | str:
    blocks: list[_Block] = []
    rest = collections.deque(layers)

    def take(*types: type) -> nn.Module | None:
        return rest.popleft() if rest and type(rest[0]) in types else None

    while rest:
        i, conv = len(blocks), rest.popleft()
        if type(conv) not in (nn.Conv2d, Conv2d):
            return f"block {i} begins with {type(conv).__name__}, not Conv2d"
        settings = (conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
        padding = conv.padding if i == 0 else (1, 1)
        if settings != ((3, 3), (1, 1), (1, 1), 1, "zeros") or conv.padding != padding or padding[0] != padding[-1]:
            return f"block {i} has {conv}, not a plain 3x3 convolution with padding 1"
        kind: dict[str, Any] = {"biased": own.has(conv, "bias")}
        norm = take(*_NORMS)
        of_norm = _norm_kind(norm, conv.out_channels, own)
        if isinstance(of_norm, str):
            return f"block {i} has {norm}, {of_norm}"
        kind |= of_norm
        fused = isinstance(norm, InstanceNormReLUAvgPool)
        with_relu, with_pool = fused and norm.relu, fused and norm.pool
        if with_pool and not with_relu:
            return f"block {i} has {norm}, which pools before there is an activation"
        activation = None if with_relu else take(*_ACTIVATIONS)
        if activation is None and not with_relu:
            found = type(rest[0]).__name__ if rest else "nothing"
            return f"block {i} has {found} where a norm or an activation was expected"
        kind["activation"] = "relu" if with_relu else _ACTIVATIONS[type(activation)]
        if isinstance(activation, nn.LeakyReLU):
            kind["slope"] = activation.negative_slope
        pool = None if with_pool else take(*_POOLS)
        if pool is not None:
            sizes = [getattr(pool, name) for name in ("kernel_size", "stride", "padding")]
            sizes = [(v, v) if isinstance(v, int) else tuple(v) for v in sizes]
            others = (pool.ceil_mode, getattr(pool, "divisor_override", None), getattr(pool, "return_indices", False))
            if sizes != [(2, 2), (2, 2), (0, 0)] or others != (False, None, False) or getattr(pool, "dilation", 1) != 1:
                return f"block {i} has {pool}, not a 2x2 pool"
        kind["pool"] = "avg" if with_pool else "none" if pool is None else _POOLS[type(pool)]
        blocks.append(_Block(conv, norm, tuple(sorted(kind.items()))))
    return blocks


def _norm_kind(norm: nn.Module | None, channels: int, own: _Names) -> dict[str, Any] | str:
    """The fields of `ConvNetShape`, or what is wrong with it."""
    if norm is None:
        return {"norm": "none"}
    if not (own.has(norm, "weight") and own.has(norm, "bias")):
        return "which has no affine parameters"
    kind: dict[str, Any] = {"eps": norm.eps}
    if isinstance(norm, nn.LayerNorm):
        return kind | {"norm": "layer"}
    if own.shape(norm, "weight") != (channels,):
        return f"not one of {channels} channels"
    if isinstance(norm, nn.GroupNorm) and norm.num_groups != channels:
        return kind | {"norm": "group", "groups": norm.num_groups}
    if isinstance(norm, nn.BatchNorm2d):
        return kind | {"norm": "batch" if norm.training or norm.running_mean is None else "running"}
    if isinstance(norm, nn.InstanceNorm2d) and norm.track_running_stats:
        return "which keeps running statistics"
    return kind | {"norm": "instance"}


def _changed(net: nn.Module, layers: list[nn.Module]) -> str | None:
    """What runs beside or instead of the modules' own code."""
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    for module in net.modules():
        kind = type(module).__name__
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            return f"{kind} has hooks"
        for name in _RUN:
            if name in vars(module):
                return f"{kind} has a {name} set on the instance"
    for kind in {type(layer) for layer in layers}:
        if name := _replaced(kind):
            return f"{kind.__name__}.{name} is not the class's own"
    return None


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


def _other_forward(net: nn.Module, device: torch.device, output: Output) -> str | None:
    """Why ``net``'s forward cannot be taken for ``classifier(flatten(features(x)))``, with its logits at ``output``."""
    kind = type(net)
    if kind.forward is Student.forward and kind.embed is Student.embed and not _replaced(kind):
        return f"output={output} takes an element of a tuple" if isinstance(output, int) else None
    before = [(module, dict(vars(module))) for module in net.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        try:
            graph = _Tracer(device).trace(_Call(net))
        except Exception as error:  # whatever a forward does with what is no tensor
            reason = str(error).partition("\n")[0]
            return f"{kind.__name__}.forward cannot be followed whatever its images are: {reason}"
        finally:
            changed = [module for module, own in before if _restored(module, own)]
    if changed:
        return f"{kind.__name__}.forward sets attributes of {type(changed[0]).__name__}"
    found = _follow(net, graph, output)
    return None if found is None else f"{kind.__name__}.forward computes something else than {_FORM}: {found}"


_FORM = "classifier(flatten(features(x)))"


def _restored(module: nn.Module, own: dict[str, Any]) -> bool:
    """Whether the module's attributes had changed; they are as they were."""
    now = vars(module)
    if now.keys() == own.keys() and all(now[name] is value for name, value in own.items()):
        return False
    now.clear()
    now.update(own)
    return True


class _Call(nn.Module):
    """What calling ``net`` with images alone runs."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class _Tracer(fx.Tracer):
    """Notes which of torch's and our modules are called, and refuses contexts, of which a graph says nothing."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device.type
        self.context = self._context()

    def _context(self) -> tuple:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled(self.device)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("torch.nn.") or type(m) in (Conv2d, InstanceNormReLUAvgPool)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self._context() != self.context:
            raise RuntimeError("it changes the grad mode or autocast")
        return super().create_node(*args, **kwargs)


def _follow(net: nn.Module, graph: fx.Graph, output: Output) -> str | None:
    """What ``graph`` of a `_Call` has beside the form that the engine computes; None: nothing."""
    features = [layer for layer in net.features if type(layer) is not nn.Identity]
    modules = dict(_Call(net).named_modules())
    called: list[nn.Module | str] = []
    chain: list[fx.Node] = []  # the images, and what becomes of them
    shapes, sizes = set(), set()  # nodes that are the shape of one in the chain, and the number of images
    for node in graph.nodes:
        args, kwargs, options = node.args, node.kwargs, node.args[1:]
        onwards = bool(args) and bool(chain) and args[0] is chain[-1]
        if node.op == "placeholder":
            chain.append(node)
        elif node.op == "call_module" and onwards and not options and not kwargs:
            module = modules[node.target]
            if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
                called.append("flatten")
            elif module is net.features:
                called += features
            elif type(module) is not nn.Identity:
                called.append(module)
            chain.append(node)
        elif _is(node, "size") and args[0] in chain and not kwargs and options in ((), (0,)):
            (sizes if options else shapes).add(node)
        elif _is(node, getattr) and args[0] in chain and options == ("shape",):
            shapes.add(node)
        elif _is(node, operator.getitem) and isinstance(args[0], fx.Node) and args[0] in shapes and options == (0,):
            sizes.add(node)
        elif _is(node, "contiguous") and onwards and not options and not kwargs:
            chain.append(node)
        elif onwards and _flattens(node, sizes, net.classifier.in_features):
            called.append("flatten")
            chain.append(node)
        elif node.op == "output":
            return _called_else(called, [*features, "flatten", net.classifier]) or _returned_else(
                args[0], chain[-1], output
            )
        else:
            return f"it runs {getattr(node.target, '__name__', node.target)}"
    raise AssertionError("a graph ends with its output")


def _is(node: fx.Node, target: Any) -> bool:
    return node.op == ("call_method" if isinstance(target, str) else "call_function") and node.target == target


def _flattens(node: fx.Node, sizes: set[fx.Node], features: int) -> bool:
    """Whether node makes [N, C, H, W] to [N, features]."""
    options, kwargs = node.args[1:], dict(node.kwargs)
    if _is(node, "flatten") or _is(node, torch.flatten):
        named = dict(zip(("start_dim", "end_dim"), options, strict=False)) | kwargs
        return named in ({"start_dim": 1}, {"start_dim": 1, "end_dim": -1})
    if not (_is(node, "view") or _is(node, "reshape")) or kwargs:
        return False
    size = options[0] if len(options) == 1 else options
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        return False
    rows, columns = size
    return (rows in sizes and columns in (-1, features)) or (rows == -1 and columns == features)


def _called_else(called: list[nn.Module | str], expected: list[nn.Module | str]) -> str | None:
    if len(called) == len(expected) and all(a is b for a, b in zip(called, expected, strict=True)):
        return None
    names = [each if isinstance(each, str) else type(each).__name__ for each in called]
    return f"it runs {', '.join(names) or 'nothing'}"


def _returned_else(returned: Any, logits: fx.Node, output: Output) -> str | None:
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
