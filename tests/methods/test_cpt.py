"""CPT: every token of a document but its first is predicted exactly once, from what precedes it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LETTERS, make_data, make_method, save_model, sharpen
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer

from sdft import ContinualDataModule, Example, PythonTask
from sdft.batch import Batch
from sdft.methods import CPTModule, SFTModule
from sdft.methods.cpt import document

pytestmark = pytest.mark.usefixtures("no_plots")

Fit = Callable[..., Any]


def example(context: str = "", prompt: str = "a b", demonstration: str | None = "c d") -> Example:
    return Example(({"role": "user", "content": prompt},), "answer", demonstration, context)


def batch_of(module: CPTModule, *contexts: str) -> Batch:
    examples = [example(context) for context in contexts]
    return Batch(examples, [module.encoder.student_ids(e) for e in examples])


def knowledge(name: str, *contexts: str) -> PythonTask:
    examples = [example(context) for context in contexts]
    return PythonTask(name, train=examples, test=examples[:1])


def cpt(folder: Path, **options: Any) -> CPTModule:
    template = "{prompt} {context} shown {demonstration} now"
    return make_method(CPTModule, folder, **{"teacher_template": template} | options)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFTModule, "_log_step", lambda *args: None)


# ---------------------------------------------------------------- the document


def test_which_text_is_read() -> None:
    earlier = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
    one = Example(earlier, "answer", "d", "c")
    assert document(one, "context") == "c"
    assert document(one, "demonstration") == "d"
    assert document(one, "prompt_and_demonstration") == "s\n\nq\n\nd"
    bare = example(demonstration=None)
    for text in ("context", "demonstration", "prompt_and_demonstration"):
        assert document(bare, text) == ""


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_beginning_and_end_where_the_tokenizer_has_them(
    model_dir: Path, bos: bool, eos: bool
) -> None:
    module = cpt(model_dir)
    module.tokenizer.bos_token = "<unk>" if bos else None
    module.tokenizer.eos_token = "</s>" if eos else None
    assert module.document_ids(example("a b")) == [2] * bos + [9, 10] + [1] * eos


def test_no_chat_template(model_dir: Path) -> None:
    module = cpt(model_dir, text="prompt_and_demonstration")
    assert module.document_ids(example()) == [9, 10, 11, 12, 1], "a b c d </s>"


# ---------------------------------------------------------------- windows


@given(tokens=st.integers(1, 40), length=st.integers(2, 12))
def test_every_token_but_the_first_is_predicted_exactly_once(tokens: int, length: int) -> None:
    ids = list(range(100, 100 + tokens))
    module = CPTModule(max_text_tokens=length)
    module.document_ids = lambda example: ids  # type: ignore[method-assign]
    windows = module.windows(example())
    assert [token for window in windows for token in window[1:]] == ids[1:]
    assert all(2 <= len(window) <= length for window in windows)
    for before, after in pairwise(windows):
        assert after[0] == before[-1], "the first prediction of a window has a token before it"
        assert len(before) == length, "only the last window is shorter"


def test_a_window_is_no_longer_than_the_models_context(tmp_path: Path) -> None:
    module = cpt(save_model(tmp_path, max_position_embeddings=16), max_text_tokens=1024)
    assert module.window_tokens == 16
    assert cpt(tmp_path, max_text_tokens=5).window_tokens == 5
    assert max(map(len, module.windows(example(" ".join(LETTERS * 9))))) == 16


# ---------------------------------------------------------------- the loss


def test_one_window_gives_transformers_own_loss(model_dir: Path, silent: None) -> None:
    module = cpt(model_dir)
    sharpen(module.model)
    batch = batch_of(module, "c d e a a b")
    ids = torch.tensor([module.document_ids(batch.examples[0])])
    expected = module.model(ids, labels=ids).loss
    torch.testing.assert_close(module.training_step(batch, 0), expected, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_mean_over_all_tokens_of_all_windows(model_dir: Path, silent: None) -> None:
    module = cpt(model_dir, max_text_tokens=4)
    sharpen(module.model)
    batch = batch_of(module, "c d e a a b h g", "f", "a b")
    losses = []
    for one in batch.examples:
        for window in module.windows(one):
            ids = torch.tensor([window])
            log_probs = module.model(ids).logits[0, :-1].log_softmax(-1)
            losses += [-log_probs[place, token] for place, token in enumerate(window[1:])]
    assert len(losses) == 8 + 1 + 2, "each document's tokens and its end, but for its first token"
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_padding_and_company_change_no_window(model_dir: Path, silent: None) -> None:
    module = cpt(model_dir, max_text_tokens=4)
    sharpen(module.model)
    long, short = "c d e a a b h g", "f"
    alone = [module.training_step(batch_of(module, text), 0) for text in (long, short)]
    both = module.training_step(batch_of(module, long, short), 0)
    torch.testing.assert_close(both, (8 * alone[0] + alone[1]) / 9, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- whole runs


def test_it_learns_the_text_by_heart(fit: Fit, model_dir: Path) -> None:
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any
        ) -> None:
            losses.append(float(outputs["loss"]))

    task = knowledge("facts", "h g f e d c b a", "a a b b c c d d e e")
    data = ContinualDataModule([task], batch_size=2, steps=60)
    trainer, module = fit(module=cpt(model_dir, max_text_tokens=6), data=data, callbacks=[Watch()])
    assert trainer.global_step == 60
    assert losses[-1] < 0.3 * losses[0]
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}


def test_the_run_makes_the_same_steps_as_sft(fit: Fit, model_dir: Path) -> None:
    steps = []
    for module in (cpt(model_dir, max_text_tokens=3), make_method(SFTModule, model_dir)):
        module.template.text = "{prompt} {context} {demonstration}"
        task = knowledge("facts", *["h g f e d c b a"] * 5)
        trainer, _ = fit(module=module, data=ContinualDataModule([task], batch_size=2, epochs=2))
        steps.append(trainer.global_step)
    assert steps == [6, 6]


@pytest.mark.parametrize(
    ("options", "contexts", "found"),
    [
        ({}, ("a b", ""), "the context of a training example holds no text"),
        ({}, ("a b", " \n "), r"found ' \\n '"),
        ({"text": "demonstration"}, ("a",), None),
    ],
)
def test_an_example_without_the_text_fails_before_training(
    fit: Fit, model_dir: Path, options: Any, contexts: Any, found: str | None
) -> None:
    data = ContinualDataModule(
        [knowledge("good", "a b"), knowledge("bad", *contexts)], batch_size=2, steps=1
    )
    module = cpt(model_dir, **options)
    if found is None:
        fit(module=module, data=data)
        return
    with pytest.raises(ValueError, match=found) as error:
        fit(module=module, data=data)
    assert "task 'bad'" in str(error.value)
    assert "context, demonstration, prompt_and_demonstration" in str(error.value)
    assert module.trainer.global_step == 0


def test_a_single_token_without_beginning_and_end_teaches_nothing(
    fit: Fit, model_dir: Path
) -> None:
    module = cpt(model_dir)
    module.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="task 'bad': the context"):
        fit(module=module, data=ContinualDataModule([knowledge("bad", "a")], steps=1))


def test_a_long_document_is_not_dropped_for_a_teacher_that_nobody_asks(
    fit: Fit, model_dir: Path
) -> None:
    long = " ".join(LETTERS * 30)  # 240 tokens, the model's context has 128
    module = cpt(model_dir, teacher_sees="answer", max_text_tokens=50)
    data = ContinualDataModule([knowledge("facts", "a b", long)], batch_size=2, steps=1)
    fit(module=module, data=data)
    (batch,) = data.mixed_batches(0)
    assert {item.example.context for item in batch} == {"a b", long}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"text": "answer"}, "text must be one of context, demonstration, .*found 'answer'"),
        ({"max_text_tokens": 1}, "max_text_tokens must be at least 2, found 1"),
    ],
)
def test_a_bad_value_is_named(model_dir: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        cpt(model_dir, **options)


def test_every_example_of_an_ordinary_stream_has_prompt_and_demonstration(
    fit: Fit, model_dir: Path
) -> None:
    trainer, _ = fit(
        module=make_method(CPTModule, model_dir, text="prompt_and_demonstration"),
        data=make_data(),
    )
    assert trainer.global_step == 6
    assert trainer.callback_metrics["train/kl_base_student"] > 0
