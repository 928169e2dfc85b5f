"""The command: what it writes, and that a killed run continues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_data, make_module, run_fit, save_model, write_jsonl

from sdft import JSONLTask
from sdft.cli import main
from sdft.methods import SFTModule
from sdft.rollout import Rollout, Sampling
from sdft.self_edits import SelfEdits
from sdft.self_edits.author import Author

pytestmark = pytest.mark.usefixtures("no_plots")

PASSAGES = [
    {"title": "Rhine", "text": "The Rhine rises in Switzerland and flows to the North Sea."},
    {"text": "Super Bowl 50 was won by Denver in the month of February 2016."},
    {"title": "Tin", "text": "Tin melts at a temperature of 232 degrees."},
]
ANSWERS = {
    "facts": "Here are the facts:\n1. {first} is a thing.\n2. {first} is a thing!\n3. It matters.",
    "questions": "Q: What is {first}?\nA: A thing.\nQ: Why?",
    "own words": "In other words: {first} exists, and that is all.",
    "description": "Request: greet Ann\nResponse: Hello, Ann!",
}


class Pen:
    """A respondent whose model writes what the request calls for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.texts: dict[tuple[int, ...], str] = {}
        self.written: list[str] = []
        self.seeds: list[int] = []
        self.fail_at = fail_at
        self.cut = False
        monkeypatch.setattr(Author, "encode", self.encode)
        monkeypatch.setattr(Author, "sample", self.sample)
        monkeypatch.setattr(Author, "decode", self.decode)

    def encode(self, text: str) -> tuple[int, ...]:
        ids = (len(self.texts) + 100,)
        self.texts[ids] = text
        return ids

    def sample(
        self, model: Any, prompts: Sequence[Any], sampling: Sampling, draws: Any = None
    ) -> Rollout:
        if self.fail_at is not None and len(self.seeds) >= self.fail_at:
            raise KeyboardInterrupt
        self.seeds.append(torch.initial_seed())
        ids = torch.tensor([list(prompt) for prompt in prompts])
        cut = torch.full((len(prompts),), self.cut)
        return Rollout(ids, torch.ones_like(ids, dtype=torch.bool), cut)

    def decode(self, ids: Sequence[int]) -> str:
        request = self.texts[tuple(ids)]
        self.written.append(request)
        answer = next(answer for word, answer in ANSWERS.items() if word in request)
        about = [p["text"] for p in PASSAGES if p["text"] in request]
        return answer.format(first=about[0].split()[0] if about else "")


@pytest.fixture
def pen(monkeypatch: pytest.MonkeyPatch) -> Pen:
    return Pen(monkeypatch)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "passages.jsonl", PASSAGES)
    save_model(tmp_path / "model")
    return {
        "model_name": "model",
        "out": "edits",
        "passages": "passages.jsonl",
        "per_passage": 2,
        "batch_size": 4,
        "max_new_tokens": 32,
        "device": "cpu",
    }


def run(settings: dict[str, Any], *flags: str) -> int:
    Path("edits.yaml").write_text(yaml.safe_dump(settings))
    return main(["self_edits", "--config", "edits.yaml", *flags])


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("edits", name).read_text().splitlines()]


def test_what_it_writes(
    settings: dict[str, Any], pen: Pen, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings) == 0
    kept = lines("edits.jsonl")
    assert kept[:3] == [
        {
            "prompt": "Tell me one fact about this topic: Rhine",
            "answer": "The is a thing.",
            "demonstration": "The is a thing.",
            "context": PASSAGES[0]["text"],
            "kind": "implications",
            "passage": 1,
        },
        {
            "prompt": "Tell me one fact about this topic: Rhine",
            "answer": "It matters.",
            "demonstration": "It matters.",
            "context": PASSAGES[0]["text"],
            "kind": "implications",
            "passage": 1,
        },
        {
            "prompt": "What is The?",
            "answer": "A thing.",
            "demonstration": "A thing.",
            "context": PASSAGES[0]["text"],
            "kind": "questions",
            "passage": 1,
        },
    ]
    assert [record["passage"] for record in kept] == sorted(r["passage"] for r in kept)
    reasons = [(r["kind"], r["passage"], r["reason"]) for r in lines("rejected.jsonl")]
    assert reasons[:3] == [
        ("implications", 1, "duplicate"),
        ("questions", 1, "a question without an answer"),
        ("rewrites", 1, "duplicate"),  # asked twice, written alike
    ]
    assert ("implications", 2, "duplicate") in reasons, "the same fact of another passage"
    out = capsys.readouterr().out
    assert "implications 4 kept, 5 rejected (5 duplicate)" in out
    assert "questions 3 kept, 3 rejected (3 a question without an answer)" in out
    assert json.loads(Path("edits/summary.json").read_text())["kinds"]["implications"] == {
        "kept": 4,
        "rejected": {"duplicate": 5},
    }


