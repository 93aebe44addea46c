"""Equal bits from run to run, and the same to rounding whatever the number of threads."""

import torch


def check_from_run_to_run(run):
    """``run`` returns tensors: equal ones again and again, and with one thread what differs by rounding."""
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for a, b in zip(run(), first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))
    finally:
        torch.set_num_threads(threads)
