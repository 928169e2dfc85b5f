"""The command line: the four entry points, overlays, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TEMPLATE, echo_examples, write_jsonl
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console, ConsoleDimensions
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft.cli import main

pytestmark = pytest.mark.usefixtures("no_plots")

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(
    # Comparisons are no configurations of a run: tests/comparison/ reads them.
    file
    for file in (ROOT / "configs").rglob("*.yaml")
    if not file.name.startswith("compare_")
)
METHODS = sorted(
    # Self-edits bring a task of their own: what configs/self_edits.yaml has written.
    file
    for file in (ROOT / "configs" / "methods").glob("*.yaml")
    if file.stem != "self_edits"
)
LABELS = {
    "anchor_replay": "anchor_replay+replay",
    "cpt_context": "cpt",
    "ewc": "sft+ewc",
    "joint": "sft+joint",
    "joint_sdft": "sdft+joint",
    "l2": "sft+l2",
    "replay": "sft+replay",
    "sdft_replay": "sdft+replay",
    "soft_targets": "soft_targets+general",
    "soft_targets_split": "soft_targets+general",
    "zoo": "sft+zoo",
    **{
        f"sdft_{kind}": "sdft"
        for kind in ("answer", "frozen", "jsd", "live", "reverse", "text", "top_p")
    },
}
"""Overlay → what the report calls it, where that is not the overlay's name."""


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two tasks and a suite in JSONL files, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, offset in (("train", 0), ("validation", 50), ("test", 100)):
        rows = [{"prompt": e.prompt, "answer": e.answer} for e in echo_examples(5, offset)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    return {
        "seed_everything": 3,
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "model": {
            "class_path": "sdft.SDFTModule",
            "init_args": {
                "model_name": str(model_dir),
                "max_new_tokens": 5,
                "teacher_template": TEMPLATE,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "batch_size": 4,
            "steps": 2,
            "tasks": [task("one", **files), task("two", **files)],
            "suites": [task("prior", test="test.jsonl", validation="validation.jsonl")],
        },
    }


def task(name: str, **files: str) -> dict[str, Any]:
    return {"class_path": "JSONLTask", "init_args": {"name": name, **files}}


def save(config: dict[str, Any], name: str = "config.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(config))
    return name


def run(config: dict[str, Any], *flags: str, entry: str = "fit") -> Path:
    """Run a whole command; returns the newest run's folder."""
    assert main([entry, "--config", save(config), *flags]) == 0
    return max(Path().rglob("config.yaml"), key=lambda path: path.stat().st_mtime_ns).parent


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    found = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, torch.Tensor] = found["state_dict"]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------- fit


def test_a_run_leaves_everything_in_its_folder(config: dict[str, Any], tmp_path: Path) -> None:
    before = set(Path().rglob("*"))
    folder = run(config, "--trainer.default_root_dir", "somewhere/else")
    made = {path for path in Path().rglob("*") if path.is_file()} - before
    outside = {str(path) for path in made if not path.is_relative_to("somewhere/else")}
    assert outside == {"config.yaml"}, "only the file that this test itself wrote"
    assert folder.is_relative_to("somewhere/else")
    for name in (
        "retention.json",
        "retention.csv",
        "samples.jsonl",
        "cost.json",
        "checkpoints/stage-1-one.ckpt",
        "checkpoints/stage-2-two.ckpt",
        "checkpoints/last.ckpt",
        "model/model.safetensors",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert {path.name for path in folder.glob("*.png")} == {"retention.png", "curves.png"}
    assert list(folder.glob("events.out.tfevents.*"))
    report = json.loads((folder / "retention.json").read_text())
    assert (report["tasks"], report["suites"], report["seed"]) == (["one", "two"], ["prior"], 3)
    assert [len(row) for row in report["matrix"]] == [3, 3, 3]
    assert {"score", "n", "ci95"} <= set(report["matrix"][0][0])
    check_export(folder)


def test_the_cost_of_a_run_covers_its_evaluations(config: dict[str, Any]) -> None:
    folder = run(config)
    cost = json.loads((folder / "cost.json").read_text())
    assert cost["optimizer_steps"] == 4
    evaluated = sum(
        cell["n"] * cell["mean_length"]
        for row in json.loads((folder / "retention.json").read_text())["matrix"]
        for cell in row
    )
    assert cost["phases"]["evaluate"]["tokens"] > evaluated
    assert cost["phases"]["track"]["seconds"] > 0


def test_cost_and_divergence_can_be_left_out(config: dict[str, Any]) -> None:
    folder = run(config, "--cost.enabled", "false", "--retention.kl_to_base", "false")
    assert not (folder / "cost.json").exists()
    report = json.loads((folder / "retention.json").read_text())
    assert {cell["kl_base"] for row in report["matrix"] for cell in row} == {None}


def test_what_else_the_report_can_hold(config: dict[str, Any]) -> None:
    flags = ["--retention.pass_at", "[1, 2]", "--retention.selection_split", "validation"]
    folder = run(config, *flags, "--data.from_base_each_task", "true")
    report = json.loads((folder / "retention.json").read_text())
    assert set(report["matrix"][0][0]["pass_at"]) == {"1", "2"}
    assert set(report["selection"]["cells"]) == {"one", "two", "prior"}
    assert report["routed"] is True


def test_a_bad_pass_at_is_one_clear_line(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--retention.pass_at", "[16]", "--retention.pass_samples", "8"]
    assert main(["fit", "--config", save(config), *flags]) == 2
    assert "k = 16 needs as many samples" in capsys.readouterr().err


def check_export(folder: Path) -> None:
    """The exported model gives the student's logits, bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = torch.tensor([tokenizer.encode("user : a b assistant :")])
    with torch.no_grad():
        found = model(ids).logits
        state = weights(folder).items()
        model.load_state_dict(
            {k.removeprefix("student."): v for k, v in state if k.startswith("student.")}
        )
        assert torch.equal(model(ids).logits, found)


def test_the_saved_config_repeats_the_run(config: dict[str, Any], tmp_path: Path) -> None:
    folder = run(config, "--model.temperature", "0.7", "--trainer.default_root_dir", "first")
    saved = tmp_path / "saved.yaml"
    saved.write_text((folder / "config.yaml").read_text())
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["temperature"] == 0.7
    assert main(["fit", "--config", "saved.yaml", "--trainer.default_root_dir", "again"]) == 0
    (again,) = Path("again").rglob("config.yaml")
    assert same(weights(again.parent), weights(folder))
    reports = [(f / "retention.json").read_text() for f in (folder, again.parent)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.temperature", "0.5"],
        ["--model.optimizer.lr", "0.02"],
        ["--model.scheduler.warmup_steps", "0"],
        ["--teacher.kind", "live"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_flag_overrides_the_file(config: dict[str, Any], flags: list[str]) -> None:
    if "scheduler" in flags[0]:
        config["model"]["init_args"]["scheduler"] = {"class_path": "sdft.schedule.StageSchedule"}
    quick = ["--retention.enabled", "false", "--samples.count", "0", "--export.enabled", "false"]
    config["data"]["tasks"] = config["data"]["tasks"][:1]
    config["data"]["steps"] = 2
    plain = run(config, *quick, "--trainer.default_root_dir", "plain")
    changed = run(config, *quick, *flags, "--trainer.default_root_dir", "changed")
    assert not same(weights(plain), weights(changed))
    written = yaml.safe_load((changed / "config.yaml").read_text())
    for key in flags[0].removeprefix("--").split("."):
        written = written["init_args"][key] if "init_args" in written else written[key]
    assert str(written) == flags[1]


LOSS = """
from sdft import SDFTModule

class Halved(SDFTModule):
    def __init__(self, share: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.share = share
    def loss(self, student_logits_BTV, teacher_logits_BTV, mask_BT):
        return self.share * super().loss(student_logits_BTV, teacher_logits_BTV, mask_BT)
"""


def test_a_custom_loss_is_an_overlay_of_five_lines(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_loss.py").write_text(LOSS)
    monkeypatch.syspath_prepend(Path().absolute())
    overlay = "model:\n  class_path: own_loss.Halved\n  init_args:\n    share: 0.25\n"
    Path("overlay.yaml").write_text(overlay)
    plain = run(config, "--trainer.default_root_dir", "plain")
    own = run(config, "--config", "overlay.yaml", "--trainer.default_root_dir", "own")
    written = yaml.safe_load((own / "config.yaml").read_text())["model"]
    assert written["class_path"] == "own_loss.Halved"
    assert written["init_args"]["share"] == 0.25
    assert written["init_args"]["max_new_tokens"] == 5, "the base config's arguments stay"
    assert written["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    assert not same(weights(plain), weights(own))


def test_the_scheduler_and_the_method_by_name(config: dict[str, Any]) -> None:
    config["model"]["class_path"] = "SFTModule"
    config["model"]["init_args"]["scheduler"] = {
        "class_path": "sdft.schedule.StageSchedule",
        "init_args": {"warmup_steps": 1, "decay": "linear"},
    }
    folder = run(config, "--trainer.default_root_dir", "out")
    assert json.loads((folder / "retention.json").read_text())["method"] == "sft"


def test_without_a_logger(config: dict[str, Any]) -> None:
    run(config, "--trainer.default_root_dir", "out", "--trainer.logger", "false")
    assert json.loads(Path("out/retention.json").read_text())["tasks"] == ["one", "two"]
    assert not list(Path("out").rglob("events.out.*"))


def test_a_watched_run(config: dict[str, Any]) -> None:
    assert not (run(config) / "watch.jsonl").exists(), "off unless asked for"
    folder = run(config, "--watch.every_n_steps", "1", "--watch.on_drop", "stop")
    lines = (folder / "watch.jsonl").read_text().splitlines()
    found = [(line["step"], list(line["scores"])) for line in map(json.loads, lines)]
    one, two = ["one", "prior"], ["two", "one", "prior"]
    assert found == [(0, one), (1, one), (2, two), (3, two)]
    written = yaml.safe_load((folder / "config.yaml").read_text())["watch"]
    assert (written["every_n_steps"], written["on_drop"], written["patience"]) == (1, "stop", 3)


# ---------------------------------------------------------------- the other entry points


def test_validate_test_and_predict_from_a_checkpoint(
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = property(lambda console: ConsoleDimensions(240, 50))
    monkeypatch.setattr(Console, "size", wide)  # Lightning's table wraps names otherwise
    folder = run(config, "--trainer.default_root_dir", "out")
    report = json.loads((folder / "retention.json").read_text())
    capsys.readouterr()
    root = ["--trainer.default_root_dir", "out"]
    for entry in ("validate", "test", "predict"):
        run(config, "--ckpt_path", str(folder), *root, entry=entry)
    printed = capsys.readouterr().out
    for name in ("one", "two", "prior"):
        assert f"validation/{name}/accuracy" in printed
        assert f"test/{name}/accuracy" in printed
    (predictions,) = Path("out").rglob("predictions.jsonl")
    records = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [r["task"] for r in records] == ["one"] * 5 + ["two"] * 5 + ["prior"] * 5
    # The answers are those that the last retention row was made of.
    scores = [float(r["response"].split() == r["answer"].split()) for r in records]
    last = [cell["score"] for cell in report["matrix"][-1]]
    assert [sum(scores[i : i + 5]) / 5 for i in (0, 5, 10)] == pytest.approx(last)


def test_last_means_the_newest_run(config: dict[str, Any]) -> None:
    root = ["--trainer.default_root_dir", "out"]
    short = run(config, *root, "--trainer.max_epochs", "1")
    resumed = run(config, *root, "--ckpt_path", "last")
    whole = run(config, "--trainer.default_root_dir", "whole")
    assert resumed != short
    assert same(weights(resumed), weights(whole))
    reports = [(folder / "retention.json").read_text() for folder in (resumed, whole)]
    assert reports[0] == reports[1]


def test_a_flag_wins_over_what_a_checkpoint_says(config: dict[str, Any]) -> None:
    root = ["--trainer.default_root_dir", "out"]
    run(config, *root, "--trainer.max_epochs", "1")
    resumed = run(config, *root, "--ckpt_path", "last", "--model.temperature", "0.5")
    written = yaml.safe_load((resumed / "config.yaml").read_text())
    assert written["model"]["init_args"]["temperature"] == 0.5


# ---------------------------------------------------------------- every configuration file


def command_of(file: Path) -> list[str]:
    """The words behind `-m sdft` in the first comment that says how the file is run."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "-m sdft" in line:
            return line.split("-m sdft")[1].split()
    raise AssertionError(f"{file} does not say how it is run")


def bases_of(file: Path) -> list[Path]:
    """What an overlay stands on, as its first comment says: `-c base.yaml -c overlay.yaml`."""
    words = command_of(file)
    return [ROOT / b for a, b in pairwise(words) if a in ("-c", "--config")]


def test_there_are_configurations() -> None:
    assert {"seq_skills.yaml", "smoke.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_parses(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    files = bases_of(file)
    assert files[-1] == file, "its first comment runs it"
    flags = [part for path in files for part in ("--config", str(path))]
    entry = list(takewhile(lambda word: not word.startswith("-"), command_of(file)))
    with pytest.raises(SystemExit) as stop:
        main([*entry, *flags, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    printed = yaml.safe_load(capsys.readouterr().out)
    assert entry != ["fit"] or printed["data"]["init_args"]["tasks"]
    written = yaml.safe_load(file.read_text())
    assert_contains(printed, written)


def assert_contains(found: Any, written: Any, where: str = "") -> None:
    """Every value of the file arrived where it should."""
    if not isinstance(written, dict):
        assert str(found) == str(written) or isinstance(written, list), where
        return
    for key, value in written.items():
        holder = found if key in found else found["init_args"]
        if key == "class_path":
            assert holder[key].split(".")[-1] == value.split(".")[-1], where
        else:
            assert_contains(holder[key], value, f"{where}.{key}")


def test_help_explains_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("--teacher.rate", "--retention.limit", "--checkpoint.every_n_steps"):
        assert words in text
    assert "Share of the student that enters at each update" in text
    assert "steps between two probes of a stage; 0 watches nothing." in " ".join(text.split())


# ---------------------------------------------------------------- real processes


def sdft(*args: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "sdft", *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_a_killed_process_can_be_resumed(config: dict[str, Any]) -> None:
    config["data"]["steps"] = 40
    config["checkpoint"] = {"every_n_steps": 1}
    save(config)
    process = sdft("fit", "--config", "config.yaml", "--trainer.default_root_dir", "killed")
    folder = Path("killed/lightning_logs/version_0")
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert json.loads((folder / "retention.json").read_text())["matrix"]
    resumed = run(config, "--trainer.default_root_dir", "killed", "--ckpt_path", "last")
    whole = run(config, "--trainer.default_root_dir", "whole")
    assert same(weights(resumed), weights(whole))
    reports = [(f / "retention.json").read_text() for f in (resumed, whole)]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_an_error_of_a_process_is_one_line_and_status_2(config: dict[str, Any]) -> None:
    Path("train.jsonl").write_text('{"prompt": "a"\n')
    save(config)
    process = sdft("fit", "--config", "config.yaml")
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in told
    assert "sdft: error: train.jsonl, line 1: broken JSON" in told


def test_a_terminated_run_says_so_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminated(*args: Any, **kwargs: Any) -> None:
        raise SIGTERMException

    monkeypatch.setattr("sdft.cli.SDFTCLI", terminated)
    assert main(["fit"]) == 128 + signal.SIGTERM
    assert "go on with --ckpt_path last" in capsys.readouterr().err


@pytest.mark.parametrize("overlay", METHODS, ids=lambda path: path.stem)
def test_every_method_is_an_overlay_on_any_stream(
    config: dict[str, Any], overlay: Path, tmp_path: Path
) -> None:
    if overlay.stem in ("cpt_context", "oracle_rag", "sdft_text"):
        for name in ("train", "test"):
            rows = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
            write_jsonl(tmp_path / f"{name}.jsonl", [{**row, "context": "g h"} for row in rows])
    config["data"]["general"] = [task("any", train="validation.jsonl")]
    flags = ["--data.batch_size", "2"]
    if overlay.stem.startswith(("soft_targets", "teacher_samples")):
        flags += ["--model.checks", "[]"]  # the tiny model never ends its answers
    folder = run(config, "--config", str(overlay), *flags)
    report = json.loads((folder / "retention.json").read_text())
    assert report["method"] == LABELS.get(overlay.stem, overlay.stem)
    assert len(report["matrix"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soft_targets", "soft_targets_split", "teacher_samples"])
def test_the_offline_methods_run(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    suite = {
        "class_path": "sdft.world.WorldSuite",
        "init_args": {"kind": "named", "train_size": 16},
    }
    general = tmp_path / "general.yaml"
    general.write_text(yaml.safe_dump({"data": {"general": [suite]}}))
    overlays = (f"configs/methods/{method}.yaml", str(general), "configs/smoke.yaml")
    flags = [part for file in ("configs/seq_skills.yaml", *overlays) for part in ("-c", file)]
    assert main(["fit", *flags, "--trainer.default_root_dir", str(tmp_path)]) == 0
    (manifest,) = tmp_path.rglob("generated/*/store.json")
    assert json.loads(manifest.read_text())["facts"]["kept"] > 0


def test_a_run_that_the_guard_stops(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rule = {"above": 0.5, "patience": 2, "actions": ["stop_and_save"]}
    assert main(["fit", "--config", save(config | {"guard": {"length": rule}})]) == 3
    error = capsys.readouterr().err
    assert "sdft: guard: stopped at step 2: length " in error
    assert "guard-step-2.ckpt" in error
    run = Path("lightning_logs") / "version_0"
    assert (run / "checkpoints" / "guard-step-2.ckpt").exists()
    assert len((run / "guard.jsonl").read_text().splitlines()) == 1
    assert (run / "cost.json").exists()
    assert not list((run / "checkpoints").glob("stage-*"))


@pytest.mark.parametrize(
    ("rule", "said"),
    [({"patience": 0}, "guard.length.patience"), ({"actions": ["explode"]}, "actions")],
)
def test_a_guard_that_cannot_be(
    rule: dict[str, Any],
    said: str,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        code: Any = main(["fit", "--config", save(config | {"guard": {"length": rule}})])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert said in capsys.readouterr().err
