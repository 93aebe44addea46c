"""Which networks the student engine takes: those of which nothing else can run; and networks in wrappers."""

import contextlib
import copy
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pydistill
from pydistill.nn import ConvNet
from pydistill.trajectory import FlatModule, convnet_shape

IMAGE = (3, 8, 8)


class Net(nn.Module):
    """A repository's ConvNet; `flatten` is how it comes to its classifier."""

    def __init__(self):
        super().__init__()

        def block(i, o):
            return [nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(o, o), nn.ReLU(inplace=True), nn.AvgPool2d(2)]

        self.features, self.classifier = nn.Sequential(*block(3, 8), *block(8, 8)), nn.Linear(32, 4)
        self.flat = nn.Flatten()

    def forward(self, x, wants_features=False):
        out = self.features(x)
        out = self.flatten(out)
        return (out, self.classifier(out)) if wants_features else self.classifier(out)

    def flatten(self, out):
        return out.view(out.size(0), -1)


def following(forward):
    return type("Net", (Net,), {"forward": forward})()


def flattening(flatten):
    return type("Net", (Net,), {"flatten": flatten})()


def by_layers(self, x):
    for layer in self.features:
        x = layer(x)
    return self.classifier(self.flatten(x))


SAME = [
    flattening(lambda self, out: out.view(out.shape[0], -1)),
    flattening(lambda self, out: out.contiguous().reshape((out.size()[0], 32))),
    flattening(lambda self, out: out.view(-1, 32)),
    flattening(lambda self, out: torch.flatten(out, 1)),
    flattening(lambda self, out: out.flatten(start_dim=1)),
    flattening(lambda self, out: self.flat(out)),
    following(by_layers),
    type("Subclass", (ConvNet,), {"name": "mine"})(3, 4, width=8, depth=2, image_size=8),
    type("Own", (ConvNet,), {"forward": lambda self, x: self.classifier(self.embed(x))})(3, 4, 8, 2, 8),
    following(lambda self, x: Net.forward(self, x) if x.dim() == 4 and x.shape[1:] == (3, 8, 8) else None),
]


def in_half(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.classifier(self.flatten(self.features(x)))


def of_constants(self, x):
    with torch.no_grad():
        x = self.features(x)
    return self.classifier(self.flatten(x))


def keeping(self, x):
    self.seen = self.features(x)
    return self.classifier(self.flatten(self.seen))


def by_mode(self, x):
    return Net.forward(self, x) / (1 if self.training else 3)


def twice(self, x):
    return self.classifier(self.flatten(self.features[:4](self.features[:4](x)[:, :3])))


def changed_first(self, x):
    x.mul_(2)
    return Net.forward(self, x)


def swallowing(self, x):
    with contextlib.suppress(Exception):
        x = x * 2
    return Net.forward(self, x)


def of_tensors(self, x):
    return Net.forward(self, x.clamp(-6, 6) if isinstance(x, torch.Tensor) else x)


OTHERS = [
    (following(swallowing), "it runs mul"),
    (following(of_tensors), "it runs clamp"),
    (following(lambda self, x: Net.forward(self, x.clamp(-6, 6))), "it runs clamp"),
    (following(lambda self, x: Net.forward(self, x).clamp(-8, 8)), "it runs clamp"),
    (following(lambda self, x: Net.forward(self, x) * (0.5 if len(x) > 16 else 1)), "it runs __len__"),
    (following(lambda self, x: Net.forward(self, x * 2 if x.shape[0] > 16 else x)), "it looks at the number of images"),
    (following(lambda self, x: Net.forward(self, x if x.mean() < 9 else -x)), "it runs mean"),
    (following(lambda self, x: Net.forward(self, F.dropout(x))), "it runs dropout"),
    (following(changed_first), "it runs mul_"),
    (following(in_half), "changes the grad mode or autocast"),
    (following(of_constants), "changes the grad mode or autocast"),
    (following(keeping), "sets attributes of Net"),
    (following(twice), "it runs __getitem__"),
    (following(lambda self, x: self.classifier(self.features(x).transpose(2, 3).flatten(1))), "it runs transpose"),
    (following(lambda self, x: self.features(x).flatten(1)), "it does not run Linear"),
    (following(lambda self, x: self.classifier(self.features(x).flatten(1).detach())), "it runs detach"),
    (flattening(lambda self, out: out.flatten(0, 1)), "it runs flatten from another"),
    (following(by_mode).eval(), "it runs div"),
]


def reason_of(net):
    try:
        convnet_shape(net, IMAGE)
    except ValueError as reason:
        return str(reason)
    return ""


@pytest.mark.parametrize("net", SAME)
def test_a_forward_that_is_followed(net):
    assert reason_of(net) == ""


@pytest.mark.parametrize(("net", "reason"), OTHERS)
def test_a_forward_that_is_not_the_engines(net, reason):
    before = copy.copy(vars(net))
    state = torch.get_rng_state()
    found = reason_of(net)
    assert re.search(reason, found), found
    assert vars(net) == before
    assert torch.equal(state, torch.get_rng_state())


def test_a_forward_is_followed_anew_each_time():
    net = following(by_mode)
    assert "it runs div" in reason_of(net)  # by one, in training mode too: it is not looked at what a factor does
    net = following(lambda self, x: Net.forward(self, x) * self.factor if self.factor != 1 else Net.forward(self, x))
    net.factor = 1
    assert reason_of(net) == ""
    net.factor = 2
    assert "it runs mul" in reason_of(net)


def patched_net(net):
    plain = net.forward
    net.forward = lambda x: plain(x) / 4


def patched_layer(net):
    plain = net.classifier.forward
    net.classifier.forward = lambda x: plain(x) / 4


def patched_inside(net):
    plain = net.features[0]._conv_forward
    net.features[0]._conv_forward = lambda *args: plain(*args) / 4


def hook(net):
    net.classifier.register_forward_hook(lambda module, inputs, output: output / 4)


def backward_hook(net):
    net.features[2].register_full_backward_hook(lambda module, grads, _: (grads[0] / 4,))


def hook_on_all(net):
    return nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output / 4 if isinstance(module, nn.Linear) else None
    ).remove


