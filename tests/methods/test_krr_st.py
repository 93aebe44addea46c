"""KRR-ST: its outer step against a literal one, interrupted runs, and what a distilled set is worth."""

import json
from statistics import mean

import pytest
import torch
import torch.nn.functional as F

from pydistill.cli import main
from pydistill.methods.matching.krr_st import KRRST, Pool, initial, krr_st, target_features
from pydistill.methods.networks.self_supervised import Encoder, barlow_twins, barlow_twins_loss
from pydistill.seeding import Stream, seeded_generator, seeded_net
from tests.integration.commands import refused

TINY = KRRST(images=6, iterations=8, batch_real=8, pool=2, online_steps=3, width=4, depth=2, pretrain_steps=3, lr=0.01)


def problem():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 1, 8, 8, generator=generator), torch.randn(20, 3, generator=generator)


def test_the_outer_step_is_a_literal_one():
    """One iteration: kernel by hand, a general solve, autograd, one step of AdamW and one of SGD."""
    config = KRRST(**{**vars(TINY), "iterations": 1, "lam": 1e-3})
    images, targets = problem()
    states = []
    x, y = krr_st(config, images, targets, on_step=lambda record, state: states.append((record, state())))

    x0, y0 = initial(config, images, targets)
    pool = Pool(config, 1, 3, 8, "cpu")
    for _ in pool.fill(x0, y0):
        pass
    generator = seeded_generator(config.seed, Stream.KRR_BATCH, 0)
    index = torch.randperm(20, generator=generator)[:8]
    i = int(torch.randint(2, (), generator=generator))
    net = pool.nets[i].eval()
    x0.requires_grad_(), y0.requires_grad_()
    f_real, f_syn = (torch.cat([net.embed(z), torch.ones(len(z), 1)], 1) for z in (images[index], x0))
    k_ss = f_syn @ f_syn.T
    system = k_ss + 1e-3 * k_ss.trace().detach() * torch.eye(6)
    loss = F.mse_loss(f_real @ f_syn.T @ torch.linalg.solve(system, y0), targets[index])
    record, state = states[0]
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    d_x, d_y = torch.autograd.grad(loss, (x0, y0))
    for name, gradient, start, end in (("x", d_x, x0, x), ("y", d_y, y0, y)):
        torch.testing.assert_close(
            state[f"{name}.exp_avg"], 0.1 * gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max())
        )
        torch.testing.assert_close(end, start - 0.01 * gradient.sign(), rtol=0, atol=1e-3)  # Adam's first step
    pool.step(i, x, y)
    for name, value in pool.nets[i].state_dict().items():
        assert torch.equal(state[f"net.{i}.{name}"], value), name


def test_cut_off_after_any_step_it_ends_in_the_same_bits():
    images, targets = problem()
    states = []
    x, y = krr_st(TINY, images, targets, on_step=lambda record, state: states.append(state()))
    assert int(states[-1]["born"]) > 2  # networks were replaced on the way
    for state in states[:-1]:
        again = krr_st(TINY, images, targets, state=state)
        assert torch.equal(again[0], x)
        assert torch.equal(again[1], y)


def test_barlow_twins_is_its_correlation_and_falls():
    a, b = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    matrix = torch.corrcoef(torch.cat([a, b], 1).T)[:4, 4:]
    weights = 0.2 + 0.8 * torch.eye(4)
    expected = ((matrix - torch.eye(4)).square() * weights).sum()
    torch.testing.assert_close(barlow_twins_loss(a, b, 0.2), expected, rtol=1e-4, atol=1e-4)
    encoder = seeded_net(lambda: Encoder(1, 1, 4, 2, 8), 0)
    losses = barlow_twins(encoder, problem()[0].repeat(4, 1, 1, 1), epochs=12, batch_size=16, projection=8)
    assert losses[-1] < 0.8 * losses[0]
    assert not encoder.training
    features = target_features(encoder, problem()[0])
    torch.testing.assert_close(features.mean(0), torch.zeros(8), rtol=0, atol=1e-5)


def test_what_is_refused():
    images, targets = problem()
    with pytest.raises(ValueError, match="images: expected 30 or more, got 20"):
        krr_st(KRRST(images=30, batch_real=8), images, targets)
    with pytest.raises(ValueError, match="pool: expected at least 1, got 0"):
        KRRST(pool=0)
    with pytest.raises(ValueError, match="images: expected 256, a batch, or more, got 20"):
        barlow_twins(Encoder(1, 1, 4, 2, 8), images, epochs=1)
    with pytest.raises(FloatingPointError, match="the loss of iteration 1 is nan"):
        krr_st(TINY, images * float("nan"), targets)


SMALL = [
    *("--width", "4", "--target-epochs", "2", "--images", "30", "--iterations", "30", "--pool", "2"),
    *("--online-steps", "10", "--pretrain-steps", "20", "--students", "1", "--checkpoint-every", "7", "--lr", "0.1"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("krr_st") / "run"
    main(["distill", "krr_st", "--out", str(folder), *SMALL])
    return folder


def test_the_loss_falls_and_everything_is_probed(finished):
    losses = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in losses] == list(range(1, 31))
    assert mean(r["loss"] for r in losses[-10:]) < mean(r["loss"] for r in losses[:10])
    results = json.loads((finished / "results.json").read_text())
    assert {name: len(found) for name, found in results.items()} == {
        **{"nothing": 1, "random": 1, "distilled": 1, "target": 1}
    }
    assert min(results["distilled"]) > 0.5


def test_resumed_it_ends_in_the_same_bytes(finished, tmp_path, monkeypatch, capsys):
    from pydistill.cli.console import Stop

    folder = tmp_path / "run"
    command = ["distill", "krr_st", "--out", str(folder), *SMALL]
    metrics = folder / "metrics.jsonl"
    with monkeypatch.context() as patched:
        stopping = property(lambda self: metrics.exists() and len(metrics.read_text().splitlines()) >= 10)
        patched.setattr(Stop, "requested", stopping)
        with pytest.raises(SystemExit) as stopped:
            main(command)
    assert stopped.value.code == 130
    with metrics.open("a") as file:
        file.write('{"iteration": 11, "lo')  # what a kill during a write may leave
    main([*command, "--resume"])
    for name in ("target.safetensors", "distilled.safetensors", "metrics.jsonl", "results.json"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    capsys.readouterr()
    for arguments, message in (
        (command, "--out: expected a new or empty folder"),
        ([*command, "--resume", "--lam", "1"], "as the run in"),
        (["distill", "krr_st", "--resume"], "--resume: expected --out with the folder"),
        (["distill", "krr_st", "--resume", "--out", str(tmp_path / "none")], "found no file"),
        (["distill", "krr_st", "--dataset", "cifar"], "--dataset: expected one of digits"),
        (["distill", "krr_st", "--images", "5000"], "--images: expected at most 1433, got 5000"),
        (["distill", "krr_st", "--checkpoint-every", "0"], "--checkpoint-every: expected at least 1, got 0"),
    ):
        assert message in refused(capsys, *arguments)
