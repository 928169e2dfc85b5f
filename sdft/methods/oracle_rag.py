"""Oracle RAG: the model is asked with the right passage in its prompt, and nothing is trained."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft.batch import Batch, Origin
from sdft.data import ContinualDataModule
from sdft.examples import Example
from sdft.prompts import PromptEncoder, TeacherTemplate
from sdft.run import task_stream
from sdft.student import StudentModule
from sdft.tasks import Split, Task

log = logging.getLogger(__name__)

ORDER: dict[str, tuple[Split, ...]] = {
    "fit": ("test", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}
"""Entry point → the splits that it asks: the first of them that a task has."""


class OracleRAGModule(StudentModule):
    """The base model with each example's own context in its prompt: retrieval that never errs.

    The upper bound that knowledge learnt into the weights is measured against (arXiv 2601.19897,
    knowledge acquisition). It trains nothing: a stage takes one batch and leaves the weights as
    they are, bit for bit, so a run gives the same report as that of any other method. The options
    of training, a penalty included, have no effect. A prompt with its context must fit
    `data.max_student_tokens`.

    Args:
        rag_template: The student's last user turn for an example with a context, with `{context}`
            and `{prompt}`. An example without one is asked its bare prompt; they are counted in
            the log.
        kwargs: See `StudentModule`.

    Raises:
        ValueError: A template without its placeholders, or with that of the demonstration; when
            the run starts, not one evaluated example of the tasks has a context.
    """

    method = "oracle_rag"
    learns_from: frozenset[Origin] = frozenset(("new", "past", "general"))
    trains = False

    def __init__(self, rag_template: str = "{context}\n\n{prompt}", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for needed in ("{context}", "{prompt}"):
            if needed not in rag_template:
                raise ValueError(f"rag_template lacks {needed}: {rag_template!r}")
        if "{demonstration}" in rag_template:
            raise ValueError(f"rag_template must not show the {{demonstration}}: {rag_template!r}")
        self.rag_template = TeacherTemplate(rag_template, sees="text")
        self.penalty = None

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Puts an example's context into the prompt that the student answers."""
        kwargs = self.template_kwargs
        return RAGEncoder(self.tokenizer, self.template, self.rag_template, *kwargs)

    def setup(self, stage: str) -> None:
        """Count what has no context, before anything is asked.

        Raises:
            ValueError: Nothing has.
        """
        check_contexts(task_stream(self.trainer), ORDER[stage])

    def prepare_copies(self, student: PreTrainedModel) -> None:
        """None: the student stays the base."""

    def begin_stage(self, stage: int) -> None:
        """Nothing changes between stages."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing to learn: without a loss the optimizer has no gradient and changes nothing."""
        warnings.filterwarnings("ignore", message=".*`training_step` returned `None`")


class RAGEncoder(PromptEncoder):
    """Encodes student prompts with the example's context in them.

    Args:
        tokenizer: See `PromptEncoder`.
        template: See `PromptEncoder`.
        rag_template: The student's last user turn for an example with a context.
        chat_template_kwargs: See `PromptEncoder`.
        teacher_kwargs: See `PromptEncoder`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TeacherTemplate,
        rag_template: TeacherTemplate,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        teacher_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, template, chat_template_kwargs, teacher_kwargs)
        self.rag_template = rag_template

    def student_ids(self, example: Example) -> list[int]:
        """Token ids of the prompt, behind the context where there is one."""
        messages = self.rag_template.messages(example) if example.context else example.messages
        return self._encode(messages)


def check_contexts(data: ContinualDataModule, order: tuple[Split, ...]) -> None:
    """Report evaluated examples that have no context.

    Args:
        data: The task stream.
        order: The first of these splits that a task has is the one evaluated.

    Raises:
        ValueError: Not one example of the tasks (suites do not count) has a context.
    """
    found = 0
    for task in data.evaluated:
        split, examples = _evaluated(task, order)
        missing = sum(not example.context for example in examples)
        if missing:
            log.warning(
                "task %r, %s: %d of %d examples have no context and are asked their bare prompt",
                *(task.name, split, missing, len(examples)),
            )
        found += 0 if task in data.suites else len(examples) - missing
    if not found:
        names = ", ".join(repr(task.name) for task in data.tasks)
        raise ValueError(
            f"oracle_rag puts each example's context into its prompt, but not one {order[0]} "
            f"example of {names} has a context: give the tasks a context_field, or examples with "
            "a context"
        )


def _evaluated(task: Task, order: tuple[Split, ...]) -> tuple[Split, list[Example]]:
    for split in order:
        if examples := list(task.examples(split)):
            return split, examples
    return order[0], []
