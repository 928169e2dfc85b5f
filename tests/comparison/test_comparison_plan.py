"""The plan: what a comparison's file may say, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_runs import make_plan, write_plan

from sdft.comparison.plan import Comparison, Plan, rate_number

ROOT = Path(__file__).resolve().parents[2]
SWEEP = {"learning_rates": [1e-4, 3e-4]}


def test_methods_times_rates_times_seeds(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sdft": SWEEP, "bound": None}, seeds=[3, 5])
    assert [run.name for run in plan.runs] == [
        "sdft/lr1e-4-seed3",
        "sdft/lr3e-4-seed3",
        "bound/base-rate-seed3",
        "sdft/lr1e-4-seed5",
        "sdft/lr3e-4-seed5",
        "bound/base-rate-seed5",
    ]
    folders = [plan.folder(run) for run in plan.runs]
    assert len(set(folders)) == 6
    assert all(folder.is_relative_to(tmp_path / "out" / "runs") for folder in folders)
    assert plan.base == [tmp_path / "base.yaml"]


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_plan(tmp_path / "deep", {"sft": {"config": "own.yaml"}}, base=["a.yaml", "b.yaml"])
    for name in ("own", "a", "b"):
        (tmp_path / "deep" / f"{name}.yaml").write_text("data: {}\n")
    monkeypatch.chdir("/")
    plan = Plan(Comparison(**yaml.safe_load(file.read_text())), file)
    assert plan.methods[0].overlay == tmp_path / "deep" / "own.yaml"
    assert [path.name for path in plan.base] == ["a.yaml", "b.yaml"]


def test_a_rate_without_a_point_is_a_number(tmp_path: Path) -> None:
    """YAML reads 5e-5 as a text."""
    plan = make_plan(tmp_path, {"sft": yaml.safe_load("{learning_rates: [5e-5, 1.0e-4, 0.5]}")})
    assert plan.methods[0].rates == (5e-5, 1e-4, 0.5)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (5e-5, "5e-5"),
        (0.0001, "1e-4"),
        (0.00025, "2.5e-4"),
        (0.001, "1e-3"),
        (0.01, "0.01"),
        (0.1, "0.1"),
        (1.0, "1"),
        (1.25e-7, "1.25e-7"),
    ],
)
def test_rates_read_back_as_they_are(rate: float, text: str) -> None:
    assert rate_number(rate) == text
    assert float(text) == rate


@pytest.mark.parametrize(
    ("methods", "keys", "told"),
    [
        ({"adft": SWEEP}, {}, r"methods.adft is no known method; in .*methods there are: dft, sft"),
        ({"sft": {"learning_rates": []}}, {}, "methods.sft.learning_rates is empty: an empty"),
        ({"sft": {"learning_rates": 1e-4}}, {}, "methods.sft.learning_rates must be a list"),
        ({"sft": {"learning_rates": [1e-4, 0]}}, {}, "must be numbers above 0, found 0"),
        ({"sft": {"learning_rates": [-1e-4]}}, {}, "must be numbers above 0, found -0.0001"),
        ({"sft": {"learning_rates": ["fast"]}}, {}, "must be numbers above 0, found 'fast'"),
        ({"sft": {"learning_rates": [float("inf")]}}, {}, "must be numbers above 0, found inf"),
        ({"sft": {"learning_rates": [float("nan")]}}, {}, "must be numbers above 0, found nan"),
        ({"sft": {"learning_rates": [True]}}, {}, "must be numbers above 0, found True"),
        ({"sft": {"learning_rates": [1e-4, "1e-4"]}}, {}, "learning_rates repeat 1e-4"),
        ({"sft": {"rates": [1e-4]}}, {}, "methods.sft has no key 'rates'.*learning_rates"),
        ({"sft": [1e-4]}, {}, "methods.sft must hold keys and values"),
        ({"sft": {"config": "nope.yaml"}}, {}, "methods.sft.config names 'nope.yaml', but there"),
        ({"sft": {"upper_bound": "yes"}}, {}, "methods.sft.upper_bound must be true or false"),
        ({"../sft": SWEEP}, {}, r"methods.../sft is no name"),
        ({}, {}, "methods is empty"),
        ({"sft": SWEEP}, {"seeds": [0, 1, 0]}, r"seeds repeat 0 \(found \[0, 1, 0\]\)"),
        ({"sft": SWEEP}, {"seeds": []}, "seeds is empty"),
        ({"sft": SWEEP}, {"seeds": [-1]}, "seeds must be whole numbers from 0"),
        ({"sft": SWEEP}, {"base": "gone.yaml"}, "base names 'gone.yaml', but there is no file"),
        ({"sft": SWEEP}, {"base": []}, "base is empty"),
        ({"sft": SWEEP}, {"baseline": "dft"}, "baseline 'dft' is none of the methods: sft"),
        ({"sft": SWEEP}, {"jobs": 0}, "jobs must be at least 1, found 0"),
        ({"sft": SWEEP}, {"threads": -2}, "threads must be at least 1, found -2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_plans(
    tmp_path: Path, methods: dict[str, Any], keys: dict[str, Any], told: str
) -> None:
    file = write_plan(tmp_path, methods, overlays=["sft", "dft"], **keys)
    with pytest.raises(ValueError, match=told) as error:
        Plan(Comparison(**yaml.safe_load(file.read_text())), file)
    assert str(file) in str(error.value), "the message names the file"


def test_broken_yaml_below_the_plan_names_file_and_line(tmp_path: Path) -> None:
    file = write_plan(tmp_path, {"sft": SWEEP})
    (tmp_path / "methods" / "sft.yaml").write_text("model:\n  a: [1\nb: 2\n")
    with pytest.raises(ValueError, match=r"sft\.yaml, line 3"):
        Plan(Comparison(**yaml.safe_load(file.read_text())), file)


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("compare_quick", {"dft", "soft_targets", "replay"}),
        ("compare_full", {"dft", "soft_targets", "replay"}),
        ("compare_knowledge", {"cpt_context", "oracle_rag"}),
    ],
)
def test_the_shipped_comparisons_are_valid(name: str, methods: set[str]) -> None:
    file = ROOT / "configs" / f"{name}.yaml"
    plan = Plan(Comparison(**yaml.safe_load(file.read_text())), file)
    names = {method.name for method in plan.methods}
    assert {"sdft", "sft", *methods} <= names
    assert all(method.rates is None or len(method.rates) >= 2 for method in plan.methods)
    assert len(plan.values.seeds) >= 2
