"""Rows of logits at the limits of floating-point numbers, and the losses of these rows."""

import math

import torch
import torch.nn.functional as F

KINDS = ("fkl", "rkl", "jsd", "soft_ce", "ce", "mse", "ofa")
TEMPERATURES = (0.05, 1.0, 50.0)
N, C = 4, 37  # more classes than a vector has lanes, and a remainder
LABELS = torch.tensor([0, 5, 16, 36])
MASKED = [3, 17, 35]  # no label


def _make() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, N, C, generator=generator)
    mask = torch.zeros(C)
    mask[MASKED] = -torch.inf
    far = [1e4 * torch.randint(-1, 2, (N, C), generator=generator).float() for _ in range(2)]
    return {
        "zeros": (torch.zeros(N, C), torch.zeros(N, C)),
        "denormal": (1e-40 * x, 1e-40 * y),
        "equal": (10 * x, 10 * x),
        "identical rows": (x[:1].repeat(N, 1), y[:1].repeat(N, 1)),
        "one row": (5 * x[:1], 5 * y[:1]),
        "underflow": (30 * x, 30 * y),
        "1e4": (far[0], far[1]),
        "1e4 and close": (1e4 + x, 1e4 + y),
        "masked": (10 * x + mask, 10 * y + mask),
        "masked student": (x + mask, y),
        "masked target": (x, y + mask),
    }


ROWS = _make()  # student and target, logits in float32


def labels_of(x: torch.Tensor) -> torch.Tensor:
    return LABELS[: len(x)]


def log_softmax(x: torch.Tensor, T: float = 1.0) -> torch.Tensor:
    return ((x - x.detach().amax(-1, keepdim=True)) / T).log_softmax(-1)


