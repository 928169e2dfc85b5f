"""Log-probabilities of continuations: those of the model's own logits, however they are batched."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import make_module, save_model, sharpen

from sdft import SDFTModule
from sdft.rollout import Rollout
from sdft.suites.likelihood import Likelihood, Pair, likelihoods

PAIRS = [
    Pair((3, 9, 10), (11,)),
    Pair((3, 9, 10), (12,)),
    Pair((3, 9), (10, 11)),  # the very tokens of the first, cut elsewhere
    Pair((4,), (9, 10, 11, 12, 13)),
    Pair((3, 9, 10, 14), (9, 9)),
    Pair((3, 9, 10, 14), (9, 10)),
]


@pytest.fixture(params=["llama", "gpt2"])
def module(request: pytest.FixtureRequest, tmp_path: Path) -> SDFTModule:
    made = make_module(save_model(tmp_path / "model", family=request.param))
    made.configure_model()
    sharpen(made.model, 4.0)
    return made


@torch.no_grad()
def by_hand(module: SDFTModule, pair: Pair) -> Likelihood:
    ids = torch.tensor([[*pair.context, *pair.continuation]])
    module.model.eval()
    logits_TV = module.model(input_ids=ids).logits[0, len(pair.context) - 1 : -1].float()
    wanted = torch.tensor(pair.continuation)
    log_probs = logits_TV.log_softmax(-1).gather(-1, wanted[:, None])
    return Likelihood(float(log_probs.sum()), bool((logits_TV.argmax(-1) == wanted).all()))


def close(found: list[Likelihood], expected: list[Likelihood]) -> bool:
    return all(
        math.isclose(a.log_prob, b.log_prob, abs_tol=1e-4) and a.greedy == b.greedy
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_it_is_that_of_the_models_own_logits(module: SDFTModule, batch_size: int) -> None:
    expected = [by_hand(module, pair) for pair in PAIRS]
    assert len({round(one.log_prob, 3) for one in expected}) == len(expected)
    assert close(likelihoods(module, PAIRS, batch_size), expected)
    assert close(likelihoods(module, PAIRS[::-1], batch_size), expected[::-1])


def test_what_greedy_decoding_gives_is_greedy(module: SDFTModule) -> None:
    prompt = (3, 9, 10)
    answer = module.respond([prompt], module.greedy)[0].ids
    (found,) = likelihoods(module, [Pair(prompt, answer)], 4)
    assert found.greedy
    other = (*answer[:-1], (answer[-1] + 1) % 17)
    assert not likelihoods(module, [Pair(prompt, other)], 4)[0].greedy


def test_pairs_that_differ_in_the_last_token_share_a_pass(
    module: SDFTModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    plain = SDFTModule.hidden

    def counted(self: SDFTModule, model: object, prompts: list[object], c: Rollout) -> object:
        rows.append(len(prompts))
        return plain(self, model, prompts, c)  # type: ignore[arg-type]

    monkeypatch.setattr(SDFTModule, "hidden", counted)
    likelihoods(module, PAIRS, 100)
    assert sum(rows) == 4


def test_a_module_with_logits_of_its_own_is_asked_for_them(model_dir: Path) -> None:
    class Louder(SDFTModule):
        def logits(self, *args: object) -> torch.Tensor:  # type: ignore[override]
            return 2 * super().logits(*args)  # type: ignore[arg-type]

    made = Louder(model_name=str(model_dir))
    made.configure_model()
    plain = make_module(model_dir)
    plain.configure_model()
    loud = likelihoods(made, PAIRS, 4)
    assert not close(loud, likelihoods(plain, PAIRS, 4))
    weight = plain.model.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(2.0)
    assert close(loud, [by_hand(plain, pair) for pair in PAIRS])


def test_long_continuations_are_taken_in_parts(
    module: SDFTModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = likelihoods(module, PAIRS, 4)
    monkeypatch.setattr("sdft.suites.likelihood._ROWS", 2)
    assert close(likelihoods(module, PAIRS, 4), expected)
    monkeypatch.setattr("sdft.suites.likelihood.heads_known", lambda *models: False)
    assert close(likelihoods(module, PAIRS, 4), expected)
    monkeypatch.setattr("sdft.suites.likelihood.LOGITS", 1)
    assert close(likelihoods(module, PAIRS, 4), expected)


def test_training_mode_is_left_as_it_was_and_dropout_has_no_part(module: SDFTModule) -> None:
    module.model.train()
    assert likelihoods(module, PAIRS, 4) == likelihoods(module, PAIRS, 4)
    assert module.model.training
