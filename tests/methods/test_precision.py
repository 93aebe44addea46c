"""Networks of the decoupled methods in other precisions: what is rounded and what is not, and who refuses which."""

import contextlib
import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pydistill.data import read_safetensors, write_safetensors
from pydistill.labels import SoftLabelStore
from pydistill.methods import DECOUPLED, DM, PostTrain, RandomImages, Relabel, Squeeze, SRe2L, run
from pydistill.methods.decoupled import recover as recovery
from pydistill.methods.decoupled import relabel as relabelling
from pydistill.methods.decoupled.post_train import post_train
from pydistill.methods.decoupled.recover import recover
from pydistill.methods.decoupled.relabel import relabel
from pydistill.methods.decoupled.squeeze import squeeze
from pydistill.methods.precision import agree, decided, rounded
from pydistill.methods.runs import Interrupted
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


@pytest.mark.parametrize("method", [Squeeze(), SRe2L(), Relabel(), PostTrain(), DM(ipc=1)], ids=lambda m: m.name)
def test_a_run_has_the_precision_that_it_began_with(method):
    gpu = torch.device("cuda")
    for config in ("config", None):  # where options are kept
        for kept, here, there in (
            ("tf32-conv", "tf32-conv", "tf32-conv"),
            ("bf16", "bf16", "bf16"),
            ("auto", "auto", "ieee"),  # begun where nothing was to be decided
        ):
            for device, wanted in ((CPU, here), (gpu, there)):
                inner = {"precision": kept}
                options = {config: inner} if config else inner
                assert method.on(device, options).precision == wanted
                assert inner == {"precision": wanted}
                assert replace(method, precision="ieee").on(device, options).precision == "ieee"
    assert method.on(CPU) == method.on(CPU, {}) == method
    assert decided(CPU) == "auto"


def test_files_of_what_auto_may_become_agree():
    assert [name for name in ("auto", "ieee", "tf32", "bf16", "fp16") if agree("auto", name)] == [
        "auto",
        "ieee",
        "tf32",
    ]
    assert agree("bf16", "bf16")
    assert not agree("tf32", "ieee")
    assert not agree("ieee", "auto")


def older(value):
    """What a version without precisions wrote in its place."""
    if isinstance(value, dict):
        return {name: older(each) for name, each in value.items() if name != "precision"}
    return [older(each) for each in value] if isinstance(value, list) else value


def test_runs_of_older_versions_go_on(tmp_path, monkeypatch):
    """Their options, states, parts, stores and networks name no precision."""
    stored, metadata = recovery.stored, relabelling._metadata
    net = {"network": "convnet", "width": 4, "depth": 1}
    teacher, images = tmp_path / "squeeze" / "teacher.safetensors", tmp_path / "sre2l" / "distilled.safetensors"
    recovered = {"images": images, "teacher": teacher}
    labelled = {"images": images, "labels": tmp_path / "relabel" / "labels.store"}
    tiny = {"width": 4, "depth": 2, "image_size": 8, "students": 1, "student_epochs": 1, "whole_epochs": 0}
    for method, inputs, made in (
        (Squeeze(**net, epochs=2), {"image_size": 8}, "teacher"),
        (SRe2L(ipc=1, iterations=2, batch_size=5), {"teacher": teacher, "checkpoint_every": 1}, "distilled"),
        (Relabel(epochs=2, batch_size=5), recovered, None),
        (PostTrain(**net), labelled, "student"),
        (DM(ipc=1, iterations=2, batch_real=4), {**tiny, "checkpoint_every": 1}, "distilled"),
    ):
        out, asked = tmp_path / method.name, iter([False] + 99 * [True])
        with monkeypatch.context() as patched:
            patched.setattr(recovery, "stored", lambda *args: older(stored(*args)))
            patched.setattr(relabelling, "_metadata", lambda *args: older(metadata(*args)))
            with pytest.raises(Interrupted):
                run(method, out=out, stop=lambda asked=asked: next(asked), device="cpu", **inputs)
        options = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(older(options)))
        if isinstance(method, DM):
            tensors, header = read_safetensors(out / "state.safetensors", "dm_state")
            more = {name: header[name] for name in ("label_kind", "iteration")}
            write_safetensors(out / "state.safetensors", tensors, "dm_state", older(header["config"]), **more)
        with pytest.raises(ValueError, match=r"precision: expected auto as the run in .* has, got bf16"):
            run(replace(method, precision="bf16"), out=out, resume=True, **inputs)
        run(method, out=out, resume=True, **inputs)
        kept = json.loads((out / "config.json").read_text())
        assert kept.get("config", kept)["precision"] == "auto"
        run(method, out=tmp_path / "whole" / method.name, device="cpu", **inputs)
        if made is not None:
            found, wanted = (
                load_file(path / f"{made}.safetensors") for path in (out, tmp_path / "whole" / method.name)
            )
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        if isinstance(method, Squeeze):
            tensors, header = read_safetensors(teacher, "teacher")
            write_safetensors(teacher, tensors, "teacher", older(header["config"]), class_names=header["class_names"])
    assert "precision" not in SoftLabelStore.open(labelled["labels"]).metadata["relabel"]


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
