"""A person looks before each stage, and the run waits."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_method
from lightning.pytorch import Trainer

from sdft.callbacks import Filters, Review
from sdft.callbacks.review import ReviewStop, ask
from sdft.checks import LengthCheck
from sdft.methods import SFTModule
from sdft.student import StudentModule

pytestmark = pytest.mark.usefixtures("no_plots")
Fit = Callable[..., tuple[Trainer, StudentModule]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def says(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{answer}\n" for answer in answers)))


def test_looking_changes_nothing(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, "", "what?", "y")
    _, plain = fit("plain")
    trainer, looked = fit("looked", callbacks=[Review(2)])
    for one, other in zip(plain.parameters(), looked.parameters(), strict=True):
        assert torch.equal(one, other)
    out = capsys.readouterr().out
    assert "2 of what 'first' would learn from" in out
    assert "2 of what 'second' would learn from" in out
    for stage in (1, 2):
        text = (Path(trainer.log_dir or "") / f"review-{stage}.jsonl").read_text()
        assert len(text.splitlines()) == 2


def test_a_person_stops_the_run(fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    says(monkeypatch, "", "s")
    with pytest.raises(ReviewStop, match=r"before stage 2 \(second\).*--ckpt_path last"):
        fit(callbacks=[Review(1)])
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 3


def test_it_says_what_the_filters_drop(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "", "")
    trainer, _ = fit(callbacks=[Filters([LengthCheck(min_tokens=100)]), Review(3)])
    text = (Path(trainer.log_dir or "") / "review-1.jsonl").read_text()
    assert {json.loads(line)["reason"] for line in text.splitlines()} <= {
        "truncated",
        "shorter than 100 tokens",
    }


def test_methods_without_rollouts_show_what_the_student_says(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    says(monkeypatch, "", "")
    trainer, _ = fit(module=make_method(SFTModule, model_dir), callbacks=[Review(1)])
    assert (Path(trainer.log_dir or "") / "review-2.jsonl").is_file()


def test_without_a_terminal_a_file_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    file = tmp_path / "review-1.answer"

    def later() -> None:
        file.write_text("perhaps")
        time.sleep(0.7)
        file.write_text("Stop\n")

    writing = threading.Thread(target=later)
    writing.start()
    assert ask(file) == "stop"
    writing.join()


def test_the_end_of_the_terminal_stops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    says(monkeypatch)
    assert ask(tmp_path / "none") == "stop"


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"review\.count"):
        Review(-1)
