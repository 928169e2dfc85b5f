"""Tasks: what becomes of a record, and one clear error for everything that is wrong with it."""

import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from jsonargparse import ArgumentParser

from sdft.examples import Example, as_messages
from sdft.scorers import ExactMatch, JSONMatch, RegexMatch
from sdft.tasks import DatasetTask, JSONLTask, PythonTask, Split, Task

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ROW = {"prompt": "p", "answer": "a", "demonstration": "d", "context": "c"}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path, split: Split = "train", **options: Any) -> list[Example]:
    options[split] = path
    return list(JSONLTask("t", **options).examples(split))


# The base class.


@pytest.mark.parametrize("name", ["a", "A-1.b_c", "_x", "7"])
def test_a_good_name(name: str) -> None:
    assert PythonTask(name).name == name


@pytest.mark.parametrize("name", ["", "a b", "a/b", ".", "../a", "-a", "ä", "a\n", "a:b", "a%"])
def test_a_bad_name(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"task name {name!r}: use letters, digits")):
        PythonTask(name)


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="task 't': give steps or epochs, not both"):
        PythonTask("t", steps=1, epochs=1)


@pytest.mark.parametrize("what", ["steps", "epochs", "limit"])
@pytest.mark.parametrize("count", [0, -1, 1.5, float("nan"), True, "3"])
def test_counts_are_whole_and_positive(what: str, count: Any) -> None:
    with pytest.raises(ValueError, match=rf"task 't': {what} must be a whole number of at least 1"):
        JSONLTask("t", **{what: count})


def test_the_schedule_is_kept() -> None:
    assert (PythonTask("t", steps=3).steps, PythonTask("t", steps=3).epochs) == (3, None)
    assert (PythonTask("t", epochs=2).steps, PythonTask("t", epochs=2).epochs) == (None, 2)


# Examples from Python.


def test_python_examples() -> None:
    train = [Example(as_messages("p"), "a", "d")]
    task = PythonTask("t", train, test=[Example(as_messages("q"), "b")])
    assert task.examples("train") == train
    assert list(task.examples("validation")) == []
    assert task.examples("test")[0].answer == "b"
    assert isinstance(task.scorer, ExactMatch)


@pytest.mark.parametrize("demonstration", [None, "", " \n"])
def test_a_python_training_example_needs_a_demonstration(demonstration: str | None) -> None:
    good = Example(as_messages("p"), "a", "d")
    with pytest.raises(ValueError, match="task 't': training example 1 has no demonstration"):
        PythonTask("t", train=[good, Example(as_messages("p"), "a", demonstration)])


# JSONL: what is read.


def test_a_whole_record(tmp_path: Path) -> None:
    expected = Example(({"role": "user", "content": "p"},), "a", "d", "c")
    assert read(write(tmp_path / "x.jsonl", ROW)) == [expected]


def test_fields_can_be_named(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"q": "p", "label": "a", "demo": "d", "text": "c"})
    options: dict[str, Any] = {
        "prompt_field": "q",
        "answer_field": "label",
        "demonstration_field": "demo",
    }
    assert read(file, context_field="text", **options) == read(write(tmp_path / "y.jsonl", ROW))


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_messages_in_either_field(tmp_path: Path, field: str) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (example,) = read(write(tmp_path / "x.jsonl", {field: messages, "answer": "a"}))
    assert example.messages == tuple(messages)


def test_the_prompt_field_goes_before_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "u"}]
    (example,) = read(write(tmp_path / "x.jsonl", {**ROW, "messages": messages}))
    assert example.prompt == "p"


def test_the_answer_is_the_demonstration_where_there_is_none(tmp_path: Path) -> None:
    (example,) = read(write(tmp_path / "x.jsonl", {"prompt": "p", "answer": "a"}))
    assert example.demonstration == "a"


def test_the_demonstration_is_the_answer_of_a_training_record_without(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "p", "demonstration": "d", "answer": None})
    assert [(example.answer, example.demonstration) for example in read(file)] == [("d", "d")]
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: no field 'answer'"):
        read(file, "test")


def test_an_evaluated_record_needs_no_demonstration(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "p", "answer": "a"})
    (example,) = read(file, "test", demonstration_from_answer=False)
    assert example.demonstration is None