def pre_hook_on_all(net):
    return nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (inputs[0] / 4,) if isinstance(module, nn.Linear) else None
    ).remove


def patched_class(net):
    plain = nn.Linear.forward
    nn.Linear.forward = lambda self, x: plain(self, x) / 4
    return lambda: setattr(nn.Linear, "forward", plain)


def other_methods_class(net):
    plain = nn.Linear.forward
    nn.Linear.forward = nn.Identity.forward
    return lambda: setattr(nn.Linear, "forward", plain)


def patched_students(net):
    plain = pydistill.nn.student.Student.embed
    pydistill.nn.student.Student.embed = lambda self, x: plain(self, x) / 4
    return lambda: setattr(pydistill.nn.student.Student, "embed", plain)


def parametrised(net):
    nn.utils.parametrizations.weight_norm(net.classifier)


CHANGES = [patched_net, patched_layer, hook, backward_hook, hook_on_all, pre_hook_on_all, patched_class]


@pytest.mark.parametrize("change", [*CHANGES, patched_students])
def test_what_somebody_changed_is_run_as_it_is(change, caplog):
    torch.manual_seed(0)
    net = ConvNet(3, 4, width=8, depth=2, image_size=8)
    theta, x, y = FlatModule(net).parameters(), torch.randn(8, *IMAGE), torch.arange(8) % 4
    plain = pydistill.unroll(net, theta, x, y, 0.1, steps=2)
    undo = change(net)
    try:
        with caplog.at_level(logging.DEBUG, "pydistill"):
            found = pydistill.unroll(net, theta, x, y, 0.1, steps=2)
        with pytest.raises(ValueError, match=r"student engine can run, but .*(hooks|instance|own|it runs div)"):
            pydistill.unroll(net, theta, x, y, 0.1, steps=2, engine="student")
        assert torch.equal(found, pydistill.unroll(net, theta, x, y, 0.1, steps=2, engine="generic"))
        assert "generic engine: " in caplog.text
        assert (found - plain).norm() > 0.1 * (plain - theta).norm()  # it does change something
    finally:
        if undo:
            undo()


@pytest.mark.parametrize("change", [other_methods_class, parametrised, patched_inside])
def test_other_ways_to_change_a_layer(change):
    net = Net()
    undo = change(net)
    try:
        assert reason_of(net) != ""
    finally:
        if undo:
            undo()
    if undo:
        assert reason_of(net) == ""