def product(weight: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
    """A zero probability adds nothing, not even to derivatives."""
    none = weight == 0
    return torch.where(none, 0, weight * torch.where(none, 0, log))


def divergence(
    kind: str, x: torch.Tensor, log_p: torch.Tensor, p: torch.Tensor, T: float, y: torch.Tensor, beta=0.3, gamma=1.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' divergences in float64, and the size of the terms in them."""
    log_q = log_softmax(x, T)
    q, own = log_q.exp(), F.one_hot(labels_of(x), C).bool()
    if kind == "fkl":
        parts = [product(p, log_p), -product(p, log_q)]
    elif kind == "rkl":
        parts = [product(q, log_q), -product(q, log_p)]
    elif kind == "jsd":
        none = (p == 0) & (q == 0)
        of_p, of_q = torch.where(none, 0, log_p), torch.where(none, 0, log_q)
        log_m = torch.logaddexp(of_p + math.log(beta), of_q + math.log(1 - beta))
        parts = [beta * product(p, of_p - log_m), (1 - beta) * product(q, of_q - log_m)]
    elif kind == "soft_ce":
        parts = [-product(p, log_q)]
    elif kind == "ce":
        parts = [-product(own.double(), log_q)]
    elif kind == "mse":
        parts = [((x - y) / T).square()]
    else:
        t = torch.where(own, torch.expm1(gamma * p.log1p()), torch.exp(gamma * log_p))
        parts = [-product(t, log_q)]
    return sum(part.sum(-1) for part in parts), 1 + sum(part.detach().abs().sum(-1) for part in parts)


def check_divergence(f, edge: str, kind: str, T: float, probs: bool, dtype: torch.dtype) -> None:
    """``f(student, target, **options)`` against `divergence`: value and gradient; the second derivative is finite."""
    x, y = (t.to(dtype) for t in ROWS[edge])
    target = log_softmax(y.double(), T).exp().to(dtype) if probs else y
    wide = x.double().requires_grad_()
    log_p = target.double().log() if probs else log_softmax(target.double(), T)
    p = target.double() if probs else log_p.exp()
    true, size = divergence(kind, wide, log_p, p, T, y.double())
    (true_gradient,) = torch.autograd.grad(true.sum(), wide)

    leaf = x.clone().requires_grad_()
    options = {"kind": kind, "T": T, "target_is": "probs" if probs else "logits", "beta": 0.3, "gamma": 1.5}
    options |= {"labels": labels_of(x)} if kind == "ofa" else {}
    loss = f(leaf, labels_of(x) if kind == "ce" else target, scale_T2=False, reduction="none", **options)
    eps = torch.finfo(dtype).eps
    near = (loss - true).abs() <= 32 * eps * size
    assert (near | (loss == true)).all(), (loss, true)
    if not true.isfinite().all() and kind == "rkl":
        return  # there is no gradient
    again, gradient = (
        torch.autograd.grad(loss.sum(), leaf, retain_graph=True, create_graph=graph)[0] for graph in (True, False)
    )
    slope = size if kind == "rkl" else true_gradient.abs().amax(-1) * T + 1
    for found in (gradient, again):
        assert ((found - true_gradient).abs() <= (64 * eps * slope / T)[:, None]).all(), (found, true_gradient)
    assert torch.autograd.grad(again.sin().sum(), leaf)[0].isfinite().all()


def check_sparse(f, edge: str, T: float, dtype: torch.dtype) -> None:
    """``f(logits, indices, values, **options)`` against `divergence` from the dense target."""
    x = ROWS[edge][0].to(dtype)
    indices = torch.tensor([[0, 4, 17], [36, 3, 1], [16, 2, 35], [5, 6, 7]])[: len(x)]  # some have zero probability
    values = torch.tensor([[0.7, 0.2, 0], [0.5, 0, 1e-40], [0.25, 0.5, 0], [1, 0, 0]], dtype=dtype)[: len(x)]
    eps = torch.finfo(dtype).eps
    for tail in ("smooth", "zeros", "renorm"):
        for kind in ("kl", "ce"):
            wide = x.double().requires_grad_()
            share = values.double()
            others = (1 - share.sum(1, keepdim=True)).clamp_min(0) / (C - 3) if tail == "smooth" else 0.0
            share = share / share.sum(1, keepdim=True) if tail == "renorm" else share
            p = (torch.zeros(len(x), C, dtype=torch.float64) + others).scatter(1, indices, share)
            true, size = divergence("fkl" if kind == "kl" else "soft_ce", wide, p.log(), p, T, p)
            (true_gradient,) = torch.autograd.grad(true.sum(), wide)
            leaf = x.clone().requires_grad_()
            loss = f(leaf, indices, values, T=T, tail=tail, kind=kind, reduction="none")
            assert (((loss - true).abs() <= 32 * eps * size) | (loss == true)).all(), (loss, true)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            assert ((gradient - true_gradient).abs() <= 32 * eps / T).all(), (gradient, true_gradient)


def check_attention(f, kind: str, dtype: torch.dtype) -> None:
    """``f(q_s, k_s, q_t, k_t, **options)`` on inputs whose scores over these temperatures are exact in every dtype."""
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(-1, 2, (1, 1, rows, 4), generator=generator).double() for rows in (10, 37, 10, 37)]
    mask = torch.ones(37, dtype=torch.bool)
    mask[MASKED] = False
    inputs = {
        "zeros": [0 * t for t in signs],
        "denormal": [1e-40 * t for t in signs],
        "one row": [t[:, :, :1] for t in signs],
        "identical rows": [t[:, :, :1].expand_as(t) for t in signs],
        "far": [8 * t for t in signs],
        "1e4": [1e4 * t for t in signs],
    }
    for edge, tensors in inputs.items():
        for T in (2.0**-4, 1.0, 64.0):
            for beta in (0.3, 1e-9) if kind == "jsd" else (0.3,):  # which nothing else takes
                for masked in (False, True) if edge != "one row" else (False,):
                    q_s, k_s, *teacher = (t.to(dtype) for t in tensors)
                    wide = [t.double().requires_grad_() for t in (q_s, k_s)]
                    scores = wide[0] @ wide[1].mT / T, teacher[0].double() @ teacher[1].double().mT / T
                    if masked:
                        scores = tuple(s[..., mask] for s in scores)
                    log_s, log_t = (s.log_softmax(-1) for s in scores)
                    s, t = log_s.exp(), log_t.exp()
                    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
                    parts = {
                        "fkl": [t * log_t, -t * log_s],
                        "rkl": [s * log_s, -s * log_t],
                        "jsd": [beta * t * (log_t - log_m), (1 - beta) * s * (log_s - log_m)],
                        "ce": [-t * log_s],
                    }[kind]
                    true = sum(part.sum(-1) for part in parts)
                    size = 1 + sum(part.detach().abs().sum(-1) for part in parts)
                    truth = torch.autograd.grad(true.sum(), wide)
                    leaves = [x.clone().requires_grad_() for x in (q_s, k_s)]
                    options = {"kind": kind, "T_s": T, "T_t": T, "beta": beta}
                    loss = f(*leaves, *teacher, mask=mask if masked else None, reduction="none", **options)
                    eps = torch.finfo(dtype).eps
                    assert ((loss - true).abs() <= eps * 64 * size).all(), (edge, T, loss, true)
                    reach = float(size.max()) if kind == "rkl" else 1.0  # of a row's slope by its scores
                    for found, x, other in zip(torch.autograd.grad(loss.sum(), leaves), truth, (k_s, q_s), strict=True):
                        bound = 256 * eps * reach * float(other.abs().max()) / T + 1e-40
                        error = float((found - x).abs().max())
                        assert error <= bound, (edge, T, beta, masked, error, bound, found, x)