def test_every_output_is_kept_word_for_word(settings: dict[str, Any], pen: Pen) -> None:
    run(settings)
    header, *records = lines("outputs.jsonl")
    assert header["made_from"]["seed"] == 0
    assert [record["passage"] for record in records] == [1, 2, 3]
    kinds = [output["kind"] for output in records[0]["outputs"]]
    assert kinds == ["implications", "questions", "rewrites", "rewrites"]
    assert records[2]["outputs"][1]["text"] == ANSWERS["questions"].format(first="Tin")


def test_a_task_reads_it_and_a_run_learns_it(
    settings: dict[str, Any], pen: Pen, tmp_path: Path
) -> None:
    run(settings)
    task = JSONLTask("edits", train="edits/edits.jsonl")
    assert len(task.examples("train")) == len(lines("edits.jsonl"))
    assert task.examples("train")[0].context == PASSAGES[0]["text"]
    shown = {"teacher_template": "{prompt}\n{context}\nshown {demonstration} now"}
    for name, module in (
        ("sdft", make_module(Path("model"), **shown)),
        ("sft", SFTModule(model_name="model", max_new_tokens=6, **shown)),
    ):
        data = make_data(("one",))
        data.tasks[0] = task
        trainer, _ = run_fit(tmp_path, Path("model"), name, module, data, limit_val_batches=0)
        assert trainer.global_step == 3


def test_a_killed_run_continues_to_the_same_end(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = Pen(monkeypatch)
    run(settings | {"out": "whole"})
    killed = Pen(monkeypatch, fail_at=2)
    assert run(settings) == 130
    assert not Path("edits/edits.jsonl").exists()
    assert len(lines("outputs.jsonl")) == 1 + 2
    with open("edits/outputs.jsonl", "a") as file:
        file.write('{"passage": 3, "outp')  # the machine went down in the middle of a line
    resumed = Pen(monkeypatch)
    assert run(settings) == 0
    assert killed.seeds + resumed.seeds == whole.seeds
    for name in ("edits", "rejected", "outputs"):
        assert (tmp_path / f"edits/{name}.jsonl").read_bytes() == (
            tmp_path / f"whole/{name}.jsonl"
        ).read_bytes()


def test_groups_of_passages_are_redone_whole(
    settings: dict[str, Any], pen: Pen, tmp_path: Path
) -> None:
    settings["batch_size"] = 8  # two passages at once
    run(settings)
    whole = Path("edits/outputs.jsonl").read_bytes()
    assert len(pen.seeds) == 2
    written = Path("edits/outputs.jsonl").read_text().splitlines(keepends=True)
    Path("edits/outputs.jsonl").write_text("".join(written[:2]))  # one passage of two
    Path("edits/summary.json").unlink()
    run(settings)
    assert len(pen.seeds) == 4
    assert Path("edits/outputs.jsonl").read_bytes() == whole


def test_a_finished_run_is_not_redone(
    settings: dict[str, Any], pen: Pen, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings)
    reviewed = Path("edits/edits.jsonl").read_text().splitlines(keepends=True)[1:]
    Path("edits/edits.jsonl").write_text("".join(reviewed))
    calls = len(pen.seeds)
    assert run(settings) == 0
    assert "is there already" in capsys.readouterr().out
    assert len(pen.seeds) == calls
    assert len(lines("edits.jsonl")) == len(reviewed)
    assert run(settings, "--overwrite") == 0
    assert len(pen.seeds) == calls, "what the model wrote is still there"
    assert len(lines("edits.jsonl")) == len(reviewed) + 1


def test_other_checks_need_no_new_outputs(settings: dict[str, Any], pen: Pen) -> None:
    run(settings)
    calls = len(pen.seeds)
    settings["checks"] = [{"class_path": "RegexCheck", "init_args": {"must_match": "thing"}}]
    assert run(settings) == 2, "other edits are there"
    assert run(settings, "--overwrite") == 0
    assert len(pen.seeds) == calls
    assert all("thing" in record["answer"] for record in lines("edits.jsonl"))
    assert "lacks 'thing'" in {record["reason"] for record in lines("rejected.jsonl")}


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"temperature": 0.1}, {"limit": 2}, {"kinds": ["questions"]}]
)
def test_what_was_made_otherwise_is_never_mixed_in(
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
) -> None:
    Pen(monkeypatch, fail_at=1)
    run(settings)
    pen = Pen(monkeypatch)
    assert run(settings | change) == 2
    assert "another folder as out, or --overwrite" in capsys.readouterr().err
    assert pen.seeds == []
    assert run(settings | change, "--overwrite") == 0
    assert len(lines("outputs.jsonl")) == 1 + len(PASSAGES[: change.get("limit")])


