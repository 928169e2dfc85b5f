"""Prior-ability suites that need no more than their name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ready:
    """A suite with everything set.

    Attributes:
        task: Its name in lm-eval.
        metric: Its score there.
        filter: Which form of the responses that is measured on; the only one when None.
        chat: Whether prompts go through the chat template.
        runs_code: Whether it executes what the model writes.
    """

    task: str
    metric: str
    filter: str | None = None
    chat: bool = False
    runs_code: bool = False


READY: dict[str, Ready] = {
    "hellaswag": Ready("hellaswag", "acc"),
    "mmlu": Ready("mmlu", "acc"),
    "truthfulqa": Ready("truthfulqa_mc1", "acc"),
    "winogrande": Ready("winogrande", "acc"),
    "humaneval": Ready("humaneval", "pass@1", "create_test", runs_code=True),
    "ifeval": Ready("ifeval", "prompt_level_strict_acc", chat=True),
}
"""The six of the paper (arXiv 2601.19897), which names no metrics: its figures for the base are
those of plain accuracy for HellaSwag and of the single true answer for TruthfulQA."""
