"""lm-eval's tasks as columns: with the real package where it is installed, else with a stand-in."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import fake_lm_eval
import pytest
import torch
from conftest import make_data, make_module, run_fit, save_model, sharpen

from sdft import SDFTModule
from sdft.metrics import Estimate
from sdft.report import RetentionReport
from sdft.suites import LMEvalSuite
from sdft.suites.ready import READY

REAL = importlib.util.find_spec("lm_eval") is not None
real = pytest.mark.skipif(not REAL, reason="lm-eval is not installed")

CHOICES = [
    {"q": "a b", "choices": ["c d", "e", "f g h"], "label": 1},
    {"q": "c", "choices": ["a", "b c", "d"], "label": 0},
    {"q": "d e f", "choices": ["g", "h", "a b c"], "label": 2},
    {"q": "h g", "choices": ["a", "b", "c"], "label": 1},
]
WRITTEN = [{"q": "a b", "answer": "c d"}, {"q": "c", "answer": "a"}, {"q": "d", "answer": "e"}]
FORMS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "user : {{q}} assistant :",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_written": {
        "output_type": "generate_until",
        "doc_to_text": "user : {{q}} assistant :",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["never"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def task_file(folder: Path, name: str, records: list[dict[str, Any]], **changes: Any) -> str:
    """A task of lm-eval's own form: YAML is a superset of JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **FORMS[name],
        **changes,
    }
    for metric in content["metric_list"]:
        metric |= {"aggregation": "mean", "higher_is_better": True}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(content))
    return str(file)


