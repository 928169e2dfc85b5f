"""What checks drop is written down, counted, and not learnt from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_method, make_module
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sdft.callbacks import Filters
from sdft.checks import LengthCheck, RegexCheck, ScoreCheck
from sdft.examples import Example
from sdft.methods import SFTModule
from sdft.scorers import Scorer
from sdft.student import StudentModule

pytestmark = pytest.mark.usefixtures("no_plots")
Fit = Callable[..., tuple[Trainer, StudentModule]]


class FirstLetter(Scorer):
    def __call__(self, response: str, example: Example) -> float:
        return float(example.prompt[0] in "ace")


def some(text: str, example: Example, facts: Any) -> str | None:
    """Drops the answers to some prompts."""
    return "not this one" if example.prompt[0] in "ace" else None


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    path = Path(trainer.log_dir or "") / "dropped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_dropped_is_shown_with_its_reason(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = fit(callbacks=[Filters([some])])
    found = lines(trainer)
    assert {line["reason"] for line in found} == {"not this one"}
    assert {line["task"] for line in found} == {"first", "second"}
    assert {line["stage"] for line in found if line["step"] <= 3} == {0}
    first = found[0]
    assert first["prompt"][0]["content"][0] in "ace"
    assert first["demonstration"]
    assert first["tokens"] <= 6
    count = sum(line["stage"] == 0 for line in found)
    assert 0 < count < 10
    assert f"{count} of 10 rollouts dropped: {count} not this one" in capsys.readouterr().out
    assert "train/dropped" in trainer.callback_metrics


def test_nothing_is_learnt_from_what_is_dropped(fit: Fit, model_dir: Path) -> None:
    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)

    module = make_module(model_dir)
    module.configure_model()
    drop_all = Filters([RegexCheck(must_match="no such text")])
    _, found = fit(module=make_module(model_dir, optimizer=adam), callbacks=[drop_all])
    for name, weight in found.model.state_dict().items():
        assert torch.equal(weight, module.model.state_dict()[name])


def test_without_checks_nothing_changes(fit: Fit) -> None:
    (trainer, plain), (_, filtered) = (
        fit("plain"),
        fit("filters", callbacks=[Filters([LengthCheck(0, drop_truncated=False)])]),
    )
    for one, other in zip(plain.parameters(), filtered.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not (Path(trainer.log_dir or "") / "dropped.jsonl").exists()


def test_the_tasks_scorer_is_asked(fit: Fit) -> None:
    data = make_data()
    data.tasks[0].scorer = FirstLetter()
    data.tasks[1].scorer = FirstLetter()
    trainer, _ = fit(data=data, callbacks=[Filters([ScoreCheck()])])
    starts = {line["prompt"][0]["content"][0] for line in lines(trainer)}
    assert starts
    assert not starts & set("ace")


def test_records_are_limited_and_counts_are_not(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    filters = Filters([RegexCheck(must_match="no such text")], max_records=3)
    trainer, _ = fit(callbacks=[filters])
    assert [line["stage"] for line in lines(trainer)] == [0] * 3 + [1] * 3
    assert "10 of 10 rollouts dropped: 10 lacks" in capsys.readouterr().out


def test_a_resumed_run_ends_alike(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def callbacks(root: str) -> list[Any]:
        options = {"save_top_k": -1, "every_n_train_steps": 1, "save_on_train_epoch_end": False}
        return [Filters([some]), ModelCheckpoint(tmp_path / root, "{step}", **options)]

    trainer, whole = fit("whole", callbacks=callbacks("steps"))
    summaries = [x for x in capsys.readouterr().out.splitlines() if x.startswith("filters:")]
    start = tmp_path / "steps" / "step=2.ckpt"
    resumed, again = fit("again", callbacks=callbacks("others"), ckpt_path=start)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("filters:")]
    assert said == summaries
    assert lines(resumed) == [line for line in lines(trainer) if line["step"] > 2]


def test_an_earlier_files_later_lines_are_written_anew(tmp_path: Path) -> None:
    from sdft.callbacks.filters import _keep_until

    file = tmp_path / "dropped.jsonl"
    file.write_text('{"step": 1}\n{"step": 3}\n{"step": 2, "a": "ü"}\n{"st')
    _keep_until(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2, "a": "ü"}\n'


def test_methods_without_rollouts_are_refused(fit: Fit, model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"the method 'sft' draws none: use model\.checks"):
        fit(module=make_method(SFTModule, model_dir), callbacks=[Filters([LengthCheck()])])


def test_a_check_that_raises_ends_the_run_with_its_name(fit: Fit) -> None:
    def broken(text: str, example: Example, facts: Any) -> str | None:
        raise KeyError("gone")

    with pytest.raises(ValueError, match="the check broken raised KeyError"):
        fit(callbacks=[Filters([broken])])


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"filters\.max_records"):
        Filters(max_records=-1)
