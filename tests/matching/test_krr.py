"""Every form of the kernel ridge regression loss against its definition, singular kernels, and the messages."""

import pytest
import torch

from pydistill import matching
from pydistill import reference as definitions

FORMS = ("kernel", "weights", "primal")


def krr_loss(f_real, f_syn, y_syn, y_real, **options):
    return matching.krr_loss(f_real, f_syn, y_real=y_real, y_syn=y_syn, **options)


def reference(f_real, f_syn, y_syn, y_real, **options):
    return definitions.krr_loss(f_real, f_syn, y_real=y_real, y_syn=y_syn, **options)


def problem(B=7, m=5, d=9, q=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(B + m + d + q)
    shapes = ((B, d), (m, d), (m, q), (B, q))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in drawn]


def with_gradients(function, inputs, **options):
    loss = function(*inputs, **options)
    wanted = [t for t in inputs if t.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, wanted)


def relative_error(value, truth):
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(7, 5, 9, 3), (5, 9, 4, 2), (1, 1, 1, 1), (300, 260, 270, 2)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "trace_detach": False}, {"reduction": "sum", "trace_detach": False}], ids=str
)
def test_is_its_definition(form, sizes, options):
    """To what rounding makes of a condition of 1e3, whatever the form, and with slices that do not divide B."""
    inputs, options = problem(*sizes), {"lam": 1e-2, **options}
    found = with_gradients(krr_loss, inputs, form=form, chunk=3, **options)
    for value, truth in zip(found, with_gradients(reference, inputs, **options), strict=True):
        assert truth.norm() > 0
        assert relative_error(value, truth) < 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(form, bias):
    options = {"form": form, "bias": bias, "trace_detach": False, "lam": 0.1, "chunk": 2}
    assert torch.autograd.gradcheck(lambda *inputs: krr_loss(*inputs, **options), problem(5, 4, 3, 2))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2), ()], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_some_inputs_alone(form, wanted):
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(problem())]
    loss = krr_loss(*inputs, form=form, lam=1e-2)
    assert loss.requires_grad == bool(wanted)
    torch.testing.assert_close(loss.detach(), reference(*inputs, lam=1e-2).detach())
    if wanted:
        for value, truth in zip(
            torch.autograd.grad(3 * loss, [inputs[i] for i in wanted]),
            torch.autograd.grad(3 * reference(*inputs, lam=1e-2), [inputs[i] for i in wanted]),
            strict=True,
        ):
            assert relative_error(value, truth) < 1e-9


def test_backward_twice_over_a_retained_graph():
    inputs = problem()
    loss = krr_loss(*inputs)
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in inputs]
    loss.backward()
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip(inputs, first, strict=True))


def test_the_form_is_chosen_by_size():
    for sizes, form in (((9, 6, 5, 2), "primal"), ((9, 6, 5 + 1, 1), "weights"), ((9, 6, 7, 6), "kernel")):
        assert krr_loss(*problem(*sizes), return_info=True)[1].form == form
    assert krr_loss(*problem(9, 6, 5, 6), bias=True, return_info=True)[1].form == "kernel"  # six columns with the ones


