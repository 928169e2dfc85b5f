"""Tasks of lm-eval, loaded once: from its own collection, a task file, or a folder of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdft.hub import load_failure

FEWSHOT_SEED = 1234
"""Of the choice of examples for prompts: lm-eval's own."""
_ALLOW_CODE = "HF_ALLOW_CODE_EVAL"


@dataclass(frozen=True)
class Setting:
    """What lm-eval is told; see `LMEvalSuite`."""

    name: str
    task: str
    num_fewshot: int | None
    chat: bool
    system: str | None
    fewshot_as_multiturn: bool
    include_path: str | None
    run_code: bool


class LoadedTasks:
    """A task or group with its data.

    Args:
        setting: Which, and how it is asked.

    Attributes:
        name: Its name in lm-eval's results.

    Raises:
        ValueError: It is not there, its data cannot be had, or it would run code.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        with _code(setting.run_code):
            self._found = self._load()
        groups, tasks = self._found.get("groups") or {}, self._found["tasks"]
        self.name = next(iter(groups or tasks))
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False) and not setting.run_code:
                raise ValueError(
                    f"suite {setting.name!r}: the task {name!r} executes code that the model "
                    "writes, on this machine and unguarded: set run_code to true to allow it"
                )
            self._set_fewshot(task)

    def _load(self) -> dict[str, Any]:
        from datasets import config
        from lm_eval.tasks import TaskManager

        config.HF_UPDATE_DOWNLOAD_COUNTS = False  # would call home, for local files too
        setting, path = self.setting, Path(self.setting.task)
        is_file = path.suffix in (".yaml", ".yml")
        if is_file and not path.is_file():
            raise ValueError(f"suite {setting.name!r}: there is no task file {setting.task!r}")
        try:
            manager = TaskManager(include_path=setting.include_path, include_defaults=not is_file)
            return dict(manager.load([str(path.resolve()) if is_file else setting.task]))
        except Exception as error:  # it raises whatever the task's own functions raise
            raise ValueError(
                f"suite {setting.name!r}: lm-eval cannot load the task {setting.task!r}: "
                f"{load_failure(error)}"
            ) from error

    def _set_fewshot(self, task: Any) -> None:
        """As lm-eval's own command line does; a task that sets 0 keeps it."""
        own, wanted = task.get_config("num_fewshot"), self.setting.num_fewshot
        if wanted is not None and own != 0:
            task.set_config(key="num_fewshot", value=wanted)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)

    @property
    def aggregations(self) -> Mapping[str, Any]:
        """Metric → how a single task's values become a score; none for a group."""
        tasks = list(self._found["tasks"].values())
        return dict(tasks[0].aggregation()) if len(tasks) == 1 else {}

    def evaluate(self, model: Any, limit: int | None) -> dict[str, Any]:
        """lm-eval's results, with samples.

        Args:
            model: An `lm_eval.api.model.LM`.
            limit: Examples of each task, at most.
        """
        from lm_eval.evaluator import evaluate

        setting = self.setting
        with _code(setting.run_code):
            results = evaluate(
                lm=model,
                task_dict=self._found,
                limit=limit,
                bootstrap_iters=0,
                system_instruction=setting.system,
                apply_chat_template=setting.chat,
                fewshot_as_multiturn=setting.fewshot_as_multiturn,
                confirm_run_unsafe_code=setting.run_code,
            )
        return dict(results)

    def described(self) -> dict[str, Any]:
        """What results depend on beside the model: the tasks, their data and files, the version."""
        return {
            **asdict(self.setting),
            "lm_eval": _version("lm_eval"),
            "tasks": {name: _described(task) for name, task in self._found["tasks"].items()},
            "groups": _digest(sorted(map(_group, (self._found.get("groups") or {}).values()))),
            "files": _files(self.setting),
        }


def _described(task: Any) -> str:
    """A digest of a task's settings and of all its data."""
    data = getattr(task, "dataset", None) or {}
    splits = {split: [dict(row) for row in rows] for split, rows in dict(data).items()}
    return _digest([task.dump_config(), splits])


def _group(group: Any) -> str:
    return _digest([group.name, list(group.child_names), group.aggregate_metric_list])


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=_shown)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _shown(value: Any) -> str:
    """A value that JSON does not know, without its place in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _files(setting: Setting) -> str:
    """A digest of the user's own task files, and of the functions beside them."""
    folders = {Path(setting.include_path)} if setting.include_path else set()
    if Path(setting.task).suffix in (".yaml", ".yml"):
        folders.add(Path(setting.task).parent)
    digest = hashlib.sha256()
    for folder in sorted(folders):
        for file in sorted(folder.glob("**/*" if setting.include_path else "*")):
            if file.suffix in (".yaml", ".yml", ".py", "") and file.is_file():
                digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@contextmanager
def _code(allowed: bool) -> Iterator[None]:
    """The metric that executes code wants this said; it is said here alone."""
    before = os.environ.get(_ALLOW_CODE)
    if allowed:
        os.environ[_ALLOW_CODE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_ALLOW_CODE, None)
        else:
            os.environ[_ALLOW_CODE] = before
