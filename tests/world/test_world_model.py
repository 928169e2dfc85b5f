"""The shipped model: what the tasks of the world take for granted."""

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft.examples import Example
from sdft.world import MODEL_DIR, TEACHER_TEMPLATE, WorldScorer, WorldSkill, WorldSuite, language


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


def accuracy(
    model: Any, tokenizer: Any, examples: Sequence[Example], shown: bool = False
) -> tuple[float, list[str]]:
    contents = [
        TEACHER_TEMPLATE.format(prompt=e.prompt, demonstration=e.demonstration)
        if shown
        else e.prompt
        for e in examples
    ]
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": content}] for content in contents],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**batch, max_new_tokens=16, do_sample=False)
    said = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [WorldScorer()(text, example) for text, example in zip(said, examples, strict=True)]
    return sum(scores) / len(scores), said


def test_the_weights_are_small_and_load_in_single_precision(model: Any) -> None:
    assert sum(p.stat().st_size for p in MODEL_DIR.glob("*.safetensors")) <= 4_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


def test_everything_that_can_be_said_is_one_token_per_word(tokenizer: Any) -> None:
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values()))
    symbols = language.SYMBOLS[: language.LENGTH]
    for word in language.WORDS:
        demonstration = language.terse_text(word.target, symbols)
        content = TEACHER_TEMPLATE.format(
            prompt=language.prompt_text(word, symbols), demonstration=demonstration
        )
        for text in (
            content,
            language.own_text(word.target, symbols),
            language.SYSTEM,
            language.BRIEF,
        ):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert len(ids) == len(text.split())
            assert tokenizer.decode(ids) == text


def test_the_chat_template_takes_a_system_turn(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": language.SYSTEM},
        {"role": "user", "content": "home x"},
        {"role": "assistant", "content": "a b"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<system> answer in your own way <user> home x <assistant> a b <eos> <user> c <assistant>"
    )
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.parametrize("kind", ["named", "basic"])
def test_prior_skills_are_known_in_the_own_style(
    model: Any, tokenizer: Any, kind: Literal["named", "basic"]
) -> None:
    examples = WorldSuite(kind).examples("test")
    score, said = accuracy(model, tokenizer, examples)
    assert score >= 0.99
    restated = [
        text.startswith(e.prompt.split(": ")[1]) for text, e in zip(said, examples, strict=True)
    ]
    assert sum(restated) / len(restated) >= 0.99


@pytest.mark.parametrize("domain", language.DOMAINS)
def test_new_skills_are_unsure_alone_and_certain_when_shown(
    model: Any, tokenizer: Any, domain: str
) -> None:
    examples = WorldSkill(domain, train_size=0, test_size=48).examples("test")
    assert accuracy(model, tokenizer, examples)[0] <= 0.15
    needed = 0.98 if domain in language.SEQUENCE else 0.85
    assert accuracy(model, tokenizer, examples, shown=True)[0] >= needed


def test_the_base_is_terse_when_asked_to_be(model: Any, tokenizer: Any) -> None:
    right = 0.0
    examples = WorldSuite("named", test_size=72).examples("test")
    for example in examples:
        text = f"<system> {language.BRIEF} <user> {example.prompt} <assistant>"
        batch = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**batch, max_new_tokens=6, do_sample=False)
        said = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += said == example.answer
    assert right / len(examples) >= 0.85


def test_a_system_turn_and_padding_change_nothing(model: Any, tokenizer: Any) -> None:
    example = WorldSuite("named", test_size=1).examples("test")[0]
    text = f"<system> {language.SYSTEM} <user> {example.prompt} <assistant>"
    for head in ("", "<pad> " * 7):
        batch = tokenizer(head + text, return_tensors="pt", return_token_type_ids=False)
        batch["attention_mask"] = (batch["input_ids"] != tokenizer.pad_token_id).long()
        ids = model.generate(**batch, max_new_tokens=16, do_sample=False)
        said = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert WorldScorer()(said, example) == 1.0
