"""Everything that a cell depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from sdft.cell_cache.described import code_digest, described
from sdft.encoded import Encoded
from sdft.evaluator import Evaluator
from sdft.ranks import ranks
from sdft.seeding import run_seed
from sdft.student import StudentModule
from sdft.suite import Suite
from sdft.tasks import Task

Facts = dict[str, Any]


def facts_of(
    evaluator: Evaluator, module: StudentModule, task: Task, encoded: Sequence[Encoded]
) -> Facts:
    """What a column's greedy score depends on beside the weights; a collective call.

    Args:
        evaluator: Measures it.
        module: Holds the student.
        task: The task or suite.
        encoded: Its examples.

    Raises:
        Undescribed: A scorer, an engine or a suite does not say what it computes.
    """
    own = _suite(task, module) if isinstance(task, Suite) else _examples(task, encoded)
    return {
        "column": [task.name, digest(own)],
        "answering": digest(_answering(module)),
        "measured": digest([described(evaluator.artifacts), evaluator.limit]),
        "code": code_digest(),
        "machine": _machine(module),
    }


def _suite(suite: Suite, module: StudentModule) -> Any:
    suite.prepare(module)
    return [described(type(suite)), suite.described(), run_seed()]


def _examples(task: Task, encoded: Sequence[Encoded]) -> Any:
    examples = [[asdict(item.example), item.student_ids] for item in encoded]
    return [described(task.scorer), examples]


def _answering(module: StudentModule) -> Any:
    """How responses are made and read."""
    return [
        described(type(module)),
        asdict(module.greedy),
        module.eos_ids,
        module.pad_id,
        described(module.thinking),
        described(module.template_kwargs),
        _engine(module.engine),
        _tokenizer(module),
    ]


def _engine(engine: Any) -> Any:
    """An engine's settings; what it keeps for itself (a model of its own) is no setting."""
    own = {name: value for name, value in vars(engine).items() if not name.startswith("_")}
    return [described(type(engine)), described(own)]


def _tokenizer(module: StudentModule) -> Any:
    tokenizer: Any = module.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return [type(tokenizer).__name__, words, tokenizer.chat_template, tokenizer.all_special_tokens]


def _machine(module: StudentModule) -> list[Any]:
    """Where numbers are rounded otherwise."""
    device, trainer = module.device, module._trainer
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    precision = None if trainer is None else str(trainer.precision)
    return [name, precision, ranks()]


def digest(content: Any) -> str:
    """SHA-256 of plain values."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
