"""A stand-in for the parts of lm-eval that are used: enough for two kinds of local tasks."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class LM:
    """`lm_eval.api.model.LM`."""


@dataclass
class Instance:
    args: tuple[Any, ...]
    task_name: str
    doc_id: int


class Task:
    def __init__(self, file: Path) -> None:
        self.content = json.loads(file.read_text())
        self.UNSAFE_CODE = self.content.get("unsafe_code", False)
        lines = Path(self.content["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        self.docs = [json.loads(line) for line in lines]
        self.dataset = {"test": self.docs}

    def get_config(self, key: str) -> Any:
        return self.content.get(key)

    def set_config(self, key: str, value: Any) -> None:
        self.content[key] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.seed = seed

    def dump_config(self) -> dict[str, Any]:
        return dict(self.content)

    def aggregation(self) -> dict[str, Any]:
        return {m["metric"]: lambda values: sum(values) / len(values) for m in self.metrics}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.content["metric_list"]
        return found

    def scores(self, lm: Any, docs: list[dict[str, Any]]) -> list[dict[str, float]]:
        name = self.content["task"]
        texts = [f"user : {doc['q']} assistant :" for doc in docs]
        if self.content["output_type"] == "generate_until":
            settings = self.content["generation_kwargs"]
            asked = [Instance((text, settings), name, i) for i, text in enumerate(texts)]
            answers = [text.strip() for text in lm.generate_until(asked)]
            return [
                {"exact_match": float(a == d["answer"])} for a, d in zip(answers, docs, strict=True)
            ]
        asked = [
            Instance((text, f" {choice}"), name, i)
            for i, (text, doc) in enumerate(zip(texts, docs, strict=True))
            for choice in doc["choices"]
        ]
        found = iter(lm.loglikelihood(asked))
        return [self.choice(doc, [next(found)[0] for _ in doc["choices"]]) for doc in docs]

    def choice(self, doc: dict[str, Any], own: list[float]) -> dict[str, float]:
        normed = [value / len(text) for value, text in zip(own, doc["choices"], strict=True)]
        return {
            name: float(max(range(len(v)), key=v.__getitem__) == doc["label"])
            for name, v in (("acc", own), ("acc_norm", normed))
        }


class TaskManager:
    def __init__(self, **options: Any) -> None:
        self.options = options

    def load(self, tasks: list[str]) -> dict[str, Any]:
        if not Path(tasks[0]).is_file():
            raise KeyError(f"Spec '{tasks[0]}' is not a registered task")
        task = Task(Path(tasks[0]))
        return {"tasks": {task.content["task"]: task}, "groups": {}}


def evaluate(lm: Any, task_dict: dict[str, Any], limit: int | None, **options: Any) -> Any:
    ((name, task),) = task_dict["tasks"].items()
    scores = task.scores(lm, task.docs[:limit])
    samples = [
        {"doc_id": i, "filter": "none", "metrics": list(own), **own} for i, own in enumerate(scores)
    ]
    means = {f"{key},none": sum(own[key] for own in scores) / len(scores) for key in scores[0]}
    higher = {name: dict.fromkeys(scores[0], True)}
    return {"samples": {name: samples}, "results": {name: means}, "higher_is_better": higher}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it in the package's place; what has imported the package is forgotten."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    # Set and removed: afterwards it is as it was, whatever is imported meanwhile.
    monkeypatch.setitem(sys.modules, "sdft.suites.lm_adapter", ModuleType("gone"))
    del sys.modules["sdft.suites.lm_adapter"]
    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.utils": {"get_rolling_token_windows": None, "make_disjoint_window": None},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.evaluator": {"evaluate": evaluate},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
