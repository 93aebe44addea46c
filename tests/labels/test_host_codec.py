"""The host codec against NumPy: checksums, top-k rows, ties, and what it refuses."""

import threading
import zlib

import numpy as np
import pytest

from pydistill import _host


def softmax(values, T=1.0):
    exp = np.exp((values - values.max(1, keepdims=True)).astype(np.float64) / T)
    return exp / exp.sum(1, keepdims=True)


def random_logits(n, classes, scale=4.0):
    return (np.random.default_rng(0).standard_normal((n, classes)) * scale).astype(np.float32)


@pytest.mark.parametrize("size", [*range(18), 63, 64, 65, 127, 128, 129, 191, 1000, 4096, 65537])
def test_crc32_is_zlibs(size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    for start in (0, 1, 0xFFFFFFFF, 0x12345678):
        assert _host.crc32(data, start) == zlib.crc32(data.tobytes(), start)
    assert _host.crc32(data[size // 3 :], _host.crc32(data[: size // 3])) == zlib.crc32(data.tobytes())


def test_crc32_takes_consecutive_bytes_only():
    assert _host.crc32(np.arange(6).reshape(2, 3)) == zlib.crc32(np.arange(6).tobytes())
    with pytest.raises(ValueError, match="data: expected consecutive bytes"):
        _host.crc32(np.arange(6)[::2])


@pytest.mark.parametrize(("classes", "k"), [(1, 1), (7, 7), (10, 3), (1000, 10), (65536, 5)])
@pytest.mark.parametrize(("step", "bound"), [(0.0, 1.1e-3), (1 / 16, 7e-2)])
@pytest.mark.parametrize("T", [1.0, 20.0])
def test_rows_come_back(classes, k, step, bound, T):
    """Twice the rounding of a weight, as the sum that it is divided by is rounded too; within the range of its bits."""
    logits = random_logits(5, classes, 2.0)
    truth = softmax(logits, T)
    rows = _host.encode_topk(logits, k, step, False, T)
    assert rows.shape == (5, 4 + k * (3 if step else 4))
    indices, values, tail = _host.decode_topk(rows, classes, k, step)
    assert np.array_equal(indices, np.argsort(-logits, 1, kind="stable")[:, :k])
    kept = np.take_along_axis(truth, indices, 1)
    normal = kept > kept[:, :1] * (2.0**-14 if not step else np.exp(-255 * step))
    assert np.abs(values / kept - 1)[normal].max() < bound
    np.testing.assert_allclose(tail, 1 - kept.sum(1), atol=1e-7)
    np.testing.assert_allclose(values.sum(1, dtype=np.float64) + tail, 1, atol=1e-6)
    if k == classes:
        assert not tail.any()


def test_probabilities_give_the_rows_of_their_logits():
    logits = random_logits(20, 50)
    probs = softmax(logits, 3.0).astype(np.float32)
    for step in (0.0, 1 / 16):
        found, truth = (
            _host.decode_topk(_host.encode_topk(values, 6, step, *how), 50, 6, step)
            for values, how in ((probs, (True, 1.0)), (logits, (False, 3.0)))
        )
        assert np.array_equal(found[0], truth[0])
        np.testing.assert_allclose(found[1], truth[1], rtol=7e-2)  # at most one code, if a logarithm is at the edge
        np.testing.assert_allclose(found[2], truth[2], rtol=1e-5)


def test_of_equal_logits_the_lower_class_is_kept():
    logits = np.zeros((2, 9), np.float32)
    logits[1, [8, 2, 5]] = 1
    indices, values, tail = _host.decode_topk(_host.encode_topk(logits, 4, 0.0, False, 1.0), 9, 4, 0.0)
    assert indices.tolist() == [[0, 1, 2, 3], [2, 5, 8, 0]]
    np.testing.assert_allclose(values[0], 1 / 9, rtol=1e-6)
    np.testing.assert_allclose(tail[0], 5 / 9, rtol=1e-6)


def test_certain_labels_do_not_lose_their_mass():
    """The largest logit far ahead: the others underflow, and their codes stop at the last one."""
    logits = np.array([[0.0, 1000.0, -1000.0, 500.0]], np.float32)
    for step in (0.0, 1 / 16):
        indices, values, tail = _host.decode_topk(_host.encode_topk(logits, 3, step, False, 1.0), 4, 3, step)
        assert indices.tolist() == [[1, 3, 0]]
        assert values[0, 0] > 1 - 1e-6
        assert 0 <= values[0, 2] <= values[0, 1] < 2e-7
        assert tail[0] == 0


@pytest.mark.parametrize(
    ("values", "probs", "message"),
    [
        ([[1.0, 2.0], [0.0, np.nan]], False, "row 1: expected finite numbers"),
        ([[np.inf, 2.0]], False, "row 0: expected finite numbers"),
        ([[1.5, -0.5]], True, "row 0: expected probabilities, got a negative number"),
        ([[0.5, 0.5], [0.5, 0.4]], True, "row 1: expected probabilities, got numbers that do not add up to one"),
        ([1.0, 2.0], False, r"values: expected \[N, C\], got \[2\]"),
    ],
)
def test_what_is_no_label_is_refused(values, probs, message):
    with pytest.raises(ValueError, match=message):
        _host.encode_topk(np.array(values, np.float32), 1, 0.0, probs, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.0, False, 1.0), "k: expected 1 to the 3 classes, got 0"),
        ((4, 0.0, False, 1.0), "k: expected 1 to the 3 classes, got 4"),
        ((1, -1.0, False, 1.0), "step: expected a positive number, or 0"),
        ((1, 0.0, False, 0.0), "temperature: expected a positive number"),
        ((1, 0.0, False, float("nan")), "temperature: expected a positive number"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _host.encode_topk(np.zeros((2, 3), np.float32), *arguments)


def test_rows_that_are_not_of_this_form_are_refused():
    rows = _host.encode_topk(random_logits(3, 20), 4, 0.0, False, 1.0)
    with pytest.raises(ValueError, match=r"rows: expected \[N, 24 or more\] of consecutive bytes, got \[3, 20\]"):
        _host.decode_topk(rows, 20, 5, 0.0)
    with pytest.raises(ValueError, match="of consecutive bytes"):
        _host.decode_topk(np.zeros((3, 80), np.uint8)[:, ::2], 20, 4, 0.0)
    rows[1, 4:6] = 255
    with pytest.raises(ValueError, match="row 1: a class is not below 20"):
        _host.decode_topk(rows, 20, 4, 0.0)
    with pytest.raises(TypeError, match="incompatible function arguments"):  # no silent copy in another precision
        _host.encode_topk(np.zeros((2, 3)), 1, 0.0, False, 1.0)


def test_longer_rows_and_no_rows():
    rows = _host.encode_topk(random_logits(3, 20), 4, 1 / 16, False, 1.0)
    longer = np.full((3, rows.shape[1] + 7), 255, np.uint8)
    longer[:, : rows.shape[1]] = rows
    for a, b in zip(_host.decode_topk(rows, 20, 4, 1 / 16), _host.decode_topk(longer, 20, 4, 1 / 16), strict=True):
        assert np.array_equal(a, b)
    assert _host.encode_topk(np.zeros((0, 20), np.float32), 4, 0.0, False, 1.0).shape == (0, 20)
    assert [len(each) for each in _host.decode_topk(np.zeros((0, 20), np.uint8), 20, 4, 0.0)] == [0, 0, 0]


def test_other_threads_run_meanwhile():
    """The encoder releases the interpreter: a counting thread makes progress while it works."""
    logits, counted, done = random_logits(2000, 1000), [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counted[0]
        _host.encode_topk(logits, 10, 0.0, False, 1.0)
        assert counted[0] > before
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
def test_a_row_has_steps_as_fine_as_it_lets_them_be(T):
    """At most half a step off, of the 255 that reach from the first class kept to the last."""
    logits = random_logits(20, 50, 2.0)
    for probs in (False, True):
        values = softmax(logits, T).astype(np.float32) if probs else logits
        rows = _host.encode_topk(values, 50, 1 / 16, probs, T, True)
        indices, found, tail = _host.decode_topk(rows, 50, 50, 1 / 16)
        assert not tail.any()
        truth = np.take_along_axis(softmax(logits, T), indices, 1)
        off = np.log(found.astype(float) / found[:, :1]) - np.log(truth / truth[:, :1])
        span = np.log(truth[:, 0] / truth[:, -1])
        assert (np.abs(off).max(1) <= 0.5 * 2 ** (1 / 16) * span / 255 + 1e-6).all()
    flat = np.zeros((2, 9), np.float32)
    for form in ((9, 1 / 16), (1, 1 / 16), (1, 0.0)):
        _, found, tail = _host.decode_topk(_host.encode_topk(flat, *form, False, T, True), 9, *form)
        np.testing.assert_allclose(found, 1 / 9, rtol=1e-6)


def test_steps_that_are_no_finer_are_those_of_old_rows():
    """A class of zero probability takes all steps to reach, and the first class's byte was zero before."""
    probs = np.array([[0.75, 0.25, 0.0]], np.float32)
    rows = [_host.encode_topk(probs, 3, 1 / 16, True, 1.0, row_step) for row_step in (False, True)]
    assert np.array_equal(*rows)
    assert rows[0][0, 10] == 0


def test_every_code_at_every_fineness_whatever_the_step_before():
    """Weights are e^(-step 2^(-finer / 16) code), of tables that are kept from call to call for a step."""
    finer, code = (each.reshape(-1) for each in np.indices((256, 256)))
    rows = np.zeros((256 * 256, 10), np.uint8)  # the mass of the others, the classes 0 and 1, a byte for each
    rows[:, 6], rows[:, 8], rows[:, 9] = 1, finer, code
    for step in (1 / 16, 1 / 32, 1 / 16):
        _, values, _ = _host.decode_topk(rows, 2, 2, step)
        weights = np.exp(-step * 2.0 ** (-finer / 16) * code)
        np.testing.assert_allclose(values[:, 1], weights / (1 + weights), rtol=2e-7)
        np.testing.assert_allclose(values[:, 0], 1 / (1 + weights), rtol=2e-7)
