"""Networks of the decoupled methods in other precisions: what is rounded and what is not, and who refuses which."""

import contextlib
import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from pydistill.labels import SoftLabelStore
from pydistill.methods import DECOUPLED, PostTrain, RandomImages, Relabel, Squeeze, SRe2L
from pydistill.methods.decoupled.post_train import post_train
from pydistill.methods.decoupled.recover import recover
from pydistill.methods.decoupled.relabel import relabel
from pydistill.methods.decoupled.squeeze import squeeze
from pydistill.methods.precision import rounded
from pydistill.methods.training import train
from pydistill.nn import BNStatMatcher, freeze
from tests.methods.teachers import SQUEEZE, make

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", [Squeeze, Relabel, PostTrain, *DECOUPLED.values()])
def test_unknown_precisions_are_refused(method):
    wanted = "precision: expected 'auto', 'ieee', 'bf16', 'tf32', 'tf32-conv', 'tf32-matmul' or 'fp16', got 'fp8'"
    with pytest.raises(ValueError, match=wanted):
        method(precision="fp8")
    assert method().precision == "auto"


@pytest.mark.parametrize("precision", ["fp16", "tf32", "tf32-conv"])
def test_the_cpu_refuses_what_it_lacks(precision, teacher, data, tmp_path):
    """The set and the store of another device's precision are read and used."""
    wanted = f"precision: expected 'ieee' or 'bf16' on cpu, got '{precision}'"
    distilled = make(RandomImages(ipc=2), [teacher], tmp_path / "random", data)
    views = Relabel(epochs=1, precision=precision)
    calls = [
        lambda: squeeze(replace(SQUEEZE, precision=precision), data),
        lambda: recover(SRe2L(precision=precision), [teacher], tmp_path / "images"),
        lambda: relabel(views, distilled, [teacher], tmp_path / "labels"),
        lambda: post_train(PostTrain(precision=precision), distilled, views, num_classes=3),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=wanted):
            call()
    assert not (tmp_path / "images").exists()
    assert not (tmp_path / "labels").exists()
    post_train(PostTrain(network="convnet", width=4, depth=1), distilled, views, num_classes=3)


def test_torchs_switches_are_set_and_given_back():
    switches = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "bf16"
        inside = []
        with contextlib.suppress(KeyboardInterrupt), rounded("ieee", CPU):
            inside += [switch.fp32_precision for switch in switches]
            raise KeyboardInterrupt
        assert inside == ["ieee", "ieee"]
        assert [switch.fp32_precision for switch in switches] == ["bf16", "bf16"]
        with rounded("auto", CPU):
            assert [switch.fp32_precision for switch in switches] == ["bf16", "bf16"]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def gradient(net, x, y, precision):
    """Of the recovery's loss, and what was float32 on the way."""
    x = x.clone().requires_grad_()
    net = freeze(net)
    with BNStatMatcher(net, first=10.0) as matcher, rounded(precision, CPU) as rounding:
        logits, seen = rounding(net, x), []
        handle = matcher._found[0][1]
        loss = F.cross_entropy(logits, y) + 0.01 * matcher.loss()
        seen += [logits.dtype, handle.dtype, matcher.loss().dtype, loss.dtype]
        (grad,) = torch.autograd.grad(loss, x)
    assert {*seen, grad.dtype} == {torch.float32}
    return grad


def test_bf16_rounds_factors_alone(teacher, data):
    """Statistics, losses and gradients of the images are float32, and as near as eight bits let them be."""
    x, y = data.train_images[:12], data.train_labels[:12]
    plain, half = (gradient(teacher.net, x, y, precision) for precision in ("auto", "bf16"))
    apart = ((half - plain).norm() / plain.norm()).item()
    assert 2**-12 < apart < 2**-4
    for name in ("ieee", "fp32"):
        assert torch.equal(gradient(teacher.net, x, y, name), plain)


def test_bf16_changes_labels_by_its_rounding(teacher, data, tmp_path):
    distilled = make(RandomImages(ipc=2), [teacher], tmp_path / "random", data)
    views = Relabel(epochs=1, batch_size=3, format="fp32", temperature=1.0)
    for precision in ("auto", "bf16"):
        relabel(replace(views, precision=precision), distilled, [teacher], tmp_path / precision)
    stores = [SoftLabelStore.open(tmp_path / name) for name in ("auto", "bf16")]
    for index in stores[0].batches(0):
        one, other = (store.read(0, index).densify() for store in stores)
        assert other.dtype == torch.float32
        assert 0 < (one - other).abs().max() < 2**-5
    assert stores[1].metadata["relabel"]["precision"] == "bf16"
    with pytest.raises(ValueError, match=r"expected labels of .*, got some of precision='bf16'"):
        relabel(views, distilled, [teacher], tmp_path / "bf16")


def test_training_in_bf16_rounds_and_keeps_float32(data):
    nets = [squeeze(replace(SQUEEZE, epochs=1, precision=precision), data).net for precision in ("auto", "bf16")]
    for one, other in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=0.1, atol=0.1)
    assert not torch.equal(*(next(net.parameters()) for net in nets))


@pytest.mark.parametrize(
    "made",
    [
        torch.optim.Adam,
        partial(torch.optim.Adam, fused=True),
        partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
    ],
)
def test_the_scale_of_losses_is_part_of_the_state(made):
    """It grows and falls in the run, as gradients overflow; a run that goes on has the same bits."""
    torch.manual_seed(0)
    start, x = torch.nn.Linear(3, 2), torch.randn(4, 3)

    def run(state=None):
        net, kept, scales = copy.deepcopy(start), [], []
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=2)
        optimizer = made(net.parameters(), 0.01)

        def on_epoch(record, state):
            kept.append({name: value.clone() for name, value in state.items()})
            scales.append(float(state["scaler.scale"]))

        def batches(epoch):
            for _ in range(4):
                yield 1, lambda: 8 * net(x).square().mean()

        train(net, optimizer, batches, epochs=6, steps=4, state=state, scaler=scaler, on_epoch=on_epoch)
        assert all(parameter.isfinite().all() for parameter in net.parameters())
        return net, kept, scales

    whole, kept, scales = run()
    assert len(set(scales)) > 1
    for done in (1, 4):
        rest, _, again = run(kept[done - 1])
        assert again == scales[done:]
        assert all(map(torch.equal, rest.parameters(), whole.parameters()))
    del kept[0]["scaler.scale"]
    with pytest.raises(ValueError, match=r"state: expected one of a training in float16; it lacks 'scaler\.scale'"):
        run(kept[0])
