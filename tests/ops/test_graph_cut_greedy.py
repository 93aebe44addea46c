"""The kernel of the greedy graph cut picks what its definition does; see tests/select for the selections."""

from pathlib import Path

import pytest
import torch

from pydistill.ops import graph_cut_greedy

OP = torch.ops.pydistill.graph_cut_greedy.default


def samples(n, d, classes, dtype=torch.float32):
    """In clusters, or bounds would leave all samples as candidates."""
    generator = torch.Generator().manual_seed(n + d)
    group = torch.randint(classes or 3, (n,), generator=generator)
    x = (torch.randn(n, d, generator=generator) + torch.randn(classes or 3, d, generator=generator)[group]).relu()
    if not classes:
        return x.to(dtype), None
    logits = torch.randn(n, classes, generator=generator) + 2 * torch.eye(classes)[group]
    return x.to(dtype), (logits.softmax(1) - torch.eye(classes)[group]).to(dtype)


# blocks of 64 and 512 samples, 3 and 8 rows of products, 64 columns of sums, 4, 2 and 1 classes; 16 directions at most
@pytest.mark.parametrize(
    ("n", "d", "classes"),
    [
        *((n, 5, 0) for n in (1, 2, 7, 8, 9, 63, 64, 65, 513)),
        *((130, d, 0) for d in (1, 63, 64, 65, 127)),
        *((50, d, 3) for d in (1, 62, 63, 64, 129)),
        *((97, 10, C) for C in (1, 2, 4, 5, 7, 15, 16, 17, 33)),
        (2000, 33, 10),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_picks_are_those_of_the_definition(n, d, classes, dtype):
    x, b = samples(n, d, classes, dtype)
    budget = min(n, 150)
    got = graph_cut_greedy(x, budget, factors=b, backend="cpu")
    assert got.tolist() == graph_cut_greedy(x, budget, factors=b, backend="reference").tolist()


def test_without_structure():
    """Bounds leave all samples as candidates, and every pick takes a pass."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 30, generator=generator)
    assert graph_cut_greedy(x, 400).tolist() == graph_cut_greedy(x, 400, backend="reference").tolist()


@pytest.mark.parametrize("with_factors", [False, True])
def test_samples_within_the_directions(with_factors):
    """All but a few are in their span up to rounding: the rest, of samples and of the move, must not be lost."""
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(24, generator=generator, dtype=torch.float64)
    x = line * (1 + torch.rand(600, 1, generator=generator, dtype=torch.float64))
    x[::100] += 1e-4 * torch.randn(6, 24, generator=generator, dtype=torch.float64)
    b = torch.eye(3, dtype=torch.float64)[torch.arange(600) % 3] if with_factors else None
    want = graph_cut_greedy(x, 80, factors=b, backend="reference")
    assert graph_cut_greedy(x, 80, factors=b).tolist() == want.tolist()


@pytest.mark.parametrize("lam", [0.0, 0.3, 5.0])
def test_weights_of_the_whole(lam):
    x, b = samples(300, 20, 5)
    want = graph_cut_greedy(x, 60, factors=b, lam=lam, backend="reference")
    assert graph_cut_greedy(x, 60, factors=b, lam=lam).tolist() == want.tolist()


def test_registration():
    for classes in (0, 4):
        x, b = samples(20, 6, classes)
        torch.library.opcheck(OP, (x, b, 1.0, 5))
        compiled = torch.compile(lambda x, b: OP(x, b, 1.0, 5), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, b), OP(x, b, 1.0, 5))
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda x: OP(x, None, 1.0, 2))(torch.randn(2, 5, 3))


def test_direct_calls_are_guarded():
    x, b = samples(10, 4, 3)
    with pytest.raises(RuntimeError, match=r"budget: expected 0\.\.10, got 11"):
        OP(x, b, 1.0, 11)
    with pytest.raises(RuntimeError, match=r"factors: expected \[10, C\]"):
        OP(x, b[:9], 1.0, 2)
    with pytest.raises(RuntimeError, match="dtype and device of embeddings"):
        OP(x, b.double(), 1.0, 2)
    with pytest.raises(RuntimeError, match="expected float32 or float64"):
        OP(x.bfloat16(), None, 1.0, 2)
    assert OP(x, b, 1.0, 0).shape == (0,)


PICKS = """
import torch
from pydistill import _host
from tests.ops.test_graph_cut_greedy import samples
from pydistill.ops import graph_cut_greedy
print(_host.isa())
for classes in (0, 7):
    x, b = samples(3000, 50, classes)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        print(graph_cut_greedy(x, 200, factors=b).tolist())
"""


def test_instruction_sets_and_threads_pick_alike(same_with_every_isa):
    found = same_with_every_isa(PICKS, PYTHONPATH=str(Path(__file__).parents[2])).splitlines()
    assert found[0] == found[1] == found[2] != found[3] == found[4] == found[5]