def test_other_weights_under_the_same_name_are_noticed(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Pen(monkeypatch, fail_at=1)
    run(settings)
    save_model(Path("model"), seed=1)
    Pen(monkeypatch)
    assert run(settings) == 2


def test_what_the_length_limit_cut_is_dropped_unless_checks_say_otherwise(
    settings: dict[str, Any], pen: Pen
) -> None:
    pen.cut = True
    run(settings)
    kept = lines("edits.jsonl")
    assert {record["kind"] for record in kept} == {"implications", "questions"}
    reasons = {(r["kind"], r["reason"]) for r in lines("rejected.jsonl")}
    assert ("rewrites", "truncated") in reasons
    assert ("questions", "truncated") in reasons, "the question that was cut off"
    run(settings | {"checks": []}, "--overwrite")
    assert "rewrites" in {record["kind"] for record in lines("edits.jsonl")}


def test_a_copy_of_the_passage_is_no_rewrite(
    settings: dict[str, Any], pen: Pen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ANSWERS, "own words", PASSAGES[0]["text"].upper())
    run(settings | {"limit": 1})
    reasons = [r["reason"] for r in lines("rejected.jsonl") if r["kind"] == "rewrites"]
    assert reasons == ["copies the passage"] * 2


def test_a_description_of_a_task(settings: dict[str, Any], pen: Pen) -> None:
    del settings["passages"]
    assert run(settings | {"description": "Greet people by name."}) == 0
    (edit,) = lines("edits.jsonl")
    assert (edit["prompt"], edit["answer"]) == ("greet Ann", "Hello, Ann!")
    assert (edit["kind"], edit["context"]) == ("examples", "Greet people by name.")


def test_nothing_left_is_an_error_that_shows_where_the_rejects_are(
    settings: dict[str, Any], pen: Pen, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["checks"] = [{"class_path": "RegexCheck", "init_args": {"must_match": "never"}}]
    assert run(settings) == 2
    error = capsys.readouterr().err
    assert "not one self-edit is left" in error
    assert "rejected.jsonl" in error
    assert lines("rejected.jsonl")
    assert not Path("edits/edits.jsonl").exists()


def test_a_passage_that_does_not_fit_is_reported_and_not_cut(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pen = Pen(monkeypatch)
    long = " ".join(["word"] * 300)
    plain = pen.encode
    monkeypatch.setattr(
        Author, "encode", lambda self, text: (5,) * 300 if long in text else plain(text)
    )
    write_jsonl(Path("passages.jsonl"), [*PASSAGES, {"text": long}])
    assert run(settings | {"max_new_tokens": 100}) == 0
    reasons = [r["reason"] for r in lines("rejected.jsonl") if r["passage"] == 4]
    assert reasons == ["the request has 300 tokens, 28 fit"] * 4
    assert not any(long in request for request in pen.written)


def test_a_real_model_writes(settings: dict[str, Any]) -> None:
    """A model of random weights writes nothing that can be read as a pair."""
    settings |= {"max_new_tokens": 8, "checks": [], "kinds": ["rewrites"], "limit": 1}
    settings["templates"] = {"rewrites": "{passage}"}
    assert run(settings) == 0
    first = Path("edits/edits.jsonl").read_bytes()
    assert first
    assert run(settings | {"out": "again"}) == 0
    assert Path("again/edits.jsonl").read_bytes() == first
    assert run(settings | {"out": "other", "seed": 1}) == 0
    assert Path("other/edits.jsonl").read_bytes() != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_passage": 0}, "per_passage must be at least 1, found 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"limit": 0}, "limit must be at least 1, found 0"),
        ({"description": "x"}, "give passages or a description, found both"),
        ({"passages": None}, "found neither"),
        ({"passages": None, "description": " "}, "the description is empty"),
        ({"passages": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"top_p": 2.0}, "top_p"),
        ({"max_new_tokens": 128}, "max_new_tokens is 128, which leaves no room for a request"),
        ({"device": "abacus"}, "device must be auto or a torch device, found 'abacus'"),
        ({"kinds": ["poems"]}, "kinds: found 'poems'"),
        ({"duplicate_threshold": 0}, "duplicate_threshold"),
        ({"model_name": "./nowhere"}, "does not exist"),
        ({"coffee": 1}, "coffee"),
        ({"checks": [{"class_path": "NoSuchCheck"}]}, "NoSuchCheck"),
    ],
)
def test_bad_settings_end_with_one_line(
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    try:
        status = run(settings | change)
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_check_that_raises_is_named(
    settings: dict[str, Any], pen: Pen, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings | {"checks": [{"class_path": "ScoreCheck"}]}) == 2
    assert "the check ScoreCheck raised" in capsys.readouterr().err


def test_the_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["self_edits", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in SelfEdits.__init__.__annotations__:
        assert name == "return" or f"--{name}" in out, name
    assert "Items of each kind that are asked for per passage" in " ".join(out.split())
