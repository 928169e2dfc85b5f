"""CPT: continued pre-training on the raw text that examples bring."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sdft.batch import Batch, pad
from sdft.examples import Example
from sdft.methods.sft import SFTModule
from sdft.rollout import Rollout
from sdft.run import task_stream
from sdft.share import Share

Text = Literal["context", "demonstration", "prompt_and_demonstration"]
"""Which text of an example is the document."""


class CPTModule(SFTModule):
    """Next-token prediction on documents: no prompt, no chat template, no answer apart.

    A batch's documents are those of its examples, so the run makes the same number of steps as any
    other method; examples that share a passage repeat it. A document begins with the tokenizer's
    beginning-of-sequence token and ends with its end-of-sequence token, where it has them. Nothing
    is cut: a document that is longer than a window is read in several, each of which begins with
    the last token of the one before, so that every token but a document's first is predicted
    exactly once, from what precedes it in its window. The loss is the mean over a batch's tokens.

    The teacher's prompt, which nothing reads here, still decides which examples fit
    `data.max_teacher_tokens`. With `teacher_sees` "answer" it leaves the context out, and no
    example is dropped for a long one.

    Args:
        text: The document: an example's context, its demonstration, or its turns and the
            demonstration with blank lines between.
        max_text_tokens: Longest window, in tokens; no longer than the model's context. All windows
            of a batch go through the model together.
        kwargs: See `StudentModule`.

    Raises:
        ValueError: An unknown text, or a window that holds no two tokens; when the run starts, an
            example without that text.
    """

    method = "cpt"

    def __init__(self, text: Text = "context", max_text_tokens: int = 1024, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if text not in get_args(Text):
            raise ValueError(f"text must be one of {', '.join(get_args(Text))}, found {text!r}")
        if max_text_tokens < 2:
            raise ValueError(f"max_text_tokens must be at least 2, found {max_text_tokens}")
        self.text: Text = text
        self.max_text_tokens = max_text_tokens

    def on_fit_start(self) -> None:
        """Read every document now: one that is missing fails before anything is trained.

        Raises:
            ValueError: An example without the text; names its task and the field.
        """
        super().on_fit_start()
        data = task_stream(self.trainer)
        for task in data.tasks:
            for item in data.encoded(task, "train"):
                text = document(item.example, self.text)
                if not text.strip() or len(self.document_ids(item.example)) < 2:
                    raise ValueError(
                        f"task {task.name!r}: the {self.text} of a training example holds no text "
                        f"to learn, found {text!r} (prompt {item.example.prompt[:80]!r}): "
                        f"model.text may be {', '.join(get_args(Text))}"
                    )

    def supervised(self, batch: Batch) -> Tensor:
        """Mean loss of the tokens of the batch's documents; logged."""
        batch, target = self.reading(batch)
        mask_BT = batch.counted(target.mask_BT)
        tokens = mask_BT.sum()
        return self.fitted(batch, target, mask_BT / tokens.clamp(min=1), tokens)

    def reading(self, batch: Batch) -> tuple[Batch, Rollout]:
        """The batch's windows: the first token of each as the prompt, the others as its target."""
        read = [(example, window) for example in batch.examples for window in self.windows(example)]
        starts = Batch([example for example, _ in read], [window[:1] for _, window in read])
        if batch.share is not None:
            flags = zip(batch.examples, batch.share.real, strict=True)
            real = tuple(real for example, real in flags for _ in self.windows(example))
            starts.share = Share(tuple(range(len(read))), real, tuple(starts.origins))
        ids_BT, mask_BT = pad([window[1:] for _, window in read], self.pad_id, "right", self.device)
        return starts, Rollout(ids_BT, mask_BT, torch.zeros(len(read), dtype=torch.bool))

    def windows(self, example: Example) -> list[list[int]]:
        """The example's document, in windows of which each shares a token with the one before."""
        ids, length = self.document_ids(example), self.window_tokens
        return [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]

    @property
    def window_tokens(self) -> int:
        """Longest window that `max_text_tokens` and the model's context allow."""
        room = self.prompt_room
        context = None if room is None else room + self.greedy.max_new_tokens
        return self.max_text_tokens if context is None else min(self.max_text_tokens, context)

    def document_ids(self, example: Example) -> list[int]:
        """Token ids of the example's document, with its beginning and end where there are such."""
        ids = self.tokenizer.encode(document(example, self.text), add_special_tokens=False)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]


def document(example: Example, text: Text) -> str:
    """The raw text that an example brings; empty where it has none."""
    if text == "context":
        return example.context
    demonstration = example.demonstration or ""
    if text == "demonstration" or not demonstration:
        return demonstration
    return "\n\n".join([*(message["content"] for message in example.messages), demonstration])
