"""Whatever a configuration says: a run, or one error that says why; never a traceback or a hang."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TEMPLATE, echo_examples, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdft.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]

SECONDS = 60
values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 3, 10**6, -0.5, 0.5, 1e30, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "1", "null", "../../up", "/nowhere/at/all", "ü" * 300, "{prompt}"]),
    st.sampled_from([[], {}, [None], [[]], {"class_path": "os.system"}, {"class_path": 3}]),
    st.sampled_from([{"class_path": "JSONLTask"}, {"init_args": {}}, [1, 2], {"a": {"b": 1}}]),
)


def base(folder: Path, model: Path) -> dict[str, Any]:
    files = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    return {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "fast_dev_run": 1,
            "gradient_clip_val": 1.0,
        },
        "model": {
            "class_path": "sdft.SDFTModule",
            "init_args": {
                "model_name": str(model),
                "max_new_tokens": 4,
                "teacher_template": TEMPLATE,
                "alpha": 0.0,
                "temperature": 1.0,
                "rollouts_per_prompt": 1,
                "horizon": 3,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "teacher": {"kind": "ema", "rate": 0.1},
        "retention": {"limit": 2, "split": "test"},
        "guard": {"window": 20},
        "gate": {"on_drop": "rollback", "max_drop": 0.1},
        "filters": {"checks": [{"class_path": "LengthCheck", "init_args": {"min_tokens": 1}}]},
        "checkpoint": {"every_n_steps": 1},
        "data": {
            "batch_size": 2,
            "steps": 1,
            "tasks": [{"class_path": "JSONLTask", "init_args": {"name": "one", **files}}],
            "suites": [
                {"class_path": "JSONLTask", "init_args": {"name": "old", "test": "test.jsonl"}}
            ],
        },
    }


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and index in a configuration."""
    items: Any = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(tree: dict[str, Any], path: tuple[Any, ...], how: str, value: Any) -> dict[str, Any]:
    """The configuration with one thing broken."""
    new = copy.deepcopy(tree)
    inner: Any = new
    for key in path[:-1]:
        inner = inner[key]
    if how == "replace":
        inner[path[-1]] = value
    elif how == "delete":
        del inner[path[-1]]
    elif isinstance(inner, dict):
        inner["unknown_key"] = value
    else:
        inner.append(value)
    return new


@contextmanager
def limited() -> Iterator[None]:
    """Fail what takes too long."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"it hangs: more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run it, and see that it ended as it may."""
    capsys.readouterr()
    with limited():
        try:
            status: Any = main(["fit", "--config", str(file)])
        except SystemExit as stop:
            status = stop.code
    told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sdft: ")]
    assert status in (0, 2, 3)
    if status:
        assert len(told) == 1
        assert len(told[0]) < 3000
    assert not list(file.parent.rglob("*.tmp"))
    for path in file.parent.rglob("*.json"):
        json.loads(path.read_text())


KEYS = list(places(base(Path(), Path())))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KEYS), st.sampled_from(["replace", "replace", "delete", "add"]), values)
def test_one_thing_is_wrong(
    tmp_path: Path,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    path: tuple[Any, ...],
    how: str,
    value: Any,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for name, offset in (("train", 0), ("validation", 50), ("test", 100)):
            rows = [{"prompt": e.prompt, "answer": e.answer} for e in echo_examples(4, offset)]
            write_jsonl(tmp_path / f"{name}.jsonl", rows)
        file = tmp_path / "run.yaml"
        broken = changed(base(tmp_path, model_dir), path, how, value)
        file.write_text(yaml.safe_dump(broken), encoding="utf-8")
        run(file, capsys)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_text_is_wrong(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    text = yaml.safe_dump(base(tmp_path, model_dir))
    place = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 40))
    new = data.draw(
        st.sampled_from(["", ":", "\t", "{", "- ", "&a ", "*a", "!!python/name:os.system ", "\x00"])
        | st.text(max_size=4)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for name in ("train", "validation", "test"):
            rows = [{"prompt": e.prompt, "answer": e.answer} for e in echo_examples(4)]
            write_jsonl(tmp_path / f"{name}.jsonl", rows)
        file = tmp_path / "run.yaml"
        file.write_text(text[:place] + new + text[place + cut :], encoding="utf-8")
        run(file, capsys)
