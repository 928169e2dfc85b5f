"""Random numbers of rows that several processes have dealt."""

from __future__ import annotations

import torch
from conftest import make_model, sharpen

from sdft.decode import DecodeEngine
from sdft.draws import Draws, Uniform, drawing
from sdft.rollout import Sampling

CPU = torch.device("cpu")


def test_without_draws_they_are_the_global_generators() -> None:
    torch.manual_seed(3)
    uniform = Uniform(4, CPU)
    uniform.draw()
    torch.manual_seed(3)
    assert torch.equal(uniform.values_B, torch.rand(4))


def test_a_process_takes_the_numbers_of_its_rows() -> None:
    torch.manual_seed(3)
    alone = Uniform(5, CPU)
    with drawing(Draws((1, 3), 5, seed=3)):
        own = Uniform(2, CPU)
    memory = own.values_B.data_ptr()
    state = torch.get_rng_state()
    for _ in range(3):
        own.draw()
    assert torch.equal(state, torch.get_rng_state())
    for _ in range(3):
        alone.draw()
    assert torch.equal(own.values_B, alone.values_B[[1, 3]])
    assert own.values_B.data_ptr() == memory


def test_completions_do_not_depend_on_who_draws_them() -> None:
    model = sharpen(make_model(), 2.0)
    prompts, sampling = [[3, 9], [4, 11, 12], [3], [5, 6]], Sampling(10)
    torch.manual_seed(11)
    alone = DecodeEngine().generate(model, prompts, sampling, [1], 0).completions()
    for places in ((0, 2), (1, 3), (3,), (0, 0, 1)):
        with drawing(Draws(places, 4, seed=11)):
            own = [prompts[place] for place in places]
            found = DecodeEngine().generate(model, own, sampling, [1], 0).completions()
        assert found == [alone[place] for place in places]