def test_blank_lines_at_the_end_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\n  \n")
    assert len(read(file)) == 1


def test_line_separators_within_a_text_do_not_end_a_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({**ROW, "prompt": "a\u2028b\x85c"}, ensure_ascii=False))
    assert [example.prompt for example in read(file)] == ["a\u2028b\x85c"]


def test_a_relative_path_starts_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.jsonl", ROW)
    monkeypatch.chdir(tmp_path)
    assert len(read(Path("x.jsonl"))) == 1


def test_splits_without_a_file_are_empty(tmp_path: Path) -> None:
    task = JSONLTask("t", test=write(tmp_path / "x.jsonl", ROW))
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [0, 0, 1]


def test_a_split_is_read_when_asked_for_and_once(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", ROW)
    task = JSONLTask("t", train=file, test=tmp_path / "missing.jsonl")
    first = task.examples("train")
    file.unlink()
    assert task.examples("train") is first


def test_limit_reads_no_further(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", ROW, {**ROW, "prompt": "q"}, "broken")
    assert [example.prompt for example in read(file, limit=2)] == ["p", "q"]
    with pytest.raises(ValueError, match="line 3"):
        read(file, limit=3)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("Say {prompt} in {n} words", 'Say {answer} {"x": 1} in 3 words'),
        ('{"call": {"f": {n}}}', '{"call": {"f": 3}}'),
        (r"Put it in \boxed{{answer}}", r"Put it in \boxed{answer}"),
        ("{} { } {slots}", '{} { } {"city": "Zürich"}'),
    ],
)
def test_a_template_fills_names_and_leaves_other_braces(
    tmp_path: Path, template: str, prompt: str
) -> None:
    row = {**ROW, "prompt": '{answer} {"x": 1}', "n": 3, "slots": {"city": "Zürich"}}
    (example,) = read(write(tmp_path / "x.jsonl", row), prompt_template=template)
    assert example.prompt == prompt


# JSONL: what is refused. Every message names the file and, where there is one, the line.


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"prompt": "p"', "broken JSON: Expecting ',' delimiter (character 15)"),
        ("[1, 2]", "not a JSON object but [1, 2]"),
        ('"text"', 'not a JSON object but "text"'),
        ("", "the line is blank"),
        (
            '{"question": "p", "answer": "a"}',
            "no field 'prompt' (or 'messages'); fields found: 'question', 'answer'",
        ),
        ("{}", "no field 'prompt' (or 'messages'); fields found: none"),
        (
            '{"prompt": "p", "context": "c"}',
            "a training example needs a demonstration: "
            "no field 'demonstration' or 'answer'; fields found: 'prompt', 'context'",
        ),
        (
            '{"prompt": "p", "answer": "a", "demonstration": " "}',
            "a training example needs a demonstration: it is empty",
        ),
        (
            '{"prompt": 5, "answer": "a"}',
            "field 'prompt' must be a text or a list of messages, found 5",
        ),
        ('{"prompt": "p", "answer": ["a"]}', "field 'answer' must be a text, found [\"a\"]"),
        (
            '{"prompt": "p", "demonstration": {"a": "%s"}}' % ("x" * 80),
            'field \'demonstration\' must be a text, found {"a": "' + "x" * 52 + "…",
        ),
        (
            '{"prompt": "p", "answer": "a", "context": 1}',
            "field 'context' must be a text, found 1",
        ),
        ('{"prompt": " ", "answer": "a"}', "the prompt is empty: the last user turn has no text"),
        (
            '{"prompt": [], "answer": "a"}',
            "the prompt is empty: give a text or a list of messages",
        ),
        (
            '{"prompt": [{"role": "user"}], "answer": "a"}',
            "a message needs the texts 'role' and 'content', found {'role': 'user'}",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "answer": "a"}',
            "the last message must be the user's, found role 'assistant'",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second: str, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(f"{json.dumps(ROW)}\n{second}\n{json.dumps(ROW)}\n")
    with pytest.raises(ValueError, match="line 2") as caught:
        read(file)
    assert str(caught.value) == f"{file}, line 2: {message}"


