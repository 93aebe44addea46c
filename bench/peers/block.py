"""The ConvNet block after its convolution (instance norm, ReLU, average pool): plain torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

LAYOUTS = ("nchw", "channels_last")
# each mode includes the one before it, because no user runs a backward without its forward
MODES = ("forward", "forward+backward", "forward+backward+double")

BlockOp = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    mode: str
    x: Tensor  # [N, C, H, W]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    grad_y: Tensor  # [N, C, H // 2, W // 2]
    cotangents: tuple[Tensor, Tensor, Tensor]  # of the gradients of x, weight and bias

    def double(self) -> Block:
        return replace(
            self,
            x=self.x.double(),
            weight=self.weight.double(),
            bias=self.bias.double(),
            grad_y=self.grad_y.double(),
            cotangents=tuple(c.double() for c in self.cotangents),
        )


def make_block(shape: tuple[int, ...], layout: str, mode: str, dtype: torch.dtype = torch.float32) -> Block:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=dtype)
        last = layout == "channels_last" and values.dim() == 4
        return values.contiguous(memory_format=torch.channels_last) if last else values

    n, c, h, w = shape
    return Block(
        mode=mode,
        x=draw(n, c, h, w),
        weight=1 + 0.1 * draw(c),
        bias=0.1 * draw(c),
        grad_y=draw(n, c, h // 2, w // 2),
        cotangents=(draw(n, c, h, w), draw(c), draw(c)),
    )


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(F.group_norm(x, x.shape[1], weight, bias)), 2)


def eager_block(problem: Block, op: BlockOp = plain) -> Callable[[], tuple[Tensor, ...]]:
    """`op` under autograd, as in an eager unroll."""
    second = problem.mode == MODES[2]

    def run() -> tuple[Tensor, ...]:
        if problem.mode == MODES[0]:
            with torch.no_grad():
                return (op(problem.x, problem.weight, problem.bias),)
        leaves = [t.detach().requires_grad_() for t in (problem.x, problem.weight, problem.bias)]
        grad_y = problem.grad_y.detach().requires_grad_(second)
        gradients = torch.autograd.grad(op(*leaves), leaves, grad_y, create_graph=second)
        if not second:
            return gradients
        # the bias enters the gradients only through the ReLU's mask, whose derivative is zero
        return torch.autograd.grad(gradients, (leaves[0], leaves[1], grad_y), problem.cotangents)

    return run


def compiled_block(problem: Block) -> Callable[[], tuple[Tensor, ...]]:
    """One compiled graph per mode, derivatives included: autograd cannot differentiate a compiled function twice."""

    def gradients(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
        return vjp(plain, x, weight, bias)[1](grad_y)

    def second(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor, *cotangents: Tensor) -> tuple[Tensor, ...]:
        _, pull = vjp(lambda x, weight, grad_y: gradients(x, weight, bias, grad_y), x, weight, grad_y)
        return pull(cotangents)

    compile_ = partial(torch.compile, fullgraph=True, dynamic=False)
    arguments = (problem.x, problem.weight, problem.bias)
    if problem.mode == MODES[0]:
        compiled = compile_(lambda *a: (plain(*a),))
    elif problem.mode == MODES[1]:
        compiled = compile_(gradients)
        arguments += (problem.grad_y,)
    else:
        compiled = compile_(second)
        arguments += (problem.grad_y, *problem.cotangents)

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        return compiled(*arguments)

    return run
