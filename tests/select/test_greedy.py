"""The greedy selections make the same picks as the loops over whole matrices that define them."""

import pytest
import torch

from pydistill.select import facility_location_greedy, graph_cut_greedy, herding


def clustered(n=120, d=12, dtype=torch.float32, relu=True):
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(5, (n,), generator=generator)
    x = torch.randn(n, d, generator=generator) + 1.5 * torch.randn(5, d, generator=generator)[group]
    x = x.relu() if relu else x
    logits = torch.randn(n, 5, generator=generator) + 2 * torch.eye(5)[group]
    return x.to(dtype), (logits.softmax(1) - torch.eye(5)[group]).to(dtype)


def similarity(x, factors=None):
    """0.5 + 0.5 cos of the rows, or of the gradients [b, b (x) e] written out."""
    x = x.double()
    if factors is not None:
        b = factors.double()
        x = torch.cat([b, (b[:, :, None] * x[:, None]).flatten(1)], 1)
    x = torch.nn.functional.normalize(x, dim=1, eps=1e-300)
    return 0.5 + 0.5 * x @ x.T


def lowest_of_the_best(gain):
    """Two samples that gain only from each other tie up to rounding."""
    return int((gain >= gain.max() - 1e-9).nonzero()[0])


def graph_cut_loop(s, budget, lam):
    picks = []
    for _ in range(budget):
        gain = lam * s.sum(0) - 2 * s[picks].sum(0)
        gain[picks] = -torch.inf
        picks.append(lowest_of_the_best(gain))
    return picks


def facility_location_loop(s, budget):
    picks, nearest = [], torch.zeros(len(s), dtype=s.dtype)
    for _ in range(budget):
        gain = (s - nearest[:, None]).clamp_min(0).sum(0)
        gain[picks] = -torch.inf
        picks.append(lowest_of_the_best(gain))
        nearest = torch.maximum(nearest, s[:, picks[-1]])
    return picks


@pytest.mark.parametrize("with_factors", [False, True])
@pytest.mark.parametrize(("relu", "lam"), [(True, 1.0), (False, 1.0), (True, 0.3), (True, 0.0)])
def test_graph_cut_is_the_loop(with_factors, relu, lam):
    x, b = clustered(relu=relu)
    b = b if with_factors else None
    got = graph_cut_greedy(x, len(x), factors=b, lam=lam)
    assert got.dtype == torch.int64
    assert got.tolist() == graph_cut_loop(similarity(x, b), len(x), lam)


@pytest.mark.parametrize("with_factors", [False, True])
def test_bins_are_disjoint_and_each_picks_from_what_is_left(with_factors):
    x, b = clustered()
    b = b if with_factors else None
    got = graph_cut_greedy(x, 20, factors=b, bins=4)
    assert got.shape == (4, 20)
    left = torch.arange(len(x))
    for found in got:
        s = similarity(x[left], None if b is None else b[left])
        assert found.tolist() == left[graph_cut_loop(s, 20, 1.0)].tolist()
        left = left[~torch.isin(left, found)]


@pytest.mark.parametrize("with_factors", [False, True])
def test_facility_location_is_the_loop(with_factors):
    x, b = clustered()
    b = b if with_factors else None
    got = facility_location_greedy(x, 60, factors=b)
    assert got.tolist() == facility_location_loop(similarity(x, b), 60)


@pytest.mark.parametrize("pick", [graph_cut_greedy, facility_location_greedy])
def test_ties_go_to_the_lowest_index(pick):
    # copies of generic rows, in an order that no sum preserves: their gains differ only by rounding
    x = clustered(n=40)[0].repeat(3, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    x = x[order]
    got = pick(x, 30).tolist()
    for k, index in enumerate(got):
        twins = (x == x[index]).all(1).nonzero()[:, 0].tolist()
        assert index == min(set(twins) - set(got[:k]))
    assert pick(torch.ones(7, 3), 7).tolist() == list(range(7))


def test_zero_rows_have_no_direction():
    x, b = clustered()
    x[5] = 0
    assert graph_cut_greedy(x, 30).tolist() == graph_cut_loop(similarity(x), 30, 1.0)
    b[7] = 0
    assert graph_cut_greedy(x, 30, factors=b).tolist() == graph_cut_loop(similarity(x, b), 30, 1.0)
    assert facility_location_greedy(torch.zeros(4, 2), 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layouts_and_dtypes(dtype):
    x, b = clustered(dtype=dtype)
    wide = torch.empty(len(x), 2 * x.shape[1], dtype=dtype)[:, ::2].copy_(x)
    want = graph_cut_loop(similarity(x, b), 30, 1.0)
    assert graph_cut_greedy(wide, 30, factors=b.T.contiguous().T).tolist() == want


def test_threads_pick_alike():
    x, b = clustered(n=3000, d=64)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append([graph_cut_greedy(x, 100, factors=f).tolist() for f in (None, b)])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_herding_is_the_loop():
    x, _ = clustered()
    labels = torch.arange(len(x)) % 3

    def loop(rows):
        rows, picks = rows.double(), []
        for _ in range(10):
            means = [rows[[*picks, j]].mean(0) for j in range(len(rows))]
            distance = (torch.stack(means) - rows.mean(0)).norm(dim=1)
            distance[picks] = torch.inf
            picks.append(int(distance.argmin()))
        return picks

    assert herding(x, 10).tolist() == loop(x)
    want = [3 * j + c for c in range(3) for j in loop(x[c::3])]
    assert herding(x, 10, labels).tolist() == want
    assert sorted(herding(x, len(x)).tolist()) == list(range(len(x)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, b: graph_cut_greedy(x, 121), "budget: expected 1..N for 120 embeddings, got 121"),
        (lambda x, b: graph_cut_greedy(x, 0), "budget: expected 1..N for 120 embeddings, got 0"),
        (lambda x, b: graph_cut_greedy(x, 61, bins=2), "budget: expected 1..N .* got 2 bins of 61"),
        (lambda x, b: graph_cut_greedy(x, 5, lam=-1), "lam: expected a number of at least 0, got -1"),
        (lambda x, b: graph_cut_greedy(x, 5, lam=float("nan")), "lam: expected a number of at least 0, got nan"),
        (lambda x, b: graph_cut_greedy(x, 5, factors=b[1:]), r"factors: expected \[120, C\].* got \[119, 5\]"),
        (lambda x, b: graph_cut_greedy(x.long(), 5), r"embeddings: expected floating \[N, d\].* got int64 \[120, 12\]"),
        (lambda x, b: graph_cut_greedy(x[0], 5), r"embeddings: expected floating \[N, d\].* got float32 \[12\]"),
        (lambda x, b: facility_location_greedy(x, 121), "budget: expected 1..N for 120 embeddings, got 121"),
        (lambda x, b: herding(x, 121), "k: expected 1..N for 120 embeddings, got 121"),
        (lambda x, b: herding(x, 41, torch.arange(120) % 3), "k: expected at most 40, the samples of class 0, got 41"),
        (lambda x, b: herding(x, 2, torch.zeros(7)), r"labels: expected int64 \[120\], got float32 \[7\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*clustered())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value):
    x, b = clustered()
    b[3, 1] = value
    with pytest.raises(ValueError, match="factors: expected finite values, got others in row 3"):
        graph_cut_greedy(x, 5, factors=b)
    x[4, 0] = value
    for pick in (graph_cut_greedy, facility_location_greedy, herding):
        with pytest.raises(ValueError, match="embeddings: expected finite values, got others in row 4"):
            pick(x, 5)
