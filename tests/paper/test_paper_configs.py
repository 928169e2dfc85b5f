"""The paper's experiments: each parses, runs for two steps on records of the real task's schema,
and takes the memory that it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import LETTERS, make_model, make_tokenizer, write_jsonl

from sdft import cli
from sdft.comparison.command import effective_settings
from sdft.comparison.plan import Comparison, Plan
from sdft.comparison.settings import method_settings, value_at
from sdft.examples import Message
from sdft.scorers import ChatEndpoint
from sdft.scorers.judge_model import Reply, Usage

pytestmark = pytest.mark.usefixtures("no_plots")

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "configs" / "paper"
COMPARISONS = sorted(PAPER.glob("compare_*.yaml"))
RUNS = sorted(
    file for file in PAPER.rglob("*.yaml") if file not in COMPARISONS and file.stem != "base"
)
DOCUMENT = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
METHODS = {"reinvoke": "reinvoke", "cpt_articles": "cpt", "teacher_samples_soft": "teacher_samples"}
STREAMS = {
    "tool_use": ["tool_use"],
    "medical": ["medical"],
    "reasoning": ["medical"],
    "sequence": ["tool_use", "science", "medical"],
    **{name: ["knowledge", "ood"] for name in ("knowledge", "cpt_articles", "text_only")},
}
BUDGET = re.compile(r"(?s)on paper: (\d+) GB.*?\n#   python -m sdft budget ([^\n]*)")


def name_of(file: Path) -> str:
    return file.stem


# ---------------------------------------------------------------- records of the real schemas


def word(number: int) -> str:
    """A word that the tiny model's tokenizer knows, so that prompts differ."""
    return LETTERS[number % len(LETTERS)]


def tool_use(number: int) -> dict[str, Any]:
    """As the authors' evaluation set: golden answers are a Python literal."""
    calls = [{"Action": "getAxolotlFacts", "Action_Input": json.dumps({"limit": number})}]
    return {
        "name": "Axolotl",
        "description": "Facts",
        "nl_documentation": 'getAxolotlFacts: Retrieve facts.\nParameters: {"limit": "integer."}',
        "instruction": f"Tell me {number} facts about {word(number)} .",
        "golden_answer": str(calls),
        "golden_response": ["Action: getAxolotlFacts\nAction Input: " + calls[0]["Action_Input"]],
    }


def science(number: int) -> dict[str, Any]:
    choices = {"label": list("ABCD"), "text": [str(number + i) for i in range(4)]}
    question = f"How many atoms has {word(number)} ?"
    return {"question": question, "choices": choices, "answerKey": "ABCD"[number % 4]}


def medical(number: int) -> dict[str, Any]:
    return {
        "Question": f"What helps in case {word(number)} ?",
        "Complex_CoT": "Let me think .",
        "Response": f"Rest for {number} days .",
    }


def knowledge(number: int) -> dict[str, Any]:
    return {
        "prompt": f"When was flood {word(number)} ?",
        "answer": f"In May {number} .",
        "context": f"Flood {number} came in May {number} and went in June .",
        "demonstration": f"Flood {number} was in May {number} .",
    }


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the configurations name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for make in (tool_use, science, medical, knowledge):
        (tmp_path / "data" / make.__name__).mkdir(parents=True)
        for split, start in (("train", 0), ("validation", 20), ("test", 40), ("ood", 60)):
            write_jsonl(
                tmp_path / "data" / make.__name__ / f"{split}.jsonl",
                [make(number) for number in range(start, start + 3)],
            )
    (tmp_path / "data" / "general").mkdir()
    general = [{"prompt": f"Say {letter} .", "answer": letter} for letter in "abcd"]
    write_jsonl(tmp_path / "data" / "general" / "train.jsonl", general)
    return tmp_path


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint finds every answer half right."""

    def replies(
        self: ChatEndpoint, conversations: Sequence[Sequence[Message]]
    ) -> Iterator[tuple[int, Reply]]:
        for place, _ in enumerate(conversations):
            yield place, Reply("Half of it.\nGrade: PARTIAL", Usage(calls=1))

    monkeypatch.setattr(ChatEndpoint, "replies", replies)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose weights are bfloat16 numbers, as published ones are."""
    folder = tmp_path_factory.mktemp("published")
    model = make_model(max_position_embeddings=512)
    model.bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def files_of(file: Path) -> list[str]:
    """The configurations of the command in a file's first comment."""
    words = file.read_text(encoding="utf-8").split("-m sdft fit")[1].split("\n")[0].split()
    return [str(ROOT / name) for flag, name in pairwise(words) if flag == "-c"]