def test_a_missing_demonstration_is_not_taken_from_the_answer_when_told(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "p", "answer": "a"})
    with pytest.raises(ValueError, match="demonstration") as caught:
        read(file, demonstration_from_answer=False)
    assert str(caught.value) == (
        f"{file}, line 1: a training example needs a demonstration: "
        "no field 'demonstration'; fields found: 'prompt', 'answer'"
    )


def test_a_template_with_an_unknown_field_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"request": "r", "answer": "a"})
    with pytest.raises(ValueError, match="template") as caught:
        read(file, prompt_template="Do {requst}")
    assert str(caught.value) == (
        f"{file}, line 1: the prompt template: no field 'requst'; fields found: 'request', 'answer'"
    )


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    first = json.dumps({**ROW, "prompt": "ä"}, ensure_ascii=False).encode() + b"\n"
    file.write_bytes(first + b'{"prompt": "\xe4"}\n')
    with pytest.raises(ValueError, match="UTF-8") as caught:
        read(file)
    offset = len(first) + len(b'{"prompt": "')
    assert str(caught.value) == (
        f"{file}, line 2: not UTF-8 at byte offset {offset} of the file (byte 0xe4)"
    )


@pytest.mark.parametrize("content", ["", "\n", "\n \n\n"])
def test_an_empty_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="empty") as caught:
        read(file)
    assert str(caught.value) == f"{file}: the file is empty"


def test_a_missing_file_is_named_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such file") as caught:
        read(Path("data/x.jsonl"))
    assert str(caught.value) == (
        f"{tmp_path}/data/x.jsonl: no such file (working directory: {tmp_path})"
    )


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: no such file")):
        read(tmp_path)


# Hugging Face datasets.


@pytest.fixture
def saved(tmp_path: Path) -> str:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "number": datasets.Value("int64"),
        }
    )
    rows = {"text": ["p", "q", "r"], "label": [1, 0, 1], "number": [5, 6, 7]}
    table = datasets.Dataset.from_dict(rows, features=features)
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": table, "held_out": table.select([2])}).save_to_disk(folder)
    return str(folder)


def test_a_saved_dataset_with_class_labels_and_numbers(saved: str) -> None:
    fields: dict[str, Any] = {"prompt_field": "text", "answer_field": "label"}
    task = DatasetTask("t", saved, splits={"train": "train", "test": "held_out"}, **fields)
    assert [(e.prompt, e.answer) for e in task.examples("train")] == [
        ("p", "yes"),
        ("q", "no"),
        ("r", "yes"),
    ]
    assert [example.prompt for example in task.examples("test")] == ["r"]
    assert list(task.examples("validation")) == []
    numbers = DatasetTask(
        "t", saved, answer_field="number", prompt_template="{text}{label}{number}"
    )
    first = numbers.examples("train")[0]
    assert (first.prompt, first.answer) == ("pyes5", "5")


def test_a_saved_single_table_is_the_train_split(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"prompt": ["p"], "answer": ["a"]}).save_to_disk(tmp_path / "one")
    task = DatasetTask("t", str(tmp_path / "one"))
    assert [len(task.examples(split)) for split in ("train", "validation", "test")] == [1, 0, 0]


def test_an_unknown_label_counts_as_absent(tmp_path: Path) -> None:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"prompt": ["p", "q"], "answer": [1, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"split 'train', row 1: .*no field 'demonstration' or"):
        DatasetTask("t", str(tmp_path / "one")).examples("train")


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_local_files(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"prompt": ["p", "q"], "answer": ["1", "2"]})
    file = tmp_path / f"x.{kind}"
    getattr(table, f"to_{kind}")(file)
    task = DatasetTask(
        "t",
        kind,
        data_files={"train": str(file)},
        splits={"train": "train[:1]", "test": "train[1:]"},
    )
    assert [(e.prompt, e.answer) for e in task.examples("train")] == [("p", "1")]
    assert [(e.prompt, e.answer) for e in task.examples("test")] == [("q", "2")]


