"""Names: former ones go on with a warning, an order that changed fails loudly, and no function hides its module."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest
import torch
from torch import nn

import pydistill
from pydistill import matching
from pydistill.labels import Projector, SoftLabelStore
from pydistill.methods.networks.unip import distill_attention

X, HARD = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
MEAN, VARIANCE = torch.zeros(3), torch.ones(3)
MAPS = torch.randn(4, 1, 2, 5, 6)
RECORD = pydistill.augment.MultiCrop(6, mix="mixup").draw((4, 3, 8, 8))

# function, arguments, (former, present) name of an argument, its value
RENAMED = {
    "soft_cross_entropy": (pydistill.soft_cross_entropy, (X, X.softmax(1)), ("kind", "label_kind"), "probs"),
    "bn_stat_match": (pydistill.bn_stat_match, (X, MEAN, VARIANCE), ("reduction", "kind"), "sq"),
    "attention_map_divergence, student": (pydistill.attention_map_divergence, tuple(MAPS), ("tau_s", "T_s"), 0.7),
    "attention_map_divergence, teacher": (pydistill.attention_map_divergence, tuple(MAPS), ("tau_t", "T_t"), 0.7),
    "attention_nmi": (pydistill.divergence.attention_nmi, tuple(MAPS[:2]), ("tau", "T"), 0.7),
    "mix_labels": (pydistill.augment.mix_labels, (HARD, RECORD, 6), ("classes", "num_classes"), 5),
}


@pytest.mark.parametrize("name", RENAMED)
def test_former_names_of_arguments_warn_and_do_the_same(name):
    function, args, (former, present), value = RENAMED[name]
    with pytest.warns(DeprecationWarning, match=f"the argument {former} is called {present} now") as caught:
        found = function(*args, **{former: value})
    assert caught[0].filename == __file__
    assert torch.equal(found, function(*args, **{present: value}))
    with pytest.raises(TypeError, match=f"{former} is the former name of {present}; both were given"):
        function(*args, **{former: value, present: value})


def test_former_names_compile():
    compiled = torch.compile(
        lambda a: pydistill.soft_cross_entropy(a, HARD, kind="hard"), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(X), pydistill.soft_cross_entropy(X, HARD))


def test_the_mean_over_rows_is_batchmean():
    with pytest.warns(DeprecationWarning, match="reduction 'mean' is called 'batchmean' now") as caught:
        found = pydistill.attention_map_divergence(*MAPS, reduction="mean")
    assert torch.equal(found, pydistill.attention_map_divergence(*MAPS))
    assert caught[0].filename == __file__


def test_the_matchers_kind_of_distance():
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).eval()
    with pytest.warns(DeprecationWarning, match="the argument reduction is called kind now"):
        matcher = pydistill.nn.BNStatMatcher(net, reduction="sq")
    net(X)
    torch.testing.assert_close(matcher.loss().float(), pydistill.bn_stat_match(X, MEAN, VARIANCE, kind="sq"))


def test_the_stores_temperature(tmp_path):
    sizes = {"num_images": 4, "num_classes": 3, "epochs": 1}
    with pytest.warns(DeprecationWarning, match=r"SoftLabelStore.create: the argument temperature is called T now"):
        store = SoftLabelStore.create(tmp_path / "labels.store", **sizes, temperature=4.0)
    with store, pytest.warns(DeprecationWarning, match=r"SoftLabelStore.temperature is called T now"):
        assert store.temperature == 4.0
    assert store.T == 4.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: pydistill.gradient_match([X], [X]),
        lambda: pydistill.krr_loss(X, X, X, X),
        lambda: pydistill.reference.krr_loss(X, X, X, X),
        lambda: distill_attention(None, None, X),
    ],
)
def test_an_order_that_changed_fails_loudly(call):
    with pytest.raises(TypeError, match="positional argument"):
        call()


LOSSES = {
    "class_mean_match": lambda backend: pydistill.class_mean_match(X, X, HARD, HARD, backend=backend),
    "match_maps": lambda backend: matching.match_maps([X], [X], HARD, HARD, backend=backend),
    "gradient_match": lambda backend: pydistill.gradient_match(grads_real=[X], grads_syn=[X], backend=backend),
    "krr_loss": lambda backend: pydistill.krr_loss(X, X, y_real=X, y_syn=X, backend=backend),
    "mmd": lambda backend: pydistill.matching.mmd(X, X + 1, backend=backend),
    "contrastive_ce": lambda backend: pydistill.divergence.contrastive_ce(X, X, scale=1.0, backend=backend),
    "soft_cross_entropy": lambda backend: pydistill.soft_cross_entropy(X, HARD, backend=backend),
    "kd_divergence": lambda backend: pydistill.kd_divergence(X, X, backend=backend),
    "attention_map_divergence": lambda backend: pydistill.attention_map_divergence(*MAPS, backend=backend),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_a_backend(name):
    loss = LOSSES[name]
    torch.testing.assert_close(loss("reference"), loss("auto"))
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, cpu, cuda, triton, got 'numpy'"):
        loss("numpy")
    with pytest.raises(NotImplementedError, match="cuda"):
        loss("cuda")


def test_no_function_hides_its_module():
    """But in `ops` and `reference`, where an operator's file has its name."""
    for found in pkgutil.walk_packages(pydistill.__path__, "pydistill."):
        (package, _, name), room = found.name.rpartition("."), found.name.split(".")[1]
        if room in ("ops", "reference", "triton", "bench") or name == "__main__" or name.startswith("_C"):
            continue
        importlib.import_module(found.name)
        assert isinstance(getattr(importlib.import_module(package), name), ModuleType), found.name


def test_the_projectors_temperature():
    encoder, rows = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.randn(2, 3)
    with pytest.warns(DeprecationWarning, match=r"the argument temperature is called T now"):
        old = Projector(encoder, rows, temperature=4.0)
    torch.testing.assert_close(old.W, Projector(encoder, rows, T=4.0).W)
    with pytest.raises(ValueError, match="T: expected a positive finite number, got 0"):
        Projector(encoder, rows, T=0)


FORMER_HOMES = {
    "pydistill.mmd": "pydistill.matching",
    "pydistill.class_gradients": "pydistill.matching",
    "pydistill.attention_nmi": "pydistill.divergence",
    "pydistill.contrastive_ce": "pydistill.divergence",
    "pydistill.bn_match_forward": "pydistill.ops",
    "pydistill.TrainResult": "pydistill.trajectory",
    "pydistill.divergence.kd_divergence": "pydistill.ops",
    "pydistill.divergence.attention_map_divergence": "pydistill.ops",
    "pydistill.augment.multi_crop": "pydistill.ops",
    "pydistill.labels.sparse_label_loss": "pydistill.ops",
}


@pytest.mark.parametrize("former", FORMER_HOMES)
def test_a_name_has_one_home_and_the_former_one_warns(former):
    module, _, name = former.rpartition(".")
    home = importlib.import_module(FORMER_HOMES[former])
    assert name in home.__all__
    assert name not in importlib.import_module(module).__all__
    with pytest.warns(DeprecationWarning, match=f"{former} is {FORMER_HOMES[former]}.{name} now") as caught:
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(home, name)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=f"{former} is") as caught:
        exec(f"from {module} import {name}", {})
    assert len(caught) == 1
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        _ = importlib.import_module(module).nothing