@pytest.fixture(params=["real", "stand-in"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "real" and not REAL:
        pytest.skip("lm-eval is not installed")
    if request.param == "stand-in":
        fake_lm_eval.install(monkeypatch)
    return str(request.param)


@pytest.fixture
def module(model_dir: Path) -> SDFTModule:
    made = make_module(model_dir)
    made.configure_model()
    sharpen(made.model, 4.0)
    return made


@torch.no_grad()
def log_prob(module: SDFTModule, text: str, choice: str) -> float:
    before = module.tokenizer.encode(text)
    ids = torch.tensor([[*before, *module.tokenizer.encode(choice)]])
    module.model.eval()
    logits = module.model(input_ids=ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return float(logits.gather(-1, ids[0, len(before) :, None]).sum())


def right(module: SDFTModule, record: dict[str, Any], by_length: bool = False) -> float:
    text = f"user : {record['q']} assistant :"
    scores = [
        log_prob(module, text, one) / (len(one) if by_length else 1) for one in record["choices"]
    ]
    return float(max(range(len(scores)), key=scores.__getitem__) == record["label"])


def test_multiple_choice_is_decided_by_the_students_likelihoods(
    package: str, module: SDFTModule, tmp_path: Path
) -> None:
    suite = LMEvalSuite("choice", task_file(tmp_path, "tiny_choice", CHOICES), metric="acc")
    cell = suite.measure(module, 3)
    assert cell.error is None
    expected = Estimate.from_scores([right(module, record) for record in CHOICES])
    assert (cell.score, cell.n, cell.ci95) == (expected.score, 4, expected.ci95)
    normed = Estimate.from_scores([right(module, record, by_length=True) for record in CHOICES])
    assert cell.details == {"acc_norm": normed}
    assert cell.mean_length is None


def test_completions_come_from_the_runs_engine(
    package: str, module: SDFTModule, tmp_path: Path
) -> None:
    texts = [f"user : {record['q']} assistant :" for record in WRITTEN]
    prompts = [module.tokenizer.encode(text) for text in texts]
    responses = module.respond(prompts, module.greedy)
    records = [{**r, "answer": a.text} for r, a in zip(WRITTEN, responses, strict=True)]
    records[1]["answer"] = "another"
    suite = LMEvalSuite("written", task_file(tmp_path, "tiny_written", records))
    cell = suite.measure(module, 2)
    assert cell.error is None
    assert (cell.score, cell.n) == (pytest.approx(2 / 3), 3)
    assert cell.mean_length == sum(one.tokens for one in responses) / 3
    assert cell.truncated == sum(one.truncated for one in responses) / 3


def test_limits_of_suite_and_run(package: str, module: SDFTModule, tmp_path: Path) -> None:
    file = task_file(tmp_path, "tiny_choice", CHOICES)
    assert LMEvalSuite("a", file, metric="acc", limit=3).measure(module, 8).n == 3
    assert LMEvalSuite("a", file, metric="acc").measure(module, 8, limit=2).n == 2
    assert LMEvalSuite("a", file, metric="acc", limit=1).measure(module, 8, limit=2).n == 1


def test_what_does_not_fit_is_left_out_and_reported(
    package: str, module: SDFTModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"q": " ".join("a" * 130), "choices": ["a", "b", "c"], "label": 0}
    file = task_file(tmp_path, "tiny_choice", [CHOICES[0], long, *CHOICES[1:]])
    cell = LMEvalSuite("long", file, metric="acc").measure(module, 8)
    expected = Estimate.from_scores([right(module, record) for record in CHOICES])
    assert (cell.score, cell.n) == (expected.score, 4)
    assert "left out 1 examples that do not fit" in caplog.text
    file = task_file(tmp_path, "tiny_written", [{**long, "answer": "a"}, *WRITTEN])
    assert LMEvalSuite("long", file).measure(module, 8).n == 3


def test_the_run_draws_the_same_with_a_suite_and_without(
    package: str, module: SDFTModule, tmp_path: Path
) -> None:
    suite = LMEvalSuite("choice", task_file(tmp_path, "tiny_choice", CHOICES), metric="acc")
    torch.manual_seed(5)
    suite.measure(module, 8)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


def test_a_wrong_metric_costs_the_cell_alone(
    package: str, module: SDFTModule, tmp_path: Path
) -> None:
    cell = LMEvalSuite("x", task_file(tmp_path, "tiny_choice", CHOICES)).measure(module, 8)
    assert cell.score is None
    assert "metric must be set; there are acc, acc_norm" in str(cell.error)
    kwargs = {**FORMS["tiny_written"]["generation_kwargs"], "num_beams": 2}
    file = task_file(tmp_path, "tiny_written", WRITTEN, generation_kwargs=kwargs)
    assert "'num_beams'" in str(LMEvalSuite("x", file).measure(module, 8).error)


def test_what_is_not_there_is_named_before_anything_is_trained(
    package: str, module: SDFTModule, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"no task file 'nowhere\.yaml'"):
        LMEvalSuite("x", "nowhere.yaml").prepare(module)
    with pytest.raises(ValueError, match="lm-eval cannot load the task 'no_such_task'"):
        LMEvalSuite("x", "no_such_task").prepare(module)


def test_code_runs_only_where_that_is_allowed(
    package: str, module: SDFTModule, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"'humaneval' executes code.*run_code"):
        LMEvalSuite("humaneval")
    LMEvalSuite("humaneval", run_code=True)
    file = task_file(tmp_path, "tiny_written", WRITTEN, unsafe_code=True)
    with pytest.raises(ValueError, match=r"'tiny_written' executes code.*run_code"):
        LMEvalSuite("x", file).prepare(module)
    assert LMEvalSuite("x", file, run_code=True).measure(module, 8).score is not None


def test_a_suite_is_described_by_its_data_too(
    package: str, module: SDFTModule, tmp_path: Path
) -> None:
    def described(records: list[dict[str, Any]], **options: Any) -> str:
        suite = LMEvalSuite("x", task_file(tmp_path, "tiny_choice", records), **options)
        suite.prepare(module)
        return json.dumps(suite.described(), sort_keys=True)

    first = described(CHOICES)
    assert described(CHOICES) == first
    assert described([{**CHOICES[0], "label": 0}, *CHOICES[1:]]) != first
    assert described(CHOICES, limit=2) != first
    assert described(CHOICES, metric="acc") != first
    assert described(CHOICES, chat=True) != first


def test_a_column_like_any_other(
    package: str, model_dir: Path, tmp_path: Path, no_plots: None
) -> None:
    data = make_data(("first",), steps=1)
    data.suites.append(
        LMEvalSuite("choice", task_file(tmp_path, "tiny_choice", CHOICES), metric="acc")
    )
    trainer, module = run_fit(tmp_path, model_dir, data=data)
    report = RetentionReport.load(str(trainer.log_dir))
    assert report.suites == ["prior", "choice"]
    assert [row[2].n for row in report.rows] == [4, 4]
    assert report.metrics()["retention"]["choice"] is not None
    assert "suite choice" in report.summary_table()
    found = trainer.test(module, datamodule=data, verbose=False)
    assert found[0]["test/choice/accuracy"] == pytest.approx(report.rows[-1][2].score)


# ---------------------------------------------------------------- without the package


def test_without_the_package_it_says_what_to_install(
    module: SDFTModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'sdft\[lm-eval\]'"):
        LMEvalSuite("hellaswag").prepare(module)


@pytest.mark.parametrize("name", READY)
def test_ready_names_need_nothing_else(name: str) -> None:
    suite = LMEvalSuite(name, run_code=True)
    assert suite.task == READY[name].task
    assert suite.metric == READY[name].metric
    assert LMEvalSuite("other", READY[name].task, run_code=True).metric == READY[name].metric


def test_settings_win_over_what_a_name_stands_for() -> None:
    suite = LMEvalSuite("hellaswag", metric="acc_norm", chat=True)
    assert (suite.metric, suite.chat) == ("acc_norm", True)
    assert LMEvalSuite("ifeval", chat=False).chat is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "trivia"}, "name must be one of hellaswag"),
        ({"name": "mmlu", "limit": 0}, "limit must be at least 1, found 0"),
        ({"name": "mmlu", "num_fewshot": -1}, "num_fewshot must be at least 0, found -1"),
        ({"name": "a/b", "task": "mmlu"}, "task name 'a/b'"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LMEvalSuite(**options)


# ---------------------------------------------------------------- beside lm-eval's own model


@real
def test_the_numbers_are_those_of_lm_evals_own_model(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from sdft.suites.desk import Desk
    from sdft.suites.lm_adapter import StudentLM

    module = make_module(save_model(tmp_path / "model"))
    module.configure_model()
    sharpen(module.model, 4.0)
    own = StudentLM(Desk(module, 3))
    theirs = HFLM(module.model, tokenizer=module.tokenizer, device="cpu", batch_size=1)

    def ask(kind: str, arguments: list[tuple[Any, ...]]) -> tuple[Any, Any]:
        requests = [
            Instance(kind, {}, one, i, metadata=("t", i, 1))  # type: ignore[arg-type]
            for i, one in enumerate(arguments)
        ]
        return getattr(own, kind)(requests), getattr(theirs, kind)(requests)

    pairs = [("a b", " c d"), ("a b ", "c"), ("", "a b c"), ("d", " e"), ("d", " f")]
    found, expected = ask("loglikelihood", pairs)
    for one, other in zip(found, expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
    long = " ".join("abcdefgh"[i % 8] for i in range(300))  # three windows
    found, expected = ask("loglikelihood_rolling", [(long,), ("a b",)])
    assert found == pytest.approx(expected, abs=1e-2)
    settings = {"until": ["h"], "max_gen_toks": 9, "do_sample": False}
    found, expected = ask("generate_until", [(text, settings) for text in ("a b", "c", "d e f")])
    assert [one.strip() for one in found] == [one.strip() for one in expected]
