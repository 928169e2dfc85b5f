"""The runs' configurations: what a run's file says, and what makes two runs differ."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from fake_runs import SETTINGS, make_plan

from sdft.comparison.command import effective_settings
from sdft.comparison.settings import (
    Settings,
    changes,
    check_matched,
    fingerprint,
    method_settings,
    run_settings,
    value_at,
)

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(
    # Self-edits bring a task of their own, so they are no method on a given stream.
    file
    for file in (ROOT / "configs" / "methods").glob("*.yaml")
    if file.stem != "self_edits"
)


def changed(key: str, value: Any) -> Settings:
    settings = deepcopy(SETTINGS)
    *path, last = key.split(".")
    holder: Any = settings
    for part in path:
        holder = holder[part]
    holder[last] = value
    return settings


def test_a_run_has_its_own_seed_rate_and_folder(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [3e-4]}}, seeds=[7])
    own = run_settings(SETTINGS, plan.runs[0], tmp_path / "here")
    assert own["seed_everything"] == 7
    assert value_at(own, "model.optimizer.lr") == 3e-4
    assert own["trainer"]["default_root_dir"] == str(tmp_path / "here")
    assert own["trainer"]["logger"]["init_args"]["save_dir"] == str(tmp_path / "here")
    assert (own["checkpoint"]["stages"], own["export"]["enabled"]) == (False, False)
    assert own["samples"]["count"] == 0
    assert SETTINGS["seed_everything"] == 0, "the method's own stay as they are"
    assert value_at(SETTINGS, "model.optimizer.lr") == 1e-5


def test_without_rates_the_base_s_rate_stays(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"oracle": {"learning_rates": None}}, seeds=[0])
    own = run_settings(SETTINGS, plan.runs[0], tmp_path)
    assert value_at(own, "model.optimizer.lr") == 1e-5


def test_rates_are_chosen_on_examples_that_no_score_is_of(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [3e-4]}}, seeds=[0])
    found = method_settings(plan, lambda files: deepcopy(SETTINGS))
    assert value_at(found["sft"], "retention.selection_split") == "validation"
    assert value_at(found["sft"], "retention.split") != "validation"
    asked = changed("retention.selection_split", "train")
    found = method_settings(plan, lambda files: deepcopy(asked))
    assert value_at(found["sft"], "retention.selection_split") == "train"


def test_the_fingerprint_sees_what_bears_on_the_result(tmp_path: Path) -> None:
    same = fingerprint(SETTINGS)
    assert fingerprint(changed("trainer.default_root_dir", "elsewhere")) == same
    assert fingerprint(changed("checkpoint.every_n_steps", 7)) == same
    for key, value in (
        ("seed_everything", 1),
        ("data.init_args.steps", 61),
        ("model.init_args.optimizer.init_args.lr", 2e-5),
        ("model.class_path", "sdft.methods.SFTModule"),
        ("retention.limit", 8),
    ):
        assert fingerprint(changed(key, value)) != same, key


def test_what_changed_is_told(tmp_path: Path) -> None:
    assert changes(SETTINGS, changed("data.init_args.steps", 61)) == [
        "data.init_args.steps: 60 → 61"
    ]
    more = changed("data.init_args.mixtures", [{"class_path": "PastReplay"}])
    (told,) = changes(SETTINGS, more)
    assert told == "data.init_args.mixtures.0.class_path: (absent) → PastReplay"
    assert changes(SETTINGS, changed("trainer.logger", True)) == []


def test_methods_must_share_stream_budget_and_evaluation(tmp_path: Path) -> None:
    plan = make_plan(
        tmp_path, {"one": {"learning_rates": [1e-4]}, "two": {"learning_rates": [1e-4]}}
    )

    def resolve(files: list[Path]) -> Settings:
        return changed("data.init_args.steps", 50) if files[-1].stem == "two" else SETTINGS

    with pytest.raises(ValueError, match=r"method 'one' and method 'two' differ in data.steps: 60"):
        method_settings(plan, resolve)


def test_a_method_without_rates_has_no_budget_to_share(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"one": {"learning_rates": [1e-4]}, "oracle": None})
    found = method_settings(
        plan,
        lambda files: (
            changed("data.init_args.steps", 1) if "oracle" in files[-1].stem else SETTINGS
        ),
    )
    assert value_at(found["oracle"], "data.steps") == 1


def test_other_tasks_are_named(tmp_path: Path) -> None:
    other = changed("data.init_args.tasks", SETTINGS["data"]["init_args"]["tasks"][:1])
    with pytest.raises(
        ValueError, match=r"a and b differ in data.tasks: \[garden, forest\] and \["
    ):
        check_matched({"a": SETTINGS, "b": other}, ("data.tasks",))


def test_no_rate_to_set(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [1e-4]}})
    bare = changed("model.init_args.optimizer", "a function")
    with pytest.raises(ValueError, match=r"method 'sft' .*no learning rate to set: name the optim"):
        method_settings(plan, lambda files: bare)


def test_without_retention_there_is_nothing_to_compare(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [1e-4]}})
    with pytest.raises(ValueError, match=r"retention\.enabled is false"):
        method_settings(plan, lambda files: changed("retention.enabled", False))


def test_settings_lie_between_base_and_overlay(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": {"learning_rates": [1e-4]}}, settings={"data": {"steps": 9}})
    seen: list[str] = []

    def resolve(files: list[Path]) -> Settings:
        seen.extend(file.read_text() for file in files)
        return SETTINGS

    method_settings(plan, resolve)
    assert seen[0] == "data: {steps: 60}\n"
    assert "steps: 9" in seen[1]
    assert seen[2].startswith("# sft")


# ---------------------------------------------------------------- through the command line


def test_the_command_line_s_complaint_names_the_method(tmp_path: Path) -> None:
    plan = make_plan(
        tmp_path,
        {"sft": {"learning_rates": [1e-4]}},
        base=str(ROOT / "configs" / "seq_skills.yaml"),
        settings={"retention": {"limits": 3}},
    )
    with pytest.raises(ValueError, match=r"method 'sft' \(.*sft.yaml\): .*limits"):
        method_settings(plan, effective_settings)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_keeps_the_base_s_stream(overlay: Path) -> None:
    """Lists of a later file replace earlier ones: an overlay that names tasks would drop them."""
    base = ROOT / "configs" / "seq_skills.yaml"
    alone, found = effective_settings([base]), effective_settings([base, overlay])
    check_matched({"base": alone, overlay.stem: found}, ("data.tasks", "data.suites"))
    assert value_at(found, "model.optimizer.lr") == 5e-5
    assert value_at(found, "model.max_new_tokens") == 16


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("sdft", "teacher.kind", "ema"),
        ("sdft_frozen", "teacher.kind", "frozen"),
        ("sdft_live", "teacher.kind", "live"),
        ("sdft_reverse", "model.alpha", 1.0),
        ("sdft_jsd", "model.alpha", 0.5),
        ("sdft_text", "model.teacher_sees", "text"),
        ("sdft_text", "model.teacher_template", None),
        ("sdft_answer", "model.teacher_sees", "answer"),
        ("sft", "model.class_path", "sdft.methods.SFTModule"),
        ("zoo", "data.from_base_each_task", True),
        ("joint", "model.class_path", "sdft.methods.SFTModule"),
        ("joint_sdft", "model.class_path", "sdft.SDFTModule"),
    ],
)
def test_what_the_overlays_say(name: str, key: str, value: Any) -> None:
    files = [ROOT / "configs" / "seq_skills.yaml", ROOT / "configs" / "methods" / f"{name}.yaml"]
    assert value_at(effective_settings(files), key) == value


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("replay", "PastReplay"),
        ("sdft_replay", "PastReplay"),
        ("joint", "Joint"),
        ("joint_sdft", "Joint"),
    ],
)
def test_the_overlays_mixtures(name: str, kind: str) -> None:
    files = [ROOT / "configs" / "seq_skills.yaml", ROOT / "configs" / "methods" / f"{name}.yaml"]
    (mixture,) = value_at(effective_settings(files), "data.mixtures")
    assert mixture["class_path"].endswith(kind)
