"""The whole configuration of each run, made of base, settings and overlay, and what differs.

What the files say together is worked out by the command line itself (`--print_config`), so a run's
file holds every key, also those that nobody wrote, and repeats the run alone.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from sdft.comparison.plan import Method, Plan, Run
from sdft.redaction import secret_keys

Settings = dict[str, Any]
Resolve = Callable[[list[Path]], Settings]
"""Files, later ones win → the configuration that `fit` would run with."""

EVALUATION = (
    "model.model_name",
    "model.max_new_tokens",
    "data.tasks",
    "data.suites",
    "model.dtype",
    "model.chat_template_kwargs",
    "model.thinking",
    "trainer.precision",
    *(
        f"retention.{key}"
        for key in (
            "split",
            "limit",
            "selection_split",
            "artifact_patterns",
            "artifact_opening_words",
            "kl_to_base",
            "kl_limit",
            "pass_at",
            "pass_samples",
            "pass_temperature",
            "pass_limit",
        )
    ),
)
"""What all runs must share to be measured alike."""
BUDGET = (
    "data.batch_size",
    "data.steps",
    "data.epochs",
    "trainer.accumulate_grad_batches",
    "trainer.max_epochs",
    "trainer.max_steps",
)
"""What all runs that have a learning rate must share to train alike."""
_RATE = "model.optimizer.lr"
# Where files go and what is shown on the way: no part of what a run computes.
_INCIDENTAL = (
    ("trainer", "default_root_dir"),
    ("trainer", "logger"),
    ("trainer", "enable_progress_bar"),
    ("trainer", "enable_model_summary"),
    ("checkpoint", "every_n_steps"),
    ("ckpt_path",),
)


def method_settings(plan: Plan, resolve: Resolve) -> dict[str, Settings]:
    """The configuration of every method, by its name: base, then settings, then overlay.

    Raises:
        ValueError: One is not valid, holds a secret, has no learning rate to set, or would not be
            trained or measured as the first is.
    """
    found: dict[str, Settings] = {}
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "settings.yaml"
        shared.write_text(yaml.safe_dump(plan.values.settings), encoding="utf-8")
        for method in plan.methods:
            try:
                settings = resolve([*plan.base, shared, method.overlay])
            except ValueError as error:
                text = str(error).replace(str(shared), f"{plan.file}: settings")
                raise ValueError(f"method {method.name!r} ({method.overlay}): {text}") from error
            _check(method, settings)
            # Rates are chosen on examples that no score in the report is of.
            retention = settings.setdefault("retention", {})
            retention["selection_split"] = retention.get("selection_split") or "validation"
            found[method.name] = settings
    names = {method.name: f"method {method.name!r}" for method in plan.methods}
    swept = {method.name for method in plan.methods if method.rates is not None}
    check_matched({names[name]: settings for name, settings in found.items()}, EVALUATION)
    check_matched({names[name]: found[name] for name in found if name in swept}, BUDGET)
    return found


def run_settings(settings: Settings, run: Run, folder: Path) -> Settings:
    """A method's configuration as one run's: its seed, its rate, its folder.

    Raises:
        ValueError: There is no learning rate to set.
    """
    own = deepcopy(settings)
    own["seed_everything"] = run.seed
    if run.rate is not None:
        _rates_holder(own)["lr"] = run.rate
    own["trainer"] |= {
        "default_root_dir": str(folder),
        # Right into the folder, so that a resumed run goes on in it.
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {
                "save_dir": str(folder),
                "name": "",
                "version": "",
                "default_hp_metric": False,
            },
        },
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    own["checkpoint"] |= {"stages": False}
    own["export"] |= {"enabled": False}
    own["samples"] |= {"count": 0}
    return own


def fingerprint(settings: Settings) -> str:
    """A digest of all that bears on what a run computes."""
    content = json.dumps(_essential(settings), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def changes(old: Settings, new: Settings) -> list[str]:
    """What bears on the result and differs: `key: old → new`."""
    before, after = (dict(_leaves(_essential(settings))) for settings in (old, new))
    keys = [key for key in {**before, **after} if before.get(key, _GONE) != after.get(key, _GONE)]
    return [f"{key}: {before.get(key, _GONE)} → {after.get(key, _GONE)}" for key in keys]


def check_matched(settings: Mapping[str, Settings], keys: tuple[str, ...]) -> None:
    """Compare what must be alike.

    Args:
        settings: Whose → configuration.
        keys: See `EVALUATION` and `BUDGET`.

    Raises:
        ValueError: Two differ; names both, the key and the values.
    """
    (first, reference), *others = settings.items() or [("", {})]
    for name, own in others:
        for key in keys:
            here, there = value_at(reference, key), value_at(own, key)
            if here != there:
                raise ValueError(
                    f"{first} and {name} differ in {key}: {_brief(here)} and {_brief(there)}; a "
                    "comparison needs the same stream, budget and evaluation for all"
                )


def value_at(settings: Settings, key: str) -> Any:
    """The value of a key like `data.steps`, through `init_args`; None when there is none."""
    value: Any = settings
    for part in key.split("."):
        if isinstance(value, dict) and part not in value:
            value = value.get("init_args")
        value = value.get(part) if isinstance(value, dict) else None
    return value


_GONE = "(absent)"


def _check(method: Method, settings: Settings) -> None:
    where = f"method {method.name!r} ({method.overlay})"
    if keys := secret_keys(settings):
        raise ValueError(
            f"{where}: {keys[0]} holds a secret, and a comparison writes the configuration of its "
            "runs to disk: have the code read it from the environment"
        )
    if method.rates is not None:
        try:
            _rates_holder(settings)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if value_at(settings, "retention.enabled") is False:
        raise ValueError(f"{where}: retention.enabled is false, so there is nothing to compare")


def _rates_holder(settings: Settings) -> dict[str, Any]:
    holder = value_at(settings, _RATE.removesuffix(".lr"))
    arguments = holder.get("init_args") if isinstance(holder, dict) else None
    if not isinstance(arguments, dict) or "lr" not in arguments:
        raise ValueError(
            "there is no learning rate to set: name the optimizer in the base, for example "
            "model.optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-4}}"
        )
    return arguments


def _essential(settings: Settings) -> Settings:
    own = deepcopy(settings)
    for *path, last in _INCIDENTAL:
        holder = own
        for part in path:
            holder = holder.get(part) or {}
        holder.pop(last, None)
    return own


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for part, inner in items:
            yield from _leaves(inner, f"{key}.{part}" if key else str(part))
    else:
        yield key, value


def _brief(value: Any) -> str:
    names = [_task_name(item) for item in value] if isinstance(value, list) else [str(value)]
    return "[" + ", ".join(names) + "]" if isinstance(value, list) else names[0]


def _task_name(item: Any) -> str:
    arguments = item.get("init_args") if isinstance(item, dict) else None
    if not isinstance(arguments, dict):
        return str(item)
    given = {key: value for key, value in arguments.items() if value is not None}
    return str(given.get("name") or ", ".join(f"{key} {value}" for key, value in given.items()))
