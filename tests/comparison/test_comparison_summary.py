"""What a comparison says: the chosen rates, the winner, costs, cautions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_runs import SETTINGS, SUITES, TASKS, cost, finish, loaded, make_plan, retention, summarise

from sdft.comparison.content import content
from sdft.comparison.curves import column_lines
from sdft.comparison.notes import notes
from sdft.comparison.plan import Plan, Run
from sdft.comparison.summary import Summary
from sdft.comparison.verdict import against_baseline, headline

BASE_ROW = [0.0, 0.1, 1.0, 1.0]
SWEEP = {"learning_rates": [1e-4, 3e-4]}
COLUMNS = [*TASKS, *SUITES]


def final(*scores: float | None) -> list[list[float | None]]:
    """A matrix whose last row is this one."""
    return [list(BASE_ROW), [0.8, 0.1, 0.9, 0.9], list(scores)]


def fill(plan: Plan, report: Callable[[Run], dict[str, Any] | None], **options: Any) -> None:
    for run in plan.runs:
        found = report(run)
        if found is not None:
            finish(plan, run, found, **options)


def scores_of(run: Run) -> list[float]:
    """SDFT learns and keeps, SFT learns and forgets; seeds differ a little, the rate matters."""
    shift = 0.02 * run.seed
    if run.method.name == "sdft":
        kept = [0.9 - shift, 0.95, 1.0, 0.98 + shift / 2]
        return kept if run.rate == 1e-4 else [0.5, 0.5, 0.9, 0.9]
    return [0.2 + shift, 0.6, 0.3, 0.2] if run.rate == 3e-4 else [0.1, 0.3, 0.2, 0.2]


def standard(run: Run) -> dict[str, Any]:
    own = scores_of(run)
    return retention(final(*own), selection=dict(zip(COLUMNS, own, strict=True)), kl=0.1)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    made = make_plan(
        tmp_path,
        {"sdft": {**SWEEP, "label": "SDFT"}, "sft": {**SWEEP, "label": "SFT"}},
        seeds=[0, 1, 2],
        baseline="sft",
    )
    fill(made, standard)
    return made


def test_the_rate_with_the_best_mean_of_all_columns_is_chosen(plan: Plan) -> None:
    summary = summarise(plan)
    chosen = {name: own.rate and own.rate.value for name, own in summary.standing.items()}
    assert chosen == {"sdft": 1e-4, "sft": 3e-4}
    assert summary.selection.split == "validation"
    assert "validation split" in content(summary, "")["selection"]["rule"]


def test_the_choice_goes_by_the_validation_split_not_the_test_split(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": SWEEP}, seeds=[0])

    def report(run: Run) -> dict[str, Any]:
        good_on_test = run.rate == 3e-4
        test = final(*([0.9] * 4 if good_on_test else [0.1] * 4))
        return retention(test, selection=dict.fromkeys(COLUMNS, 0.2 if good_on_test else 0.3))

    fill(plan, report)
    standing = summarise(plan).standing["sft"]
    assert standing.rate is not None
    assert standing.rate.value == 1e-4


def test_without_validation_scores_the_test_split_chooses_and_the_report_says_so(
    tmp_path: Path,
) -> None:
    plan = make_plan(tmp_path, {"sft": SWEEP}, seeds=[0])
    fill(plan, lambda run: retention(final(*([0.9 if run.rate == 3e-4 else 0.1] * 4))))
    summary = summarise(plan)
    standing = summary.standing["sft"]
    assert standing.rate is not None
    assert standing.rate.value == 3e-4
    assert "on the test split" in notes(summary)[0]
    assert "test split" in summary.selection.rule


def test_of_equal_rates_the_smaller(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [3e-4, 1e-4, 1e-3]}}, seeds=[0])
    fill(plan, lambda run: retention(final(0.5, 0.5, 0.5, 0.5)))
    standing = summarise(plan).standing["sft"]
    assert standing.rate is not None
    assert standing.rate.value == 1e-4


def test_a_column_without_validation_scores_is_left_out_and_named(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": SWEEP}, seeds=[0])
    fill(
        plan,
        lambda run: retention(
            final(0.5, 0.5, 0.5, 0.5), selection={"garden": 0.5, "forest": 0.1, "named": None}
        ),
    )
    summary = summarise(plan)
    assert summary.selection.columns == ("garden", "forest")
    assert any("leaves out named, basic" in note for note in notes(summary))


def test_the_winner_and_by_how_much(plan: Plan) -> None:
    summary = summarise(plan)
    assert summary.winner is summary.standing["sdft"]
    pairs = {pair.quality: pair.difference for pair in summary.pairs}
    # ACC: SDFT (.9 − s + .95) / 2, SFT (.2 + s + .6) / 2 with s = 0, .02, .04: .525, .505, .485
    assert pairs["acc"].estimate.mean == pytest.approx(0.505)
    half = 4.303 * 0.02 / 3**0.5
    assert pairs["acc"].estimate.ci95 == pytest.approx((0.505 - half, 0.505 + half), abs=1e-4)
    assert {pair.verdict for pair in pairs.values()} == {"better"}
    told = headline(summary)
    assert told.startswith("SDFT has the highest mean score over all 4 columns: 0.9")
    assert "(3 seeds, 95 % interval 0.95 to 0.96)" in told
    assert "It beats SFT by more than noise." in told
    (sentence,) = against_baseline(summary)
    assert "Against SFT it is 0.62 ahead in the mean of all columns (+0.61 to" in sentence
    assert "0.51 ahead on the new tasks (ACC) (+0.46 to +0.55)" in sentence


def test_metrics_are_those_of_the_runs(plan: Plan) -> None:
    own = content(summarise(plan), "x")["summary"]["sdft"]
    assert own["seeds"] == [0, 1, 2]
    assert own["n"] == 3
    assert own["learning_rate"] == 1e-4
    assert own["acc"]["values"] == pytest.approx([0.925, 0.915, 0.905])
    assert own["new"]["mean"] == pytest.approx(0.915)
    assert own["prior"]["values"] == pytest.approx([0.99, 0.995, 1.0])
    assert own["bwt"]["values"] == pytest.approx([0.1, 0.08, 0.06])
    assert own["forgetting"]["values"] == pytest.approx([0.0, 0.0, 0.0])
    assert own["retention"]["values"] == pytest.approx([-0.01, -0.005, 0.0])
    assert own["retention_by_suite"]["named"]["mean"] == pytest.approx(0.0)
    assert own["kl_base"]["mean"] == pytest.approx(0.2)
    assert "kl_base" not in own["undefined"]


def test_a_small_lead_is_noise(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"one": SWEEP, "two": SWEEP}, seeds=[0, 1, 2])
    values = {"one": [0.5, 0.7, 0.6], "two": [0.6, 0.55, 0.6]}
    fill(plan, lambda run: retention(final(*[values[run.method.name][run.seed]] * 4)))
    told = headline(summarise(plan))
    assert "one has the highest mean" in told
    assert "Against two the difference is noise." in told
    assert "beats" not in told


def test_one_seed_has_no_verdict(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"one": SWEEP, "two": SWEEP}, seeds=[0])
    fill(plan, lambda run: retention(final(*[0.9 if run.method.name == "one" else 0.1] * 4)))
    summary = summarise(plan)
    assert "Against two there are too few seeds to tell." in headline(summary)
    pair = content(summary, "")["pairs"][0]
    assert (pair["verdict"], pair["ci95"]) == (None, None)
    assert pair["note"] == "one seed: no interval"
    own = content(summary, "")["summary"]["one"]
    assert own["undefined"]["acc.ci95"] == "one seed: no interval"


def test_seeds_that_all_agree_are_no_certainty(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"one": SWEEP, "two": SWEEP}, seeds=[0, 1])
    fill(plan, lambda run: retention(final(*[0.9 if run.method.name == "one" else 0.1] * 4)))
    assert any("is the same in all 2 seeds" in note for note in notes(summarise(plan)))


def test_an_upper_bound_never_wins(tmp_path: Path) -> None:
    plan = make_plan(
        tmp_path, {"sft": SWEEP, "joint": {**SWEEP, "upper_bound": True}}, seeds=[0, 1]
    )
    fill(plan, lambda run: retention(final(*[1.0 if run.method.name == "joint" else 0.4] * 4)))
    summary = summarise(plan)
    assert summary.winner is summary.standing["sft"]
    assert {pair.other for pair in summary.pairs} == {"joint"}
    assert "joint" not in headline(summary)


def test_only_finished_seeds_count(plan: Plan) -> None:
    gone = [run for run in plan.runs if (run.method.name, run.seed) in (("sdft", 2), ("sft", 0))]
    for run in gone:
        (plan.folder(run) / "finished.json").unlink()
    summary = summarise(plan)
    assert summary.standing["sdft"].seeds == [0, 1]
    assert {pair.difference.seeds for pair in summary.pairs} == {(1,)}, "those that both have"
    told = notes(summary)
    assert any("SDFT has 2 of 3 seeds at its chosen rate" in note for note in told)
    statuses = [run["status"] for run in content(summary, "")["runs"]]
    assert statuses.count("missing") == len(gone)
    assert len(statuses) == len(plan.runs)


def test_a_rate_does_not_win_by_the_seeds_that_it_survived(plan: Plan) -> None:
    whole = summarise(plan).standing["sdft"]
    assert whole.rate is not None
    gone = [run for run in plan.runs if run.method.name == "sdft" and run.seed == 2]
    (lost,) = (run for run in gone if run.rate == whole.rate.value)
    (plan.folder(lost) / "finished.json").unlink()
    found = summarise(plan).standing["sdft"]
    assert found.rate is not None
    assert found.rate.value != whole.rate.value
    assert len(found.seeds) == 3


def test_an_undefined_score_is_undefined_with_its_reason(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": SWEEP}, seeds=[0, 1])
    fill(plan, lambda run: retention(final(0.5, None, 0.5, 0.5)))
    own = content(summarise(plan), "")["summary"]["sft"]
    assert own["acc"]["mean"] is None
    assert own["undefined"]["acc"] == "no score after stage 2 on 'forest'"
    assert own["prior"]["mean"] == 0.5
    assert (own["mean"]["mean"], own["new"]["mean"]) == (None, None), "never a mean of the rest"


def test_without_suites(tmp_path: Path) -> None:
    settings = json.loads(json.dumps(SETTINGS))
    settings["data"]["init_args"]["suites"] = []
    plan = make_plan(tmp_path, {"one": SWEEP, "two": SWEEP}, seeds=[0, 1])
    rows = [[0.0, 0.0], [0.5, 0.0], [0.4, 0.6]]
    fill(plan, lambda run: retention(rows, suites=[]), settings=settings)
    summary = Summary(plan, loaded(plan, settings))
    own = content(summary, "")["summary"]["one"]
    assert own["undefined"]["prior"] == "there are no prior suites"
    assert own["undefined"]["retention"] == "there are no prior suites"
    assert {pair.quality for pair in summary.pairs} == {"acc", "mean"}


# ---------------------------------------------------------------- cost


def test_cost_is_a_multiple_of_the_baseline_s(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sdft": SWEEP, "sft": SWEEP}, seeds=[0, 1], baseline="sft")
    for run in plan.runs:
        spent = cost(30.0 + run.seed * 10, 5e12) if run.method.name == "sdft" else cost(10.0, 2e12)
        finish(plan, run, standard(run), spent)
    own = content(summarise(plan), "")["summary"]
    assert own["sdft"]["cost"] == {
        "seconds": 35.0,
        "flops": 5e12,
        "seconds_x": 3.5,
        "flops_x": 2.5,
    }
    assert own["sft"]["cost"]["seconds_x"] == 1.0


def test_cost_that_was_not_measured_is_null_with_a_reason(plan: Plan) -> None:
    summary = summarise(plan)
    own = content(summary, "")["summary"]["sdft"]
    assert own["cost"] == dict.fromkeys(("seconds", "flops", "seconds_x", "flops_x"))
    assert own["undefined"]["cost.seconds_x"] == "a run of it has no measured cost"
    assert any("no cost.json" in note for note in notes(summary))


def test_costs_from_different_places_are_pointed_out(plan: Plan) -> None:
    for place, run in enumerate(plan.runs):
        finish(plan, run, standard(run), {**cost(10.0), "threads": 1 + place % 2})
    assert any("different places" in note for note in notes(summarise(plan)))


def test_unequal_budgets_are_pointed_out(plan: Plan) -> None:
    finish(plan, plan.runs[0], {**standard(plan.runs[0]), "stage_steps": [60, 59]})
    assert any("60 + 59" in note for note in notes(summarise(plan)))


# ---------------------------------------------------------------- runs that do not belong together


def test_other_task_lists_are_refused(plan: Plan) -> None:
    run = plan.runs[-1]
    finish(plan, run, retention(final(*scores_of(run)), tasks=["forest", "garden"]))
    with pytest.raises(ValueError, match="have different tasks") as error:
        summarise(plan)
    for part in (plan.folder(plan.runs[0]), plan.folder(run), TASKS, ["forest", "garden"]):
        assert str(part) in str(error.value)


def test_other_suites_are_refused(plan: Plan) -> None:
    run = plan.runs[2]
    finish(plan, run, retention(final(*scores_of(run)), suites=["named", "other"]))
    with pytest.raises(ValueError, match=r"different suites: .*'basic'.*'other'"):
        summarise(plan)


def test_a_run_of_another_configuration_does_not_count(plan: Plan) -> None:
    file = plan.folder(plan.runs[3]) / "run.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["data"]["init_args"]["steps"] = 61
    file.write_text(yaml.safe_dump(settings))
    summary = summarise(plan)
    assert summary.results.changed == [plan.runs[3]]
    assert plan.runs[3] not in [result.run for result in summary.results.finished]


# ---------------------------------------------------------------- curves


def test_0_is_the_base_and_1_the_best(plan: Plan) -> None:
    lines = {own.name: own for own in column_lines(summarise(plan))}
    forest = lines["forest"]
    # The best mean over seeds of any method after any stage is SDFT's .95, the base's .1.
    assert (forest.base, forest.best) == (pytest.approx(0.1), pytest.approx(0.95))
    assert forest.means["sdft"] == pytest.approx([0.0, 0.0, 1.0])
    assert forest.means["sft"][-1] == pytest.approx((0.6 - 0.1) / (0.95 - 0.1))
    assert len(forest.seeds["sdft"]) == 3
    named = lines["named"]
    assert not named.scaled
    assert named.means["sft"] == pytest.approx([1.0, 0.9, 0.3])


def test_a_task_that_nobody_learnt_is_not_scaled(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": SWEEP}, seeds=[0])
    rows = [[0.3, 0.1, 1.0, 1.0], [0.2, 0.1, 0.9, 0.9], [0.1, 0.5, 0.9, 0.9]]
    fill(plan, lambda run: retention(rows))
    garden, forest, *_ = column_lines(summarise(plan))
    assert not garden.scaled
    assert garden.means["sft"] == [0.3, 0.2, 0.1]
    assert forest.scaled
