"""Offline means offline, local means local."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from conftest import TEMPLATE, echo_examples, write_jsonl
from huggingface_hub import constants

from sdft.cli import main
from sdft.hf_datasets import DatasetSource
from sdft.models import ModelSource
from sdft.shapes import find_shape

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach another machine, which fails; offline mode is off."""
    made: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        raise OSError("no network here")

    for settings in (constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's attempts
    return made


def test_a_run_on_local_files_asks_nobody(
    calls: list[Any], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fit, resume, export, generate: on a folder, local JSONL and a local table."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": e.prompt, "answer": e.answer} for e in echo_examples(5)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    jsonl = {"name": "one", "train": "rows.jsonl", "test": "rows.jsonl"}
    table = {"name": "two", "path": "json", "data_files": {"train": "rows.jsonl"}}
    tasks = [
        {"class_path": "JSONLTask", "init_args": jsonl},
        {"class_path": "DatasetTask", "init_args": table},
    ]
    config = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "model": {
            "model_name": str(model_dir),
            "max_new_tokens": 4,
            "teacher_template": TEMPLATE,
        },
        "data": {"steps": 1, "batch_size": 2, "tasks": tasks},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml"]) == 0
    assert main(["test", "--config", "run.yaml", "--ckpt_path", "last"]) == 0
    assert main(["export", "--ckpt", "last", "--out", "out"]) == 0
    assert main(["generate", "--model", "out", "--prompt", "a b", "--max_new_tokens", "3"]) == 0
    assert main(["budget", "--model", "out"]) == 0
    assert calls == []


def test_a_hub_name_does_ask(calls: list[Any]) -> None:
    """Without this the test above would prove nothing."""
    with pytest.raises(ValueError, match="cannot load a causal LM from 'somebody/model'") as error:
        ModelSource("somebody/model").load_model()
    assert calls
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "load",
    [
        lambda: ModelSource("somebody/model").load_model(),
        lambda: ModelSource("somebody/model").load_tokenizer(),
        lambda: list(DatasetSource("somebody/data").rows("train")),
        lambda: find_shape("somebody/model"),
    ],
    ids=["model", "tokenizer", "dataset", "shape"],
)
def test_offline_mode_is_told_on_one_line(load: Any) -> None:
    assert constants.HF_HUB_OFFLINE, "tests/conftest.py sets it"
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids asking the hub") as error:
        load()
    assert "somebody/" in str(error.value)
    assert "\n" not in str(error.value)


def test_offline_mode_through_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "somebody/model", "--prompt", "a"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "somebody/model" in told[0]
    assert "HF_HUB_OFFLINE forbids asking the hub" in told[0]


def test_the_builder_for_pickles_is_refused() -> None:
    with pytest.raises(ValueError, match="reads pickles, which may run code"):
        DatasetSource("pandas", data_files="table.pkl")
