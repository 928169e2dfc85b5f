"""The tools that prepare the paper's skills and GSM8K: what they write, and what they record."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from sdft.jsonl import read_jsonl
from sdft.scorers import LetterMatch, NumericMatch, ToolCallMatch
from sdft.task_kinds import MedicalTask, ScienceTask, ToolUseTask
from sdft.tasks import JSONLTask, RecordTask

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
if str(TOOLS) not in sys.path:
    sys.path.append(str(TOOLS))
SHARED = ROOT.parent / "shared" / "data"
SPLITS = ("train", "validation", "test")
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not here")

from splits import Row, normalised, shared_out  # noqa: E402

Tool = Callable[..., tuple[int, str]]
Prepared = Callable[..., dict[str, Any]]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Tool:
    """Runs a tool in this process, below the test's folder; returns status and errors."""
    monkeypatch.chdir(tmp_path)

    def call(tool: str, *flags: str | Path) -> tuple[int, str]:
        file = str(TOOLS / f"prepare_{tool}.py")
        monkeypatch.setattr(sys, "argv", [file, *map(str, flags), "--out", "out"])
        capsys.readouterr()
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err
        return 0, ""

    return call


@pytest.fixture
def prepared(run: Tool, tmp_path: Path) -> Prepared:
    """Runs a tool that has to succeed; returns its manifest."""

    def call(tool: str, *flags: str | Path) -> dict[str, Any]:
        assert run(tool, *flags) == (0, "")
        manifest: dict[str, Any] = json.loads((tmp_path / "out" / "prepared.json").read_text())
        return manifest

    return call


def read(folder: Path, split: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(folder / "out" / f"{split}.jsonl")]  # type: ignore[misc]


def questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "question": f"What is {i} + {i}?",
            "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}",
        }
        for i in range(start, start + count)
    ]


def choices(count: int, **options: Any) -> list[dict[str, Any]]:
    pair = {"label": ["A", "B"], "text": ["this", "that"]}
    return [
        {"question": f"Which {i}?", "choices": pair, "answerKey": "AB"[i % 2], **options}
        for i in range(count)
    ]


def apis(count: int, name: str) -> list[dict[str, Any]]:
    gold = [{"Action": "set", "Action_Input": '{"to": {"x": 1}}'}]
    return [
        {
            "Name": f"{name}{i}",
            "Description": "d",
            "NLDocumentation": "set: …",
            "Instructions": [f"do {i}", f"undo {i}", "nothing"],
            "Golden_Answers": [gold, gold, []],
        }
        for i in range(count)
    ]


def as_rows(*texts: str) -> list[Row]:
    return [Row(text, "", f"line {i}", {"prompt": text}) for i, text in enumerate(texts)]


# Sharing out.


def test_shares_are_kept_and_no_text_stands_twice() -> None:
    rows = as_rows(*(f"t {i}" for i in range(200)), "T  1", "t 2")
    splits = shared_out(rows, [], (75, 5, 20), seed=0)
    assert [len(splits[name]) for name in SPLITS] == [150, 10, 40]
    texts = [normalised(row.text) for own in splits.values() for row in own]
    assert len(texts) == len(set(texts)) == 200
    assert splits == shared_out(rows, [], (75, 5, 20), seed=0)
    assert splits != shared_out(rows, [], (75, 5, 20), seed=1)


def test_test_rows_of_their_own_never_train() -> None:
    splits = shared_out(
        as_rows(*(f"t {i}" for i in range(81))), as_rows("T 1", "new", "NEW"), (75, 5, 20), 0
    )
    assert sorted(row.text for row in splits["test"]) == ["T 1", "new"]
    assert [len(splits[name]) for name in SPLITS] == [75, 5, 2]
    assert "t 1" not in {row.text for own in ("train", "validation") for row in splits[own]}