@pytest.mark.parametrize("form", FORMS)
def test_float32_is_about_as_exact_as_the_definition(form):
    """At most three times the error of torch.linalg.solve in float32, on features that a ReLU leaves."""
    sizes = (64, 40, 30, 8) if form == "primal" else (64, 40, 300, 8)
    inputs = [t.detach() for t in problem(*sizes, dtype=torch.float32)]
    inputs = [t.relu().requires_grad_() if i < 2 else t.requires_grad_() for i, t in enumerate(inputs)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    truth = with_gradients(reference, wide, bias=True)
    plain = with_gradients(reference, inputs, bias=True)
    for value, other, true in zip(with_gradients(krr_loss, inputs, bias=True, form=form), plain, truth, strict=True):
        assert relative_error(value, true) <= max(3 * relative_error(other, true), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    inputs = problem(dtype=dtype)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    found, truth = with_gradients(krr_loss, inputs), with_gradients(krr_loss, wide)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], truth[0])
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found[1:], truth[1:], strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(krr_loss(*inputs), truth[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_that_float32_cannot_factor_is_factored_in_float64(form):
    """Two rows that differ by 1e-4 of their length, without a ridge: as exact as float64 and the condition allow."""
    inputs = [t.detach() for t in problem(6, 3, 3 if form == "primal" else 9, 2, torch.float32)]
    inputs[1][1] = inputs[1][0] + 1e-4 * inputs[0][2]
    loss, info = krr_loss(*inputs, lam=0.0, form=form, return_info=True)
    assert (info.dtype, info.jitter, info.ridge) == (torch.float64, 0.0, 0.0)
    truth = reference(*(t.double() for t in inputs), lam=0.0)
    condition = float(torch.linalg.cond(inputs[1].double())) ** 2
    assert 1e8 < condition < 1e11
    rounding = torch.finfo(torch.float32).eps + 4 * condition * torch.finfo(torch.float64).eps
    assert relative_error(loss, truth) < rounding


@pytest.mark.parametrize("form", ["kernel", "weights"])
def test_a_singular_kernel_takes_the_first_jitter_that_does(form):
    inputs = [t.detach().requires_grad_() for t in problem()]
    with torch.no_grad():
        inputs[1][1] = inputs[1][0]
    loss, info = krr_loss(*inputs, lam=0.0, form=form, return_info=True)
    assert info.jitter == 1e-12
    assert info.ridge == pytest.approx(1e-12 * float(inputs[1].detach().square().sum()))
    torch.testing.assert_close(loss, reference(*inputs, lam=1e-12), rtol=1e-2, atol=0)
    assert krr_loss(*inputs, lam=1e-3, return_info=True)[1].jitter == 0


def test_what_no_jitter_helps_is_refused():
    inputs = problem()
    with pytest.raises(ValueError, match=r"f_syn: expected rows whose kernel is positive definite.*got one of trace 0"):
        krr_loss(inputs[0], torch.zeros_like(inputs[1]), *inputs[2:])
    assert krr_loss(inputs[0], torch.zeros_like(inputs[1]), *inputs[2:], bias=True).isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_comes_out_as_nan(value, which, form):
    inputs = problem()
    with torch.no_grad():
        inputs[which][0, 0] = value
    loss = krr_loss(*inputs, form=form)
    assert not loss.isfinite()
    assert not torch.autograd.grad(loss, inputs[1])[0].isfinite().all()


def test_no_second_derivative():
    inputs = problem()
    with pytest.raises(NotImplementedError, match="krr_loss has first derivatives only"):
        torch.autograd.grad(krr_loss(*inputs), inputs[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="krr_loss has first derivatives only"):
        torch.func.grad(krr_loss)(*(t.detach() for t in inputs))


def test_under_compile_it_stays_outside_the_graph():
    inputs = problem()

    def twice(*inputs):
        return 2 * krr_loss(*inputs, lam=1e-2)

    compiled = with_gradients(torch.compile(twice, backend="aot_eager"), inputs)
    for value, truth in zip(compiled, with_gradients(twice, inputs), strict=True):
        torch.testing.assert_close(value, truth)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="krr_loss: expected to stay outside the graph, got fullgraph=True"):
        torch.compile(twice, fullgraph=True, backend="aot_eager")(*inputs)


def test_strided_inputs_and_equal_bits_from_run_to_run():
    inputs = [t.detach().mT.contiguous().mT.requires_grad_() for t in problem(40, 30, 50, 20, torch.float32)]
    first = with_gradients(krr_loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(krr_loss, inputs), first, strict=True))
    plain = with_gradients(krr_loss, [t.detach().contiguous().requires_grad_() for t in inputs])
    for a, b in zip(first, plain, strict=True):
        assert relative_error(a, b) < 1e-3


X = [torch.randn(4, 3), torch.randn(5, 3), torch.randn(5, 2), torch.randn(4, 2)]


@pytest.mark.parametrize(
    ("changed", "options", "error", "message"),
    [
        ({0: [1.0]}, {}, TypeError, "f_real: expected a tensor, got list"),
        ({1: X[1].int()}, {}, TypeError, "f_syn: expected float32, .*, got torch.int32"),
        ({2: X[2][0]}, {}, ValueError, r"y_syn: expected a matrix with at least one element, got shape \[2\]"),
        ({0: X[0][:0]}, {}, ValueError, r"f_real: expected a matrix with at least one element, got shape \[0, 3\]"),
        ({3: X[3].double()}, {}, ValueError, "y_real: expected torch.float32 on cpu as f_real, got torch.float64"),
        ({1: X[1][:, 1:]}, {}, ValueError, r"f_syn: expected \[5, 3\], got \[5, 2\]"),
        ({2: X[2][1:]}, {}, ValueError, r"y_syn: expected \[5, 2\], got \[4, 2\]"),
        ({3: X[3][:, :1]}, {}, ValueError, r"y_real: expected \[4, 2\], got \[4, 1\]"),
        ({}, {"lam": -1.0}, ValueError, "lam: expected a finite number of at least 0, got -1.0"),
        ({}, {"reduction": "none"}, ValueError, "reduction: expected 'mean' or 'sum', got 'none'"),
        ({}, {"form": "dual"}, ValueError, "form: expected 'auto', 'kernel', 'weights' or 'primal', got 'dual'"),
        ({}, {"chunk": 0}, ValueError, "chunk: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_input_is_named(changed, options, error, message):
    with pytest.raises(error, match=message):
        krr_loss(*(changed.get(i, x) for i, x in enumerate(X)), **options)
