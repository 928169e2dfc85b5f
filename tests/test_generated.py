"""Answers written once: what is drawn, checked, kept and found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import echo_examples, make_module, save_model, sharpen

from sdft import Example, StudentModule
from sdft.checks import AnyCheck, Facts, LengthCheck
from sdft.generated import (
    Answer,
    AnswerBook,
    Request,
    answer_all,
    generate,
    read_answers,
    write_answers,
)
from sdft.rollout import Sampling
from sdft.scorers import ExactMatch

SAMPLING = Sampling(6)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> StudentModule:
    made = make_module(save_model(tmp_path_factory.mktemp("model")))
    sharpen(made.model, 6.0)
    return made


def requests_of(module: StudentModule, count: int = 7) -> list[Request]:
    examples = echo_examples(count)
    long = Example(({"role": "user", "content": "a b c d e f g h"},), "a")
    return [
        Request(example, tuple(module.encoder.student_ids(example)), ExactMatch())
        for example in [long, *examples]
    ]


def answers_of(module: StudentModule, seed: int = 0, batch_size: int = 3) -> list[Answer]:
    prompts = [request.ids for request in requests_of(module)]
    batches = generate(module, module.model, prompts, SAMPLING, batch_size, seed)
    found = dict(item for batch in batches for item in batch)
    return [found[place] for place in range(len(prompts))]


def test_what_is_drawn_follows_from_the_seed(module: StudentModule) -> None:
    torch.manual_seed(1)
    first = answers_of(module)
    torch.manual_seed(2)
    assert answers_of(module) == first
    assert answers_of(module, seed=1) != first


def test_generating_leaves_the_random_numbers_alone(module: StudentModule) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    answers_of(module)
    assert torch.equal(torch.rand(3), expected)


def test_each_answer_belongs_to_its_prompt(module: StudentModule) -> None:
    """Greedy answers do not depend on the order in which prompts are taken."""
    requests = requests_of(module)
    greedy = Sampling(6, temperature=0.0)
    together = answer_all(module, module.model, requests, greedy, [], 3, 0)
    alone = [answer_all(module, module.model, [r], greedy, [], 1, 0)[0] for r in requests]
    assert together == alone


def test_checks_see_the_example_its_scorer_and_the_length_without_the_end(
    module: StudentModule,
) -> None:
    seen: list[tuple[str, Example, Facts]] = []

    def spy(text: str, example: Example, facts: Facts) -> str | None:
        seen.append((text, example, facts))
        return "long" if facts.truncated else None

    requests = requests_of(module)
    answers = answer_all(module, module.model, requests, SAMPLING, [spy], 3, 0)
    assert {answer.truncated for answer in answers} == {True, False}
    facts = {example.prompt: (text, fact) for text, example, fact in seen}
    for request, answer in zip(requests, answers, strict=True):
        text, fact = facts[request.example.prompt]
        ended = answer.ids[-1] == 1
        assert (text, fact.scorer) == (answer.text, request.scorer)
        assert (fact.truncated, fact.tokens) == (not ended, len(answer.ids) - ended)
        assert answer.kept is ended
        assert answer.reason == (None if ended else "long")


def test_nothing_left_is_an_error_with_the_reasons(module: StudentModule) -> None:
    checks: list[AnyCheck] = [LengthCheck(50, drop_truncated=False)]
    with pytest.raises(ValueError, match=r"dropped all 8 answers \(8 shorter than 50 tokens\)"):
        answer_all(module, module.model, requests_of(module), SAMPLING, checks, 3, 0)


def test_the_file_shows_every_answer_and_is_read_back(
    module: StudentModule, tmp_path: Path
) -> None:
    requests = requests_of(module)
    answers = answer_all(module, module.model, requests, SAMPLING, [LengthCheck()], 3, 0)
    path = tmp_path / "answers.jsonl"
    write_answers(path, requests, answers)
    assert read_answers(path) == answers
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record, request, answer in zip(records, requests, answers, strict=True):
        assert record == {
            "prompt": list(request.example.messages),
            "response": answer.text,
            "tokens": answer.ids,
            "truncated": answer.truncated,
            "kept": answer.kept,
            "reason": answer.reason,
        }
    assert any(not record["kept"] and record["reason"] for record in records)


def test_a_book_draws_among_the_kept_answers_of_a_prompt() -> None:
    def request(*ids: int) -> Request:
        return Request(Example(({"role": "user", "content": "x"},), ""), ids)

    def answer(reason: str | None = None) -> Answer:
        return Answer([3], "a", False, reason)

    book = AnswerBook(
        [request(1), request(1), request(1), request(2)],
        [answer(), answer("bad"), answer(), answer("bad")],
    )
    assert (1,) in book
    assert (2,) not in book
    drawn: list[Any] = [book.choose([[1], [2], [1]], seed) for seed in range(20)]
    assert {(row[0], row[1]) for row in drawn} == {(0, None), (2, None)}
    assert any(row[0] != row[2] for row in drawn)
    assert book.choose([[1], [1]], 3) == book.choose([[1], [1]], 3)
