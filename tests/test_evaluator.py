"""Cells of the matrix: what is asked, and what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LETTERS, make_module, sharpen

from sdft import Example, PythonTask, SDFTModule
from sdft.encoded import Encoded
from sdft.evaluation import Artifacts, summarise
from sdft.evaluator import Evaluator, respond_all, sample_passes
from sdft.pass_at import PassAt, pass_at_k
from sdft.rollout import Sampling
from sdft.scorers import Scorer

WORDS = ["a", "b c d e", "c d", "d e f g h a", "e"]


class BeginsWith(Scorer):
    """1 where the response begins with the answer, a half where it holds it somewhere."""

    def __call__(self, response: str, example: Example) -> float:
        words = response.split()
        return 1.0 if words[:1] == [example.answer] else 0.5 * (example.answer in words)


@pytest.fixture
def module(model_dir: Path) -> SDFTModule:
    made = make_module(model_dir)
    made.configure_model()
    sharpen(made.model, 2.0)
    return made


def encode(module: SDFTModule) -> list[Encoded]:
    examples = [Example(({"role": "user", "content": word},), word[0]) for word in WORDS]
    return [Encoded(e, module.encoder.student_ids(e), []) for e in examples]


def task(scorer: Scorer | None = None) -> PythonTask:
    return PythonTask("task", scorer=scorer or BeginsWith())


def test_answers_stand_in_the_order_of_their_examples(module: SDFTModule) -> None:
    encoded = encode(module)
    alone = [module.respond([item.student_ids], module.greedy)[0] for item in encoded]
    for size in (1, 2, 3, 10):
        assert respond_all(module, encoded, size) == alone


def test_responses_keep_their_tokens(module: SDFTModule) -> None:
    for response in respond_all(module, encode(module), 3):
        assert module.decode(response.ids) == response.text
        assert len(response.ids) == response.tokens


# ---------------------------------------------------------------- pass@k


def test_passes_are_those_of_the_samples(
    module: SDFTModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example is drawn for as often as was asked, and judged by its own answer."""
    drawn: dict[tuple[int, ...], list[str]] = {}
    real = module.respond

    def respond(prompts: list[list[int]], sampling: Sampling, draws: Any) -> list[Any]:
        assert sampling == Sampling(module.greedy.max_new_tokens, temperature=1.5)
        responses = real(prompts, sampling, draws)
        for prompt, response in zip(prompts, responses, strict=True):
            drawn.setdefault(tuple(prompt), []).append(response.text)
        return responses

    monkeypatch.setattr(module, "respond", respond)
    encoded = encode(module)
    pass_at = PassAt((1, 3, 40), 40, temperature=1.5, limit=4)
    found = sample_passes(pass_at, module, task(), encoded, 16, stage=1)
    assert set(drawn) == {tuple(item.student_ids) for item in encoded[:4]}
    assert {len(texts) for texts in drawn.values()} == {40}
    passed = [
        sum(text.split()[:1] == [item.example.answer] for text in drawn[tuple(item.student_ids)])
        for item in encoded[:4]
    ]
    assert 0 < sum(passed) < 160
    assert found is not None
    for k in (1, 3, 40):
        expected = sum(pass_at_k(40, count, k) for count in passed) / 4
        assert found[str(k)].score == pytest.approx(expected)


def test_draws_depend_on_seed_stage_and_column_alone(
    module: SDFTModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, pass_at, real = encode(module), PassAt((1, 8), 24), module.respond

    def drawn(column: PythonTask, stage: int) -> list[str]:
        texts: list[str] = []  # not their scores: few samples score alike by chance

        def respond(prompts: list[list[int]], sampling: Sampling, draws: Any) -> Any:
            responses = real(prompts, sampling, draws)
            texts.extend(response.text for response in responses)
            return responses

        monkeypatch.setattr(module, "respond", respond)
        sample_passes(pass_at, module, column, encoded, 48, stage)
        return texts

    first = drawn(task(), 1)
    torch.manual_seed(5)
    assert drawn(task(), 1) == first
    others = [drawn(task(), 2), drawn(PythonTask("b", scorer=BeginsWith()), 1)]
    monkeypatch.setenv("PL_GLOBAL_SEED", "99")
    others.append(drawn(task(), 1))
    assert first not in others


def test_drawing_leaves_the_generator_alone(module: SDFTModule) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample_passes(PassAt((1,), 4), module, task(), encode(module), 8, stage=0)
    assert torch.equal(torch.rand(3), expected)


class Raises(Scorer):
    """Fails on what was drawn."""

    def __call__(self, response: str, example: Example) -> float:
        raise KeyError("tool")


def test_a_scorer_that_raises_costs_pass_at_k(
    module: SDFTModule, caplog: pytest.LogCaptureFixture
) -> None:
    assert sample_passes(PassAt((1,), 2), module, task(Raises()), encode(module), 8, 0) is None
    assert "'task' raised KeyError" in caplog.text


def test_a_cell_has_pass_at_k_where_it_is_wanted(module: SDFTModule) -> None:
    evaluator = Evaluator(Artifacts(), None, PassAt((1, 2), 4))
    encoded = encode(module)
    with_it = evaluator.cell(module, task(), encoded, 8, stage=0, with_pass_at=True)
    without = evaluator.cell(module, task(), encoded, 8, stage=0, with_pass_at=False)
    assert with_it.pass_at is not None
    assert set(with_it.pass_at) == {"1", "2"}
    assert without.pass_at is without.kl_base is None
    assert with_it.score == without.score == evaluator.score(module, task(), encoded, 8).score
    nothing = evaluator.cell(module, task(), [], 8, stage=0, with_pass_at=True)
    assert (nothing.n, nothing.pass_at) == (0, None)
    assert set(LETTERS) > {item.example.answer for item in encoded}


class Once(Scorer):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, response: str, example: Example) -> float:
        self.asked += 1
        return 1.0


@pytest.mark.parametrize("place", [0, 1])
def test_one_process_asks_the_scorer(
    module: SDFTModule, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """A judge costs money: the others take what rank 0 found."""
    encoded, scorer = encode(module), Once()
    responses = respond_all(module, encoded, 8)
    of_rank_0 = summarise(task(Once()), [i.example for i in encoded], responses, Artifacts())
    monkeypatch.setattr("sdft.evaluator.respond_all", lambda *args: responses)
    monkeypatch.setattr("sdft.evaluator.rank", lambda: place)
    monkeypatch.setattr("sdft.evaluator.agreed", lambda own: own if place == 0 else of_rank_0)
    cell = Evaluator(Artifacts(), None, None).cell(module, task(scorer), encoded, 8, 1, False)
    assert cell == of_rank_0
    assert scorer.asked == (len(encoded) if place == 0 else 0)