@pytest.mark.parametrize("output", [1, -1])
def test_an_element_of_a_tuple_runs_on_the_engine(output):
    net = following(lambda self, x: Net.forward(self, x, wants_features=True))
    theta, x, y = FlatModule(net).parameters().double(), torch.randn(6, *IMAGE).double(), torch.arange(6) % 4
    options = {"steps": 3, "output": output}
    found = pydistill.unroll(net, theta, x, y, 0.1, engine="student", **options)
    assert torch.allclose(found, pydistill.unroll(net, theta, x, y, 0.1, engine="generic", **options), rtol=1e-10)
    for wrong in (0, 2, None):
        with pytest.raises(ValueError, match=r"student engine can run, but Net.forward computes something else"):
            pydistill.unroll(net, theta, x, y, 0.1, steps=3, engine="student", output=wrong)


# ---- networks in wrappers


class Reparam(nn.Module):
    """As the repositories have it: parameters become plain attributes, pieces of one vector."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self._infos = [(mn, n) for mn, m in self.named_modules() for n, _ in m.named_parameters(recurse=False)]
        found = [getattr(self.get_submodule(mn), n) for mn, n in self._infos]
        self._shapes = [p.shape for p in found]
        self.flat_param = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in found]))
        for mn, n in self._infos:
            delattr(self.get_submodule(mn), n)
        self._fill(self.flat_param)

    def _fill(self, flat):
        pieces = flat.split([shape.numel() for shape in self._shapes])
        for (mn, n), piece, shape in zip(self._infos, pieces, self._shapes, strict=True):
            setattr(self.get_submodule(mn), n, piece.view(shape))

    def forward(self, *inputs, flat_param=None):
        self._fill(torch.squeeze(flat_param))
        return self.module(*inputs)


class Halving(Reparam):
    def forward(self, *inputs, flat_param=None):
        return super().forward(*inputs, flat_param=flat_param) / 2


class Reversed(Reparam):
    def _fill(self, flat):
        super()._fill(flat.flip(0))


WRAPPERS = [
    nn.DataParallel,
    torch.compile,
    pydistill.compat.ReparamModule,
    Reparam,
    lambda n: nn.DataParallel(Reparam(n)),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("engine", ["student", "generic"])
def test_wrappers_stand_for_the_network_inside(wrap, engine):
    torch.manual_seed(0)
    net = Net().double()
    theta, x, y = FlatModule(net).parameters(), torch.randn(6, *IMAGE).double(), torch.arange(6) % 4
    plain = pydistill.unroll(net, theta, x, y, 0.1, steps=2)
    wrapped = wrap(copy.deepcopy(net))
    assert torch.equal(FlatModule(wrapped).parameters(), theta)
    assert torch.allclose(pydistill.unroll(wrapped, theta, x, y, 0.1, steps=2, engine=engine), plain, rtol=1e-10)
    result = pydistill.train_students(wrapped, theta[None], x, y, epochs=2, lr=0.1, engine=engine)
    result.copy_into(wrapped, 0)
    assert torch.equal(FlatModule(wrapped).parameters(), result.theta[0])
    if hasattr(wrapped, "flat_param") and engine == "generic":
        assert torch.allclose(wrapped(x, flat_param=theta), net(x))


@pytest.mark.parametrize("kind", [Halving, Reversed])
def test_a_wrapper_that_does_more_is_called_as_it_is(kind):
    torch.manual_seed(0)
    net = kind(Net().double())
    theta, x, y = net.flat_param.detach().clone(), torch.randn(6, *IMAGE).double(), torch.arange(6) % 4
    assert reason_of(net) != ""
    moving = theta.clone().requires_grad_()
    found = pydistill.unroll(net, moving, x, y, 0.1, steps=1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x, flat_param=moving), y), moving)
    assert torch.allclose(found, theta - 0.1 * gradient, rtol=1e-10)


def test_batchnorms_in_a_reparametrised_network_keep_their_statistics():
    net = Net().double()
    net.features[1] = nn.BatchNorm2d(8).double()
    plain, wrapped = copy.deepcopy(net), Reparam(net)
    theta, x, y = FlatModule(plain).parameters(), torch.randn(6, *IMAGE).double(), torch.arange(6) % 4
    found = [pydistill.unroll(each, theta, x, y, 0.1, steps=2) for each in (plain, wrapped)]
    assert torch.equal(*found)
    assert torch.equal(wrapped.module.features[1].running_mean, plain.features[1].running_mean)
    assert plain.features[1].num_batches_tracked == 2


def test_wrappers_that_cannot_be_seen_through_are_refused():
    wrapped = nn.DataParallel(Net())
    wrapped.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"net: expected the Net inside, got a DataParallel with hooks of its own"):
        FlatModule(wrapped)
    with pytest.raises(TypeError, match=r"net: expected the nn.Module that was scripted"):
        FlatModule(torch.jit.script(nn.Linear(2, 2)))
