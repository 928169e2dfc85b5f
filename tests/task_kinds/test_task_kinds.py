"""The paper's skills: their records become prompts, and a tiny model trains on each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import save_model, write_jsonl
from jsonargparse import ArgumentParser

from sdft.cli import main
from sdft.scorers import ChatEndpoint, ExactMatch, Judge, LetterMatch, ToolCallMatch
from sdft.task_kinds import MedicalTask, ScienceTask, ToolUseTask
from sdft.task_kinds.medical import medical_record
from sdft.task_kinds.science import SYSTEM, science_record
from sdft.task_kinds.tool_use import flattened, tool_use_record
from sdft.tasks import Split, Task

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TOOLALPACA = SHARED / "toolalpaca" / "eval.jsonl"
SCIENCE = SHARED / "sciknoweval_chemistry" / "eval.jsonl"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not here")

TOOL: dict[str, Any] = {
    "name": "Lamp",
    "description": "Lights",
    "nl_documentation": 'set: Set it.\nParameters: {"to": "string"}\n',
    "instruction": "Make it {bright}.",
    "golden_answer": [{"Action": "set", "Action_Input": '{"to": {"level": 1}}'}],
}
CHOICE: dict[str, Any] = {
    "question": "Which one?",
    "choices": {"label": ["A", "B"], "text": ["this", "that"]},
    "answerKey": "B",
    "answer": "",
    "prompt": {"default": "Choose."},
    "type": "mcq-4-choices",
    "details": {"level": "L3"},
}
MEDICAL: dict[str, Any] = {"Question": "Why?", "Complex_CoT": "Hm.", "Response": "Because."}


def rows(record: dict[str, Any], field: str, count: int = 4) -> list[dict[str, Any]]:
    return [{**record, field: f"{record[field]} {i}"} for i in range(count)]


def test_tool_use() -> None:
    found = tool_use_record(TOOL)
    assert found["prompt"].startswith("Your task is to answer the user's question using available ")
    assert '\nParameters: {"to": "string"}\n\nUse the following format:\n' in found["prompt"]
    assert found["prompt"].endswith("\n\nBegin!\nQuestion: Make it {bright}.")
    assert json.loads(found["answer"]) == TOOL["golden_answer"]
    assert found["demonstration"] == 'Action: set\nAction Input: {"to": {"level": 1}}'
    assert tool_use_record(found) == found
    shown = tool_use_record({**TOOL, "prompt": "own", "golden_response": ["one", "two"]})
    assert (shown["prompt"], shown["demonstration"]) == ("own", "one\ntwo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"golden_answer": None}, "no field 'golden_answer'"),
        ({"golden_answer": "[{'Action': 'f', 'Action_Input': '{'}]"}, "are not JSON"),
        ({"golden_answer": "none"}, "has no calls"),
        ({"golden_answer": "none", "golden_response": "x"}, "has no calls"),
        ({"instruction": None}, "no field 'instruction'"),
        ({"golden_response": [3]}, "must be a text or a list of texts"),
    ],
)
def test_a_bad_tool_record_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [TOOL, {**TOOL, **change}])
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2: .*{re.escape(message)}"):
        ToolUseTask(test=file).examples("test")


def test_the_questions_of_an_api() -> None:
    api = {"Name": "Lamp", "Description": "Lights", "NLDocumentation": "set: …"}
    gold = TOOL["golden_answer"]
    found = flattened({**api, "Instructions": ["a", "b"], "Golden_Answers": [gold, []]})
    assert [row["instruction"] for row in found] == ["a"]  # b has no calls
    assert tool_use_record(found[0])["prompt"].endswith("Question: a")
    said = 'I set it.\nAction: set\nAction Input: {"to": 1}'
    steps = [
        [["getDetails", "{}", "Which?"], "that one"],
        [["set", '{"to": 1}', f" {said}"], "done"],
    ]
    instances = [
        {"input": "go\nHint: x", "intermediate_steps": steps},
        {"input": "ask", "intermediate_steps": steps[:1]},
        {"input": "none"},
    ]
    (row,) = flattened({**api, "Instances": instances})
    assert row["instruction"] == "go"
    assert tool_use_record(row)["demonstration"] == said
    with pytest.raises(ValueError, match="no field 'Golden_Answers' or 'Instances'"):
        flattened(api)


def test_science() -> None:
    found = science_record(CHOICE)
    system, user = found["prompt"]
    assert system == {"role": "system", "content": SYSTEM}
    assert user["content"] == "Which one?\n\nA: this\nB: that"
    assert (found["answer"], found["demonstration"]) == ("B", "<answer>\nB\n</answer>")
    assert science_record(found) == found
    assert science_record({**CHOICE, "demonstration": "so: B"})["demonstration"] == "so: B"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": None}, "no field 'answerKey' or 'answer'"),
        ({"answerKey": "C"}, "the answer 'C' is none of the choices ['A', 'B'] (2)"),
        ({"choices": {"label": ["A", "B"], "text": ["x"]}}, "none of the choices ['A', 'B'] (1)"),
        ({"choices": None}, "'choices' must hold 'label' and 'text'"),
        ({"question": " "}, "no field 'question'"),
    ],
)
def test_a_bad_choice_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{**CHOICE, **change}])
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 1: .*{re.escape(message)}"):
        ScienceTask(test=file).examples("test")


def test_medical() -> None:
    found = medical_record(MEDICAL)
    assert found == {"prompt": "Why?", "answer": "Because.", "demonstration": "Because."}
    assert medical_record(MEDICAL, with_thoughts=True)["demonstration"] == "Hm.\n\nBecause."
    verifiable = {"Open-ended Verifiable Question": "Who?", "Ground-True Answer": "She."}
    assert medical_record(verifiable) == {
        "prompt": "Who?",
        "answer": "She.",
        "demonstration": "She.",
    }
    both = medical_record({**MEDICAL, **verifiable, "Question": None})
    assert (both["answer"], both["demonstration"]) == ("She.", "Because.")
    with pytest.raises(ValueError, match="no field 'answer' or"):
        medical_record({"Question": "Why?"})


def test_records_from_a_dataset(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [CHOICE])
    task = ScienceTask(path=str(tmp_path), splits={"test": "test"})
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [0, 0, 1]
    assert ScienceTask(path=str(tmp_path)).examples("train")[0].prompt.startswith("Which one?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "owner/name", "test": "x.jsonl"}, "give files (test) or path, not both"),
        ({"subset": "en"}, "subset and splits belong to a dataset: give its path"),
        ({"splits": {"test": "test"}}, "subset and splits belong to a dataset: give its path"),
        ({"path": "owner/name", "splits": {"dev": "x"}}, "splits must be of"),
        ({"steps": 1, "epochs": 1}, "give steps or epochs, not both"),
        ({"limit": 0}, "limit must be a whole number"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    for make in (ToolUseTask, ScienceTask, lambda **o: MedicalTask(ExactMatch(), **o)):
        with pytest.raises(ValueError, match=rf"task '\w+': {re.escape(message)}"):
            make(**options)


# A tiny model trains on each of them, from YAML.

JUDGE = {
    "class_path": "Judge",
    "init_args": {
        "model": {
            "class_path": "ChatEndpoint",
            "init_args": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0},
        }
    },
}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roomy")
    return save_model(folder, max_position_embeddings=4096)


def trained(roomy: Path, tasks: list[dict[str, Any]], *flags: str, command: str = "fit") -> Any:
    config = {
        "seed_everything": 1,
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "model": {
            "class_path": "sdft.SDFTModule",
            "init_args": {"model_name": str(roomy), "max_new_tokens": 4},
        },
        "data": {
            "steps": 2,
            "batch_size": 2,
            "max_student_tokens": 2000,
            "max_teacher_tokens": 2500,
            "tasks": tasks,
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main([command, "--config", "run.yaml", "--trainer.default_root_dir", "out", *flags]) == 0
    name = "retention.json" if command == "fit" else "predictions.jsonl"
    return sorted(Path("out").rglob(name))[-1].read_text()


def spec(kind: str, file: Path, **options: Any) -> dict[str, Any]:
    return {"class_path": kind, "init_args": {"train": str(file), "test": str(file), **options}}


@pytest.mark.usefixtures("no_plots")
def test_two_steps_on_each_kind(
    tmp_path: Path, roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tasks = [
        spec("ToolUseTask", write_jsonl(tmp_path / "t.jsonl", rows(TOOL, "instruction"))),
        spec("ScienceTask", write_jsonl(tmp_path / "s.jsonl", rows(CHOICE, "question"))),
        spec(
            "sdft.task_kinds.MedicalTask",
            write_jsonl(tmp_path / "m.jsonl", rows(MEDICAL, "Question")),
            scorer=JUDGE,
        ),
    ]
    report = json.loads(trained(roomy, tasks))
    assert report["tasks"] == ["tool_use", "science", "medical"]
    assert report["stage_steps"] == [2, 2, 2]
    for row in report["matrix"]:
        assert [cell["score"] for cell in row[:2]] == [0.0, 0.0]
        assert row[2]["score"] in (None, 0.0)  # the judge is down: no score, unless all are empty
        assert (
            row[2]["score"] == 0.0
            or "the judge 'm' at http://127.0.0.1:9/v1 does" in row[2]["error"]
        )
    (cost,) = Path("out").rglob("cost.json")
    judged = json.loads(cost.read_text())["judges"]["medical"]
    assert (judged["calls"], judged["price"]) == (0, None)
    lines = trained(roomy, tasks[:2], command="predict").splitlines()
    reasons = {(r["task"], r["reason"]) for r in map(json.loads, lines)}
    assert reasons == {
        ("tool_use", "no call in the response"),
        ("science", "no letter in <answer>"),
    }


@real
@pytest.mark.usefixtures("no_plots")
def test_two_steps_on_the_real_records(
    tmp_path: Path, roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = [
        spec("ToolUseTask", TOOLALPACA, limit=4),
        spec("ScienceTask", SCIENCE, limit=4),
    ]
    report = json.loads(trained(roomy, tasks))
    assert report["stage_steps"] == [2, 2]
    assert [cell["n"] for cell in report["matrix"][-1]] == [4, 4]


@real
@pytest.mark.parametrize(
    ("task", "scorer", "count"),
    [
        (ToolUseTask(test=TOOLALPACA), ToolCallMatch, 97),
        (ScienceTask(test=SCIENCE), LetterMatch, 507),
    ],
)
def test_every_real_demonstration_is_right(task: Task, scorer: type, count: int) -> None:
    split: Split = "test"
    examples = task.examples(split)
    assert len(examples) == count
    assert isinstance(task.scorer, scorer)
    for example in examples:
        assert example.demonstration is not None
        assert task.scorer(example.demonstration, example) == 1.0
        assert task.scorer("I do not know.", example) == 0.0


@real
def test_the_prompts_are_those_of_the_published_sets() -> None:
    tools = [json.loads(line) for line in TOOLALPACA.read_text("utf-8").splitlines()]
    made = [tool_use_record({**row, "prompt": None})["prompt"] for row in tools]
    # Four records hold their documentation in another layout than their prompt.
    assert sum(own == row["prompt"] for own, row in zip(made, tools, strict=True)) == 93
    for line in SCIENCE.read_text("utf-8").splitlines():
        published = json.loads(line)
        question, _, options = published["prompt"][1]["content"].rpartition("\n\n")
        pairs = [option.partition(": ") for option in options.split("\n")]
        choices = {"label": [pair[0] for pair in pairs], "text": [pair[2] for pair in pairs]}
        raw = {"question": question, "choices": choices, "answerKey": published["answer"]}
        assert science_record(raw)["prompt"] == [
            {"role": message["role"], "content": message["content"]}
            for message in published["prompt"]
        ]


@pytest.mark.parametrize("kind", [ToolUseTask, ScienceTask, MedicalTask, Judge, ChatEndpoint])
def test_every_argument_has_help(kind: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    own = [a for a in parser._actions if a.dest not in ("help", "config") and "." not in a.dest]
    assert len(own) >= 5
    assert [action.dest for action in own if not action.help] == []


def test_yaml_gives_a_judge() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    config = {"class_path": "MedicalTask", "init_args": {"test": "x.jsonl", "scorer": JUDGE}}
    task = parser.instantiate(parser.parse_args([f"--task={json.dumps(config)}"])).task
    assert isinstance(task, MedicalTask)
    assert isinstance(task.scorer, Judge)
    assert task.name == "medical"


# What docs/tasks.md shows.


def code_blocks(language: str) -> list[str]:
    text = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_example_task_and_scorer_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task_code, scorer_code = code_blocks("python")
    found: dict[str, Any] = {}
    exec(task_code, found)
    task = found["Sums"](test=write_jsonl(tmp_path / "x.jsonl", [{"a": 1, "b": 2}]))
    (example,) = task.examples("test")
    assert (example.prompt, task.scorer("It is 3.", example)) == ("1 + 2?", 1.0)
    exec(scorer_code, found)
    scorer = found["StartsWith"]()
    assert (scorer("3!", example), scorer.explain("4", example)) == (1.0, "begins with '4'")


def test_the_configuration_of_the_docs() -> None:
    tasks = yaml.safe_load(code_blocks("yaml")[0])["data"]["tasks"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    made = [parser.instantiate(parser.parse_args([f"--task={json.dumps(t)}"])).task for t in tasks]
    assert [task.name for task in made] == ["tool_use", "science", "medical"]
