"""The tools that prepare real data: disjoint splits, valid records, errors that name the file."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sdft import Example
from sdft.examples import as_messages
from sdft.scorers import ExactMatch, JSONMatch, NumericMatch
from sdft.tasks import JSONLTask

TOOLS = Path(__file__).resolve().parent.parent / "tools"
if str(TOOLS) not in sys.path:
    sys.path.append(str(TOOLS))
SPLITS = ("train", "validation", "test")
INTENTS = (
    "AddToPlaylist",
    "BookRestaurant",
    "GetWeather",
    "PlayMusic",
    "RateBook",
    "SearchCreativeWork",
    "SearchScreeningEvent",
)


def load(name: str) -> ModuleType:
    """A tool, the same module that other tools import."""
    return importlib.import_module(name)


snips, banking, squad = (load(f"prepare_{name}") for name in ("snips", "banking77", "squad"))
splits = sys.modules["splits"]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def requests(split: str, count: int) -> list[dict[str, Any]]:
    return [
        {"request": f"{split} {intent} «{i}» {{x}}", "intent": intent, "slots": {"n": str(i)}}
        for intent in INTENTS
        for i in range(count)
    ]


def messages(split: str, count: int) -> list[dict[str, Any]]:
    labels = ("card_arrival", "Lost_card", "top_up", "exchange_rate", "cash_refused")
    return [{"text": f"{split} {a} {i}", "label": a} for a in labels for i in range(count)]


@pytest.fixture
def snips_source(tmp_path: Path) -> Path:
    train, test = requests("a", 6), requests("b", 3)
    # Texts that the two files share, and one that a file holds twice.
    train += [{**test[0], "request": test[0]["request"].upper()}, train[5]]
    test.append({**test[4], "request": f"  {test[4]['request'].replace(' ', '  ')} "})
    write(tmp_path / "raw" / "train.jsonl", train)
    write(tmp_path / "raw" / "test.jsonl", test)
    return tmp_path / "raw"


@pytest.fixture
def banking_source(tmp_path: Path) -> Path:
    write(tmp_path / "raw" / "train.jsonl", messages("a", 6))
    write(tmp_path / "raw" / "test.jsonl", [*messages("b", 3), messages("a", 1)[0]])
    return tmp_path / "raw"


def said(folder: Path, split: str) -> list[str]:
    lines = [line["prompt"] for line in read(folder / f"{split}.jsonl")]
    return [splits.normalised(prompt.split("Request: ")[-1]) for prompt in lines]


def test_snips_splits_are_disjoint_and_without_repeats(snips_source: Path, tmp_path: Path) -> None:
    snips.prepare(snips_source, tmp_path / "out", splits.Sizes(None, 2, None), seed=0)
    texts = [
        text for task in snips.TASKS for s in SPLITS for text in said(tmp_path / "out" / task, s)
    ]
    assert len(texts) == len(set(texts)) == 7 * 6 + 7 * 3
    # A text of the test file never trains: one training row of AddToPlaylist was such a text.
    assert len(said(tmp_path / "out" / "everyday", "train")) == 3 * 4
    assert len(said(tmp_path / "out" / "media", "validation")) == 4 * 2


def test_snips_records_are_tasks_that_the_right_call_solves(
    snips_source: Path, tmp_path: Path
) -> None:
    snips.prepare(snips_source, tmp_path / "out", splits.Sizes(None, 2, None), seed=0)
    for name, functions in snips.TASKS.items():
        folder = tmp_path / "out" / name
        task = JSONLTask(name, *(folder / f"{split}.jsonl" for split in SPLITS))
        for split in SPLITS:
            for example in task.examples(split):
                call = json.loads(example.answer)
                assert call["name"] in functions
                assert list(call) == ["name", "arguments"]
                assert all(intent in example.prompt for intent in INTENTS)
                assert example.answer not in example.prompt
                assert JSONMatch()(f"Sure: {example.demonstration}", example) == 1.0


def test_snips_also_asks_for_the_function_s_name_alone(snips_source: Path, tmp_path: Path) -> None:
    snips.prepare(snips_source, tmp_path / "out", splits.Sizes(None, 2, None), seed=0)
    for split in SPLITS:
        calls = [
            line
            for task in snips.TASKS
            for line in read(tmp_path / "out" / task / f"{split}.jsonl")
        ]
        requests = {
            line["prompt"].split("Request: ")[1]: json.loads(line["answer"]) for line in calls
        }
        lines = read(tmp_path / "out" / "functions" / f"{split}.jsonl")
        assert len(lines) == len(calls)
        for line in lines:
            request = line["prompt"].split("Request: ")[1].split("\n")[0]
            assert line["answer"] == line["demonstration"] == requests[request]["name"]
            assert all(intent in line["prompt"] for intent in INTENTS)


def test_snips_functions_belong_to_one_task_each() -> None:
    assert sorted(name for names in snips.TASKS.values() for name in names) == sorted(INTENTS)


def test_a_seed_gives_the_same_files_and_another_seed_others(
    snips_source: Path, tmp_path: Path
) -> None:
    for out, seed in (("one", 0), ("same", 0), ("other", 1)):
        snips.prepare(snips_source, tmp_path / out, splits.Sizes(2, 2, 2), seed)
    one, same, other = (
        tmp_path / out / "media" / "train.jsonl" for out in ("one", "same", "other")
    )
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()


def test_sizes_count_per_label(snips_source: Path, tmp_path: Path) -> None:
    snips.prepare(snips_source, tmp_path / "out", splits.Sizes(3, 1, 2), seed=0)
    sizes = [len(read(tmp_path / "out" / "media" / f"{split}.jsonl")) for split in SPLITS]
    assert sizes == [4 * 3, 4 * 1, 4 * 2]


def test_banking_prompts_offer_the_answer_among_distinct_topics(
    banking_source: Path, tmp_path: Path
) -> None:
    banking.prepare(banking_source, tmp_path / "out", splits.Sizes(None, 2, None), 4, seed=0)
    prompts: list[str] = []
    for split in SPLITS:
        for line in read(tmp_path / "out" / "choice" / f"{split}.jsonl"):
            offered = line["prompt"].split("Topics: ")[1].split("\n")[0].split("; ")
            assert len(offered) == len(set(offered)) == 4
            assert line["answer"] in offered
            assert line["demonstration"] == line["answer"]
            assert ExactMatch()(line["answer"].title(), Example(as_messages("x"), line["answer"]))
            prompts.append(splits.normalised(line["prompt"].split("\n")[0]))
    assert len(prompts) == len(set(prompts)) == 30 - 1 + 16


def test_banking_repeats_test_messages_only(banking_source: Path, tmp_path: Path) -> None:
    long = {"text": "b " * 21, "label": "top_up"}
    file = banking_source / "test.jsonl"
    write(file, [*read(file), long])
    banking.prepare(banking_source, tmp_path / "out", splits.Sizes(None, 2, None), 4, seed=0)
    lines = read(tmp_path / "out" / "repeat" / "test.jsonl")
    assert len(lines) == 16
    assert all(line["prompt"].endswith(f": {line['answer']}") for line in lines)


def test_banking_refuses_more_choices_than_topics(banking_source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"raw: 5 topics, too few for 6 choices"):
        banking.prepare(banking_source, tmp_path / "out", splits.Sizes(None, 2, None), 6, seed=0)


def passages() -> list[dict[str, Any]]:
    short = {"question": "How many?", "answer": "12"}
    return (
        [
            {"title": "t", "context": f"There were 12 in {i}.", "questions": [short]}
            for i in range(4)
        ]
        + [
            {"title": "t", "context": f"{'word ' * 99}{i}.", "questions": spans(i)}
            for i in range(10)
        ]
        + [
            {"title": "t", "context": "word " * 150, "questions": spans(0)},
            {
                "title": "t",
                "context": "Ann met Bo.",
                "questions": [{"question": "Who?", "answer": "Bo"}],
            },
            {
                "title": "t",
                "context": "3 of 4.",
                "questions": [{"question": "?", "answer": "3 of 4"}],
            },
        ]
    )


def spans(passage: int) -> list[dict[str, str]]:
    """Questions of which the first alone, asked twice, is answered by a few words of the text."""
    answers = ("word word", "word word", "Word", f"{passage}.", "word word word word")
    return [{"question": f"What, {a}?", "answer": a} for a in answers]


def prepare_squad(tmp_path: Path, words: int = 90, longest: int = 120) -> Path:
    source = write(tmp_path / "passages.jsonl", passages())
    squad.prepare(source.parent, tmp_path / "out", words, longest, seed=0)
    return tmp_path / "out"


def test_squad_keeps_short_passages_with_one_number_to_find(tmp_path: Path) -> None:
    lines = read(prepare_squad(tmp_path) / "test.jsonl")
    assert len(lines) == 4
    for line in lines:
        assert line["prompt"].startswith("There were 12 in ")
        example = Example(as_messages(line["prompt"]), line["answer"])
        assert NumericMatch()("They were 12.", example) == 1.0


def test_squad_asks_for_words_of_longer_passages(tmp_path: Path) -> None:
    """And every passage is in one split."""
    out = prepare_squad(tmp_path)
    splits_of: dict[str, str] = {}
    for split, passages_in_it in zip(SPLITS, (6, 1, 3), strict=True):
        lines = read(out / "spans" / f"{split}.jsonl")
        assert len(lines) == passages_in_it
        for line in lines:
            assert line["answer"] == line["demonstration"] == "word word"
            assert splits_of.setdefault(line["prompt"].split("\n")[0], split) == split


@pytest.mark.parametrize(
    ("words", "longest", "told"),
    [(2, 120, "at most 2 words"), (90, 95, "91 to 95 words"), (90, 90, "91 to 90 words")],
)
def test_squad_says_when_nothing_fits(words: int, longest: int, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"passages\.jsonl: .*{told}"):
        prepare_squad(tmp_path, words, longest)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"request": "a", "intent": "GetWeather"}', "'slots' must be an object"),
        ('{"request": "a", "intent": "Fly", "slots": {}}', "unknown intent 'Fly'"),
        ('{"request": "", "intent": "GetWeather", "slots": {}}', "no text in field 'request'"),
        ('{"request": "a"', "broken JSON"),
        ("[]", "not a JSON object"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(
    snips_source: Path, tmp_path: Path, line: str, reason: str
) -> None:
    file = snips_source / "test.jsonl"
    count = len(read(file))
    file.write_text(file.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"test\.jsonl, line {count + 1}: .*") as raised:
        snips.prepare(snips_source, tmp_path / "out", splits.Sizes(None, 2, None), seed=0)
    assert reason in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_too_few_rows_for_validation_names_the_label(snips_source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"raw: 'AddToPlaylist' has 6 training rows"):
        snips.prepare(snips_source, tmp_path / "out", splits.Sizes(None, 6, None), seed=0)


@pytest.mark.parametrize("tool", ["prepare_snips", "prepare_banking77", "prepare_squad"])
def test_a_missing_source_ends_the_command_with_one_line(tool: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOLS / f"{tool}.py"), "--source", "nowhere", "--out", "out"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(TOOLS.parent), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