@pytest.mark.parametrize(
    ("shares", "rows", "message"),
    [
        ((75, 5, 19), 100, "three percentages that sum to 100"),
        ((0, 50, 50), 100, "three percentages that sum to 100"),
        ((75, 5, 20), 2, "2 rows are too few"),
        ((75, 25, 0), 1, "1 rows are too few"),
    ],
)
def test_what_cannot_be_shared_out(shares: Any, rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared_out(as_rows(*map(str, range(rows))), [], shares, 0)


# Each tool.


def test_gsm8k(tmp_path: Path, prepared: Prepared) -> None:
    write_jsonl(tmp_path / "train.jsonl", questions(160))
    write_jsonl(tmp_path / "test.jsonl", [*questions(20, start=150), *questions(1, start=150)])
    manifest = prepared("gsm8k", "--source", tmp_path)
    assert {name: own["rows"] for name, own in manifest["splits"].items()} == {
        "train": 141,
        "validation": 9,
        "test": 20,
    }
    assert manifest["left_out"]["repeated"] == 11
    files = [tmp_path / "out" / f"{split}.jsonl" for split in SPLITS]
    task = JSONLTask("maths", *files, scorer=NumericMatch(marker="####"))
    for split in SPLITS:
        for example in task.examples(split):
            assert example.demonstration is not None
            assert "<<" not in example.demonstration
            assert example.answer.isdigit()
            assert task.scorer(f"{example.demonstration} apples of 9", example) == 1.0


def test_science(tmp_path: Path, prepared: Prepared) -> None:
    wanted = choices(40, type="mcq-4-choices", details={"level": "L3"})
    others = choices(2, type="mcq-4-choices", details={"level": "L1"})
    others += choices(3, type="filling", details={"level": "L3"})
    source = write_jsonl(tmp_path / "x.jsonl", [*wanted, *others, wanted[0]])
    manifest = prepared("science", "--source", source)
    assert manifest["left_out"] == {
        "repeated": 1,
        "unwanted": 5,
        "unusable": 0,
        "reasons": [],
    }
    assert [manifest["splits"][name]["rows"] for name in SPLITS] == [30, 2, 8]
    task = ScienceTask(test=tmp_path / "out" / "test.jsonl")
    for example in task.examples("test"):
        assert example.messages[0]["role"] == "system"
        assert LetterMatch()(example.demonstration or "", example) == 1.0
    manifest = prepared("science", "--source", source, "--level", "all")
    assert manifest["left_out"]["unwanted"] == 3
    assert manifest["left_out"]["repeated"] == 3


def test_tool_use_from_the_files_of_its_authors(tmp_path: Path, prepared: Prepared) -> None:
    train, test = apis(20, "Lamp"), apis(2, "Bell")
    train[3]["Golden_Answers"][1] = [{"Action": "set", "Action_Input": "{'to': 1"}]
    (tmp_path / "train.json").write_text(json.dumps(train), "utf-8")
    (tmp_path / "test.json").write_text(json.dumps(test), "utf-8")
    flags = ("--source", "train.json", "--test-source", "test.json")
    manifest = prepared("tool_use", *flags)
    assert [manifest["splits"][name]["rows"] for name in SPLITS] == [37, 2, 4]
    assert manifest["left_out"]["unusable"] == 1
    assert "train.json, entry 3, item 1: " in manifest["left_out"]["reasons"][0]
    task = ToolUseTask(test=tmp_path / "out" / "test.jsonl")
    for example in task.examples("test"):
        assert "\nName: Bell" in example.prompt
        assert ToolCallMatch()(example.demonstration or "", example) == 1.0


def test_medical(tmp_path: Path, prepared: Prepared) -> None:
    rows = [{"Question": f"Why {i}?", "Complex_CoT": "Hm.", "Response": "So."} for i in range(20)]
    write_jsonl(tmp_path / "x.jsonl", [*rows, {"Question": "Why?"}])
    manifest = prepared("medical", "--source", "x.jsonl", "--with-thoughts")
    assert [manifest["splits"][name]["rows"] for name in SPLITS] == [15, 1, 4]
    assert manifest["left_out"]["unusable"] == 1
    task: RecordTask = MedicalTask(NumericMatch(), train=tmp_path / "out" / "train.jsonl")
    assert {example.demonstration for example in task.examples("train")} == {"Hm.\n\nSo."}
    manifest = prepared("medical", "--source", "x.jsonl", "--limit", "10")
    assert sum(own["rows"] for own in manifest["splits"].values()) == 10


def test_the_manifest_says_what_was_done(tmp_path: Path, prepared: Prepared) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", choices(40))
    manifest = prepared("science", "--source", "x.jsonl", "--seed", "3")
    assert manifest["seed"] == 3
    assert manifest["shares"] == [75, 5, 20]
    assert manifest["command"].endswith("prepare_science.py --source x.jsonl --seed 3 --out out")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest["sources"] == [{"file": "x.jsonl", "records": 40, "sha256": digest}]
    for name, own in manifest["splits"].items():
        content = (tmp_path / "out" / f"{name}.jsonl").read_bytes()
        assert own["sha256"] == hashlib.sha256(content).hexdigest()
        assert own["rows"] == content.count(b"\n")
    first = read(tmp_path, "train")
    assert prepared("science", "--source", "x.jsonl", "--seed", "3") == manifest
    assert read(tmp_path, "train") == first
    assert prepared("science", "--source", "x.jsonl", "--seed", "4") != manifest


def test_a_dataset_folder_is_read_and_its_rows_are_hashed(
    tmp_path: Path, prepared: Prepared
) -> None:
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list(choices(40))}).save_to_disk(
        str(tmp_path / "saved")
    )
    manifest = prepared("science", "--source", "saved")
    (facts,) = manifest["sources"]
    assert {key: facts[key] for key in ("dataset", "split", "records")} == {
        "dataset": "saved",
        "split": "test",
        "records": 40,
    }
    assert len(facts["sha256"]) == 64