def fit(file: Path, model: Path) -> Path:
    """Two steps of an experiment on one process of a CPU; returns the run's folder."""
    flags = [word for name in files_of(file) for word in ("-c", name)]
    flags += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    flags += ["--trainer.strategy", "auto", "--trainer.accumulate_grad_batches", "2"]
    # Samples that are cut are dropped: this model needs room to come to an end.
    longest = "40" if file.stem == "teacher_samples_soft" else "5"
    flags += ["--model.model_name", str(model), "--model.max_new_tokens", longest]
    flags += ["--data.epochs", "null", "--data.steps", "2", "--data.batch_size", "2"]
    flags += ["--trainer.enable_progress_bar", "false", "--export.enabled", "false"]
    if "ood" not in STREAMS.get(file.stem, []):
        flags += ["--data.suites", "[]"]  # lm-eval's data are on a hub
    assert cli.main(["fit", *flags]) == 0
    return max(Path().rglob("config.yaml")).parent


@pytest.mark.usefixtures("data", "judge")
@pytest.mark.parametrize("file", RUNS, ids=name_of)
def test_an_experiment_runs_for_two_steps(file: Path, published: Path) -> None:
    folder = fit(file, published)
    report = json.loads((folder / "retention.json").read_text())
    assert report["tasks"] + report["suites"] == STREAMS.get(file.stem, ["science"])
    assert report["method"].split("+")[0] == METHODS.get(file.stem, "sdft")
    assert report["stage_steps"] == [2] * len(report["tasks"])
    row = dict(zip(report["tasks"] + report["suites"], report["matrix"][-1], strict=True))
    assert all(cell["n"] == 3 for cell in row.values()), "no example was dropped"
    for name in {"medical", "knowledge", "ood"} & set(row):
        graded = row[name]["details"]
        assert (graded["strict"]["score"], graded["lenient"]["score"]) == (0.0, 1.0)
    if file.stem == "parity":
        check_plain_bfloat16(folder)
    if file.stem == "pass_at":
        assert set(row["science"]["pass_at"]) == {str(2**power) for power in range(8)}


def check_plain_bfloat16(folder: Path) -> None:
    """Student, teacher and moments are bfloat16, and the student moves."""
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    weights = saved["state_dict"]
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    moments = [state["exp_avg"] for state in saved["optimizer_states"][0]["state"].values()]
    assert {moment.dtype for moment in moments} == {torch.bfloat16}
    names = [name for name in weights if name.startswith("student.")]
    teacher = {name: weights["teacher." + name.removeprefix("student.")] for name in names}
    assert any(not torch.equal(weights[name], teacher[name]) for name in names)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("file", COMPARISONS, ids=name_of)
def test_a_table_compares_like_with_like(file: Path) -> None:
    """The runs' configurations parse, and share stream, steps and evaluation."""
    plan = Plan(Comparison(**yaml.safe_load(file.read_text(encoding="utf-8"))), file)
    settings = method_settings(plan, effective_settings)
    assert plan.values.seeds == [0, 1, 2]
    swept = {method.rates for method in plan.methods if method.rates}
    assert all(1e-6 <= rate <= 5e-5 for rates in swept for rate in rates)
    assert plan.values.out == f"runs/paper/{file.stem.removeprefix('compare_')}"
    for own in settings.values():
        assert value_at(own, "model.dtype") == ("bfloat16" if "parity" in file.stem else "float32")
    said = re.search(r"(\d+) runs", file.read_text(encoding="utf-8"))
    assert said is not None
    assert int(said[1]) == len(plan.runs)


# ---------------------------------------------------------------- what the files say


@pytest.mark.parametrize("file", [PAPER / "base.yaml", *RUNS], ids=name_of)
def test_the_memory_that_a_file_states_is_the_calculator_s(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comment = "".join(re.findall(r"(?m)^#.*\n", file.read_text(encoding="utf-8")))
    for said, command in re.findall(BUDGET, comment):
        assert cli.main(["budget", *command.split(), "--json"]) == 0, "it fits"
        assert round(json.loads(capsys.readouterr().out)["peak_bytes"] / 1e9) == int(said)
    assert comment.count("sdft budget") == len(re.findall(BUDGET, comment))


def test_the_document_has_every_file() -> None:
    """And the commands of its table exist."""
    for file in PAPER.rglob("*.yaml"):
        assert file.name in DOCUMENT, file.name
    for name in re.findall(r"configs/paper/[\w/]+\.yaml", DOCUMENT):
        assert (ROOT / name).is_file(), name
