"""Random streams: the numbers behind their names are part of every published result."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pydistill.seeding import Stream, seeded_generator, seeded_net, torch_seeded


def test_a_key_s_stream_is_what_it_always_was() -> None:
    generator = seeded_generator(3, Stream.OUTER_STEP, 1)
    assert generator.initial_seed() == 4592611067072332296
    assert torch.randint(1000, (4,), generator=generator).tolist() == [986, 43, 529, 268]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (("EXPERT", "EXPERT_BATCHES", "TEST_STUDENT", "TEST_STUDENT_BATCHES", "TEST_REAL_IMAGES"), (0, 1, 2, 3, 4)),
        (("SYNTHETIC", "OUTER_STEP", "OUTER_STEP_NET", "INNER_TRAINING"), (5, 6, 7, 8)),
        (("PICKING", "BINS", "COMBINED"), (5, 6, 7)),
        (("TEACHER", "TEACHER_BATCHES"), (0, 1)),
        (("REAL_START", "RECOVER_CROPS", "NOISE_START"), (0, 1, 2)),
        (("RELABEL_BATCHES", "POST_TRAINED"), (1, 3)),
        (("TARGET", "SELF_SUPERVISED", "POOL", "POOL_AGES", "KRR_BATCH", "KRR_IMAGES"), (10, 11, 20, 21, 22, 23)),
        (("PRETRAINED", "PROJECTOR", "VIEWS", "FIT_BATCHES", "STUDENT_BATCHES", "ENCODER"), (30, 40, 41, 42, 43, 44)),
        (("PROJECTED_TEACHER", "PROJECTED_STUDENT", "PROJECTED_TEACHER_BATCHES"), (45, 46, 47)),
        (("UNIP_TEACHER", "UNIP_STUDENT"), (0, 1)),
    ],
    ids=lambda value: value[0],
)
def test_numbers_that_results_hang_on(names: tuple[str, ...], numbers: tuple[int, ...]) -> None:
    assert tuple(int(Stream[name]) for name in names) == numbers


def test_every_number_of_the_key_counts() -> None:
    keys = [(0, 5), (5, 0), (0, 5, 1), (1, 5), (0, 6), (0, 0, 5)]
    assert len({seeded_generator(*key).initial_seed() for key in keys}) == len(keys)


def test_torchs_generator_is_as_it_was() -> None:
    before = torch.random.get_rng_state()
    with torch_seeded(seeded_generator(1, 2)):
        drawn = torch.rand(3)
    net = seeded_net(lambda: nn.Linear(3, 2), 1, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(
        drawn, torch.rand(3, generator=torch.Generator().manual_seed(seeded_generator(1, 2).initial_seed()))
    )
    assert torch.equal(net.weight, seeded_net(lambda: nn.Linear(3, 2), 1, 2).weight)
    assert not torch.equal(net.weight, seeded_net(lambda: nn.Linear(3, 2), 1, 3).weight)