@pytest.mark.parametrize(
    ("tool", "flags", "message"),
    [
        ("gsm8k", ("--source", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        ("tool_use", ("--source", "./nowhere/x"), "no such file or folder"),
        ("medical", ("--source", "bad.json"), "bad.json: must hold a list of objects"),
        ("medical", ("--source", "empty.json"), "no record of that kind"),
        ("science", ("--source", "bad.jsonl"), "bad.jsonl, line 1: no field 'answerKey'"),
        ("science", ("--source", "few.jsonl"), "2 rows are too few"),
        ("science", ("--source", "few.jsonl", "--shares", "1", "2", "3"), "sum to 100"),
        ("gsm8k", ("--source", "few.jsonl"), "'question' and 'answer' must be texts"),
        ("medical", (), "HF_HUB_OFFLINE forbids asking the hub"),
    ],
)
def test_a_bad_source_ends_with_one_line(
    tmp_path: Path, run: Tool, tool: str, flags: tuple[str, ...], message: str
) -> None:
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty.json").write_text("[]")
    write_jsonl(tmp_path / "bad.jsonl", [{"x": 1}])
    write_jsonl(tmp_path / "few.jsonl", choices(2))
    status, told = run(tool, *flags)
    assert status == 2
    assert message in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@real
@pytest.mark.parametrize(
    ("tool", "source", "sizes"),
    [
        ("gsm8k", "gsm8k", [7003, 467, 1319]),
        ("tool_use", "toolalpaca/eval.jsonl", [73, 5, 19]),
        ("science", "sciknoweval_chemistry/eval.jsonl", [381, 25, 101]),
    ],
)
def test_real_sources(
    tmp_path: Path, prepared: Prepared, tool: str, source: str, sizes: list[int]
) -> None:
    manifest = prepared(tool, "--source", SHARED / source)
    assert [manifest["splits"][name]["rows"] for name in SPLITS] == sizes
    assert manifest["left_out"]["unusable"] == 0
    prompts = [
        normalised(json.dumps(row["prompt"])) for name in SPLITS for row in read(tmp_path, name)
    ]
    assert len(prompts) == len(set(prompts)) == sum(sizes)
