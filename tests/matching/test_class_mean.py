"""The distance of class means against a literal loop, and the messages."""

import pytest
import torch

from pydistill.matching import attention_match, check_classes, class_mean_match, class_means
from tests.repeats import check_from_run_to_run

REAL = torch.tensor([2, 0, 0, 3, 2, 2, 0, 2])  # class 1 has no rows on either side
SYN = torch.tensor([3, 0, 2, 2, 3])


def literal(f_real, f_syn, labels_real=REAL, labels_syn=SYN, classes=(0, 2, 3)):
    return torch.stack(
        [(f_real[labels_real == k].mean(0) - f_syn[labels_syn == k].mean(0)).square().sum() for k in classes]
    )


def features(dtype=torch.float64, d=3):
    generator = torch.Generator().manual_seed(0)
    sizes = (len(REAL), len(SYN))
    return [(torch.randn(n, d, generator=generator, dtype=torch.float64) + 1).to(dtype).requires_grad_() for n in sizes]


@pytest.mark.parametrize("num_classes", [None, 4, 6])
def test_classes_of_any_size(num_classes):
    f = features()
    each = literal(*f)
    found = class_mean_match(*f, REAL, SYN, num_classes=num_classes, reduction="none")
    assert found.shape == (num_classes or 4,)
    torch.testing.assert_close(found[[0, 2, 3]], each)
    assert found[1] == 0
    for reduction, truth in (("sum", each.sum()), ("mean", each.mean())):
        found = class_mean_match(*f, REAL, SYN, num_classes=num_classes, reduction=reduction)
        torch.testing.assert_close(found, truth)
        for a, b in zip(*(torch.autograd.grad(t, f, retain_graph=True) for t in (found, truth)), strict=True):
            torch.testing.assert_close(a, b)


def test_gradcheck_to_the_second_order():
    def loss(*f):
        return class_mean_match(*f, REAL, SYN, num_classes=5, reduction="none").exp()

    assert torch.autograd.gradcheck(loss, features())
    assert torch.autograd.gradgradcheck(loss, features())


def test_class_means():
    f = features()[0]
    found = class_means(f, REAL, 5)
    torch.testing.assert_close(found[[0, 2, 3]], torch.stack([f[k == REAL].mean(0) for k in (0, 2, 3)]))
    assert found[[1, 4]].isnan().all()
    (grad,) = torch.autograd.grad(found.nan_to_num(0).square().sum(), f)
    assert grad.isfinite().all()
    without = class_means(f, torch.where(REAL == 3, 9, REAL), 3)  # 9 belongs to no class
    torch.testing.assert_close(without[0], found[0], rtol=1e-12, atol=1e-12)
    in_bf16 = class_means(torch.ones(301, 2, dtype=torch.bfloat16), torch.zeros(301, dtype=torch.int64), 1)
    assert in_bf16.dtype == torch.float32
    assert torch.equal(in_bf16, torch.ones(1, 2))  # a sum in bfloat16 would stop at 256
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(class_means(f.float(), REAL, 5)[0], class_means(f.float(), REAL, 5)[0])
        assert class_means(f.float(), REAL, 5).dtype == torch.float32


def test_where_labels_are_not_looked_at_a_missing_class_is_nan():
    """As on a GPU: here under vmap, where their values are not accessible either."""
    f_real, f_syn = features()

    def loss(labels_syn):
        return class_mean_match(f_real, f_syn, REAL, labels_syn, num_classes=5)

    lacking = torch.where(SYN == 0, 2, SYN)
    found = torch.func.vmap(loss)(torch.stack([SYN, lacking]))
    torch.testing.assert_close(found[0], literal(f_real, f_syn).sum())
    assert found[1].isnan()


