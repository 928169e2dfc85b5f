"""What goes through a model is counted, wherever it goes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_module

from sdft import SDFTModule
from sdft.batch import pad
from sdft.cost import Ledger
from sdft.flops import ModelFlops
from sdft.rollout import Rollout, Sampling
from sdft.scoring import completion_logits

PROMPTS = [[3, 6, 9, 4, 6], [3, 6, 9, 10, 11, 12, 4, 6], [9]]
LENGTHS = [4, 1, 2]  # of the completions; padded to 4


def hand_made() -> Rollout:
    ids, mask = pad([[9] * length for length in LENGTHS], 0, "right", torch.device("cpu"))
    return Rollout(ids, mask, torch.zeros(3).bool())


class Fixed:
    """An engine that always answers with the hand-made completions."""

    def generate(self, *args: Any) -> Rollout:
        return hand_made()


@pytest.fixture
def module(model_dir: Path) -> SDFTModule:
    made = make_module(model_dir, engine=Fixed())
    made.configure_model()
    return made


def counted(module: SDFTModule, phase: str) -> Ledger:
    module.phases.enter("")
    lap = module.phases.lap()
    assert set(lap.phases) == {phase}
    return lap


def test_a_pass_counts_its_real_tokens(module: SDFTModule) -> None:
    module.phases.enter("score")
    with torch.no_grad():
        found = module.logits(module.model, PROMPTS, hand_made())
        assert torch.equal(found, completion_logits(module.model, PROMPTS, hand_made(), 0))
    lap = counted(module, "score")
    assert lap["score"].tokens == (5 + 4) + (8 + 1) + (1 + 2)
    expected = ModelFlops.of(module.model).scoring([5, 8, 1], LENGTHS, learns=False)
    assert lap["score"].flops == expected


def test_a_pass_with_gradients_counts_its_backward_pass(module: SDFTModule) -> None:
    module.phases.enter("update")
    module.logits(module.model, PROMPTS, hand_made())
    with_gradient = counted(module, "update")["update"]
    module.phases.enter("score")
    module.logits(module.teacher, PROMPTS, hand_made())  # type: ignore[arg-type]
    frozen = counted(module, "score")["score"]
    assert with_gradient.tokens == frozen.tokens == 21
    assert with_gradient.flops == 3 * frozen.flops


def test_sampling_counts_prompts_and_completions(module: SDFTModule) -> None:
    module.phases.enter("generate")
    module.sample(module.model, PROMPTS, Sampling(4))
    lap = counted(module, "generate")
    assert lap["generate"].tokens == 21
    assert lap["generate"].flops == ModelFlops.of(module.model).sampling([5, 8, 1], LENGTHS)


def test_responses_count_as_what_is_going_on(module: SDFTModule) -> None:
    module.on_validation_start()
    module.respond(PROMPTS, module.greedy)
    module.on_validation_end()
    assert module.phases.current == ""
    assert counted(module, "evaluate")["evaluate"].tokens == 21


def test_outside_a_phase_nothing_is_counted(module: SDFTModule) -> None:
    module.respond(PROMPTS, module.greedy)
    module.logits(module.model, PROMPTS, hand_made())
    assert module.phases.lap().phases == {}
