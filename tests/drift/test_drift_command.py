"""`python -m sdft check`: a model is held to what a run measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml
from conftest import echo_examples, save_model, write_jsonl

from sdft.cli import main
from sdft.metrics import Cell
from sdft.models import ModelSource, eos_token_ids
from sdft.report import RetentionReport
from sdft.rollout import GenerateEngine, Sampling

PROMPTS = [example.prompt for example in echo_examples(6)]


def answers(model: str) -> list[str]:
    """What a model answers greedily."""
    source = ModelSource(model)
    loaded, tokenizer = source.load_model(), source.load_tokenizer()
    texts = [f"user : {prompt} assistant :" for prompt in PROMPTS]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ends = eos_token_ids(loaded, tokenizer)
    found = GenerateEngine().generate(loaded, ids, Sampling(5, 0.0), ends, 0).completions()
    return [str(tokenizer.decode(one, skip_special_tokens=True)).strip() for one in found]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: str(save_model(folder / name, seed=s)) for s, name in enumerate(("good", "bad"))}


@pytest.fixture
def run(tmp_path: Path, models: dict[str, str], no_plots: None) -> Path:
    """A run's folder: the model `good` answered all of the suite `old` and half of `half`."""
    folder = tmp_path / "run"
    right = answers(models["good"])
    other = [*right[:3], "x", "x", "x"]
    for name, expected in (("old", right), ("half", other)):
        rows = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, expected, strict=True)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    task = {"class_path": "JSONLTask", "init_args": {"name": "new", "train": "new.jsonl"}}
    suites = [
        {
            "class_path": "JSONLTask",
            "init_args": {"name": n, "test": str(tmp_path / f"{n}.jsonl")},
        }
        for n in ("old", "half")
    ]
    config: dict[str, Any] = {
        "model": {
            "class_path": "sdft.SDFTModule",
            "init_args": {"model_name": "gone/with/the/run", "max_new_tokens": 5},
        },
        "data": {"class_path": "ContinualDataModule", "init_args": {"tasks": [task]}},
        "trainer": {"accelerator": "cpu"},
    }
    config["data"]["init_args"]["suites"] = suites
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    report = RetentionReport(["new"], ["old", "half"], 0, "sdft")
    cells = [
        Cell(None, 0, error="none"),
        *(Cell.from_scores(s) for s in ([1.0] * 6, [1.0, 0.0] * 3)),
    ]
    report.add_row(cells)
    report.add_row(cells)
    report.write(folder)
    return folder


def check(model: str, baseline: Path, *flags: str) -> int | str | None:
    try:
        return main(["check", "--model", model, "--baseline", str(baseline), *flags])
    except SystemExit as stop:
        return stop.code


SUITES = ("--columns", "old", "half")


def test_the_model_itself_passes(run: Path, models: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.json"
    assert check(models["good"], run, *SUITES, "--json", str(out)) == 0
    columns = json.loads(out.read_text())["columns"]
    assert list(columns) == ["old", "half"]
    assert [found["now"]["score"] for found in columns.values()] == [1.0, 0.5]
    assert {found["verdict"] for found in columns.values()} == {"kept"}


def test_one_that_forgot_does_not(
    run: Path, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xml = tmp_path / "junit.xml"
    assert check(models["bad"], run / "retention.json", *SUITES, "--junit", str(xml)) == 1
    (suite,) = ET.parse(xml).getroot()
    assert suite.get("failures") == "2"
    assert "FELL: old: 0.000, was 1.000" in capsys.readouterr().out
    assert check(models["bad"], run, *SUITES, "--allow", "1") == 0


def test_what_cannot_be_scored_is_an_error_and_the_rest_is_told(
    run: Path, models: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "half.jsonl").unlink()
    out = tmp_path / "report.json"
    assert check(models["good"], run, *SUITES, "--json", str(out)) == 2
    columns = json.loads(out.read_text())["columns"]
    assert [found["verdict"] for found in columns.values()] == ["kept", "unscored"]
    assert "half.jsonl" in columns["half"]["reason"]


def test_nothing_is_written_beside_what_was_asked_for(run: Path, models: dict[str, str]) -> None:
    before = sorted(run.rglob("*"))
    check(models["good"], run, *SUITES)
    assert sorted(run.rglob("*")) == before


def test_options_of_the_run_may_be_changed(run: Path, models: dict[str, str]) -> None:
    flags = (*SUITES, "--model.max_new_tokens", "1", "--limit", "4")
    assert check(models["good"], run, *flags) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--row", "third"), "--row 'third': "),
        (("--columns", "odl"), "--columns 'odl': "),
        (("--allow", "2"), "must lie in [0, 1]"),
        (("--limit", "0"), "at least 1"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_bad_options_are_named(
    run: Path,
    models: dict[str, str],
    flags: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check(models["good"], run, *flags) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"tasks": [], "suites": []}'])
def test_bad_baselines_are_named(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "retention.json"
    if content is not None:
        file.write_text(content)
    assert check("sdft:world", file) == 2
    assert f"--baseline {str(file)!r}" in capsys.readouterr().err


def test_a_configuration_without_the_column(
    run: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["data"]["init_args"]["suites"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert check(models["good"], run, *SUITES) == 2
    assert "no task or suite 'old'" in capsys.readouterr().err
    (run / "config.yaml").unlink()
    assert check(models["good"], run) == 2
    assert "no config.yaml beside" in capsys.readouterr().err