@pytest.mark.parametrize("loss", [class_mean_match, lambda x, y, *labels: attention_match([x], [y], *labels)])
def test_a_whole_graph_asks_for_the_number_of_classes(loss):
    side = [4, 4] if loss is not class_mean_match else []
    inputs = torch.randn(6, 5, *side), torch.randn(4, 5, *side), torch.arange(6) % 2, torch.arange(4) % 2
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="num_classes: expected the number of classes in a whole graph, got None"):
        torch.compile(loss, fullgraph=True, backend="eager")(*inputs)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, backend="eager")(*inputs), loss(*inputs))


def test_func_and_compile():
    f = [t.detach() for t in features(torch.float32)]

    def loss(f_real, f_syn):
        return class_mean_match(f_real, f_syn, REAL, SYN, num_classes=4)

    expected = torch.func.grad(loss, (0, 1))(*f)
    wanted = [t.clone().requires_grad_() for t in f]
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*wanted), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16, torch.float32)])
def test_low_precision_is_averaged_in_float32(dtypes):
    f = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(features(d=65), dtypes, strict=True)]
    found, truth = class_mean_match(*f, REAL, SYN), literal(*(t.double() for t in f)).sum()
    assert found.dtype == torch.float32
    assert float((found - truth).detach().abs() / truth.detach()) < 1e-6
    assert [g.dtype for g in torch.autograd.grad(found, f)] == list(dtypes)


def test_equal_bits_from_run_to_run():
    generator = torch.Generator().manual_seed(0)
    f = [torch.randn(n, 2048, generator=generator).requires_grad_() for n in (1280, 100)]
    labels = [torch.arange(n) % 10 for n in (1280, 100)]

    def run():
        loss = class_mean_match(*f, *labels, num_classes=10)
        return loss, *torch.autograd.grad(loss, f)

    check_from_run_to_run(run)


F_REAL, F_SYN = torch.randn(8, 3), torch.randn(5, 3)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"f_real": None}, TypeError, "f_real: expected a tensor, got NoneType"),
        ({"labels_syn": [0]}, TypeError, "labels_syn: expected a tensor, got list"),
        ({"f_syn": F_SYN.int()}, TypeError, "f_syn: expected float32, float64, bfloat16 or float16, got torch.int32"),
        ({"f_real": F_REAL[0]}, ValueError, r"f_real: expected \[rows, d\], got \[3\]"),
        ({"f_syn": F_SYN[:, 1:]}, ValueError, r"f_syn: expected \[b, 3\] on cpu as f_real, got \[5, 2\] on cpu"),
        ({"labels_real": REAL[1:]}, ValueError, r"labels_real: expected \[8\] on cpu as f_real, got \[7\] on cpu"),
        ({"labels_syn": SYN.int()}, TypeError, "labels_syn: expected int64 class numbers, got torch.int32"),
        ({"num_classes": 3}, ValueError, r"labels_real: expected class numbers in 0\.\.2 for 3 classes, got 3"),
        ({"labels_syn": SYN - 1}, ValueError, r"labels_syn: expected class numbers in 0\.\.3 for 4 classes, got -1"),
        ({"labels_syn": SYN.clamp(max=2)}, ValueError, "labels_syn: expected rows of class 3, which labels_real has"),
        ({"labels_real": REAL.clamp(max=2)}, ValueError, "labels_real: expected rows of class 3, which labels_syn has"),
        ({"num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
        ({"reduction": "max"}, ValueError, "reduction: expected 'sum', 'mean' or 'none', got 'max'"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    call = {"f_real": F_REAL, "f_syn": F_SYN, "labels_real": REAL, "labels_syn": SYN} | changed
    with pytest.raises(error, match=message):
        class_mean_match(**call)


def test_no_class_at_all_is_refused():
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels_real, labels_syn: expected rows of at least one class, got none"):
        check_classes(none, none, 3)
    with pytest.raises(ValueError, match="labels_real: expected rows of class 0, which labels_syn has, got none"):
        check_classes(none, SYN)
    with pytest.raises(ValueError, match="expected class numbers of at least 0, got -2"):
        check_classes(none - 1, torch.tensor([-2]))
    assert check_classes(REAL, SYN) == 4