def test_messages_in_a_dataset(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    datasets.Dataset.from_dict({"messages": [messages], "answer": ["a"]}).save_to_disk(
        tmp_path / "one"
    )
    (example,) = DatasetTask("t", str(tmp_path / "one")).examples("train")
    assert example.messages == tuple(messages)


def test_dataset_limit(saved: str) -> None:
    task = DatasetTask("t", saved, prompt_field="text", answer_field="label", limit=2)
    assert len(task.examples("train")) == 2


def test_a_bad_row_names_split_row_and_field(saved: str) -> None:
    with pytest.raises(ValueError, match="row") as caught:
        DatasetTask("t", saved, prompt_field="text").examples("train")
    assert str(caught.value) == (
        f"dataset {saved!r}, split 'train', row 0: a training example needs a demonstration: "
        "no field 'demonstration' or 'answer'; fields found: 'text', 'label', 'number'"
    )


@pytest.mark.parametrize("split", ["dev", "train[:1]"])
def test_a_missing_split_names_those_there_are(saved: str, split: str) -> None:
    with pytest.raises(ValueError, match="split") as caught:
        DatasetTask("t", saved, splits={"validation": split}).examples("validation")
    assert str(caught.value) == (
        f"dataset {saved!r} has no split {split!r}; it has: 'train', 'held_out'"
    )


@pytest.mark.parametrize("content", [None, "prompt,answer\n", 'prompt\n"'])
def test_files_that_cannot_be_loaded_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "x.csv"
    if content is not None:
        file.write_text(content)
    place = f"cannot load dataset 'csv' (data files {str(file)!r}): "
    with pytest.raises(ValueError, match=re.escape(place)):
        DatasetTask("t", "csv", data_files=str(file)).examples("train")


def test_a_saved_folder_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    datasets.Dataset.from_dict({"prompt": [], "answer": []}).save_to_disk(saved)
    with pytest.raises(ValueError, match=re.escape(f"cannot load dataset {saved!r}: ")):
        DatasetTask("t", saved).examples("train")


def test_splits_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"task 't': splits must be of .* found \['dev'\]"):
        DatasetTask("t", "json", splits={"dev": "train"})


# From YAML.


def parse(*arguments: str) -> Task:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    task: Task = parser.instantiate(parser.parse_args(arguments)).task
    return task


def test_yaml_with_full_class_paths(tmp_path: Path) -> None:
    config = {
        "class_path": "sdft.tasks.JSONLTask",
        "init_args": {
            "name": "calls",
            "train": os.fspath(write(tmp_path / "x.jsonl", ROW)),
            "scorer": {
                "class_path": "sdft.scorers.RegexMatch",
                "init_args": {"pattern": "<a>(.)</a>"},
            },
            "epochs": 2,
        },
    }
    task = parse(f"--task={json.dumps(config)}")
    assert isinstance(task, JSONLTask)
    assert isinstance(task.scorer, RegexMatch)
    assert (task.scorer.pattern, task.epochs) == ("<a>(.)</a>", 2)
    assert len(task.examples("train")) == 1


def test_yaml_with_short_class_names() -> None:
    arguments = ["--task.name=x", "--task.scorer=JSONMatch", "--task.limit=3"]
    task = parse("--task=JSONLTask", *arguments)
    assert isinstance(task, JSONLTask)
    assert isinstance(task.scorer, JSONMatch)
    splits = '--task.splits={"train": "train[:9]"}'
    task = parse("--task=DatasetTask", "--task.path=json", splits, *arguments)
    assert isinstance(task, DatasetTask)
    assert (task.splits, task.limit) == ({"train": "train[:9]"}, 3)


def test_every_argument_has_help() -> None:
    for name in ("JSONLTask", "DatasetTask"):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments({"JSONLTask": JSONLTask, "DatasetTask": DatasetTask}[name])
        actions = [action for action in parser._actions if action.dest not in ("help", "config")]
        assert len(actions) >= 14
        undocumented = [a.dest for a in actions if not a.help and not a.dest.startswith("scorer.")]
        assert undocumented == []


# Real data.


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not here")
@pytest.mark.parametrize(
    ("folder", "options", "rows"),
    [
        ("banking77", {"prompt_field": "text", "answer_field": "label"}, 10003),
        ("gsm8k", {"prompt_field": "question"}, 7470),
        ("snips", {"prompt_template": "{request} {slots}", "answer_field": "intent"}, 1400),
    ],
)
def test_real_files(folder: str, options: dict[str, Any], rows: int) -> None:
    examples = read(SHARED / folder / "train.jsonl", **options)
    assert len(examples) == rows
    assert all(example.demonstration == example.answer for example in examples)
