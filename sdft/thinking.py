"""Reasoning models: whether they think, and what becomes of their thoughts.

A thought stands between two markers before the answer. The first marker may be the end of the
prompt already: then a completion begins inside the thought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdft.rollout import Rollout

Share = Literal["answer", "everything"]
Switch = bool | str | None

_WHITE_SPACE = 8
"""Tokens of white space that a chat template may write behind the marker, at most."""


@dataclass(frozen=True)
class Thinking:
    """How a reasoning model thinks, and what of its responses is scored and learnt.

    Args:
        student: What the chat template is told for the student's prompts, in training and
            evaluation: true or false turns thinking on or off, a word is passed on as it is (an
            effort), null leaves it to the template.
        teacher: The same for the teacher's prompts.
        switch: The argument of the chat template that is told.
        start: Marker where a thought begins.
        end: Marker where it ends.
        scored: What scorers see: the `answer` behind the thoughts, or `everything`. A response
            whose thought never ends has no answer and scores 0.
        learnt: What the loss covers: `everything`, or the `answer` alone.

    Raises:
        ValueError: An unknown value, or markers that are empty or alike.
    """

    student: Switch = None
    teacher: Switch = None
    switch: str = "enable_thinking"
    start: str = "<think>"
    end: str = "</think>"
    scored: Share = "answer"
    learnt: Share = "everything"

    def __post_init__(self) -> None:
        for key in ("scored", "learnt"):
            if getattr(self, key) not in get_args(Share):
                raise ValueError(
                    f"model.thinking.{key} must be one of {get_args(Share)}, "
                    f"found {getattr(self, key)!r}"
                )
        if not self.start.strip() or not self.end.strip() or self.start == self.end:
            raise ValueError(
                "model.thinking.start and model.thinking.end must be two different markers, found "
                f"{self.start!r} and {self.end!r}"
            )

    def template_kwargs(
        self, tokenizer: PreTrainedTokenizerBase, common: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of the chat template for the student's and for the teacher's prompts.

        Args:
            tokenizer: Has the template.
            common: Those of both (`model.chat_template_kwargs`).

        Raises:
            ValueError: A template that does not know the switch, or one that is set twice.
        """
        given = dict(common or {})
        sides = [{} if side is None else {self.switch: side} for side in self.sides]
        if any(sides):
            if self.switch in given:
                raise ValueError(
                    f"model.chat_template_kwargs and model.thinking both set {self.switch!r}: "
                    "leave it out of one"
                )
            if self.switch not in str(tokenizer.chat_template):
                raise ValueError(
                    f"model.thinking turns thinking on or off, but the model's chat template has "
                    f"no {self.switch!r}: name its argument with model.thinking.switch, or leave "
                    "model.thinking.student and .teacher null"
                )
        student, teacher = ({**given, **side} for side in sides)
        return student, teacher

    @property
    def sides(self) -> tuple[Switch, Switch]:
        """The student's, the teacher's."""
        return self.student, self.teacher


@dataclass(frozen=True)
class Thoughts:
    """A completion, taken apart.

    Attributes:
        tokens: Of the thoughts, their markers included; 0 without any. The answer's follow.
        finished: Whether the thoughts have an end; true without any.
        text: The thoughts, without markers.
        answer: What stands behind them; empty where they have no end.
    """

    tokens: int
    finished: bool
    text: str
    answer: str


class ThoughtReader:
    """Tells thoughts from answers in completions.

    The answer is what follows the last end marker; where a thought begins behind that, or began
    and has no end at all, there is none. Markers are found in the text, so it does not matter
    whether they are special tokens, ordinary ones or several.

    Args:
        tokenizer: The student's.
        thinking: Has the markers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thinking: Thinking) -> None:
        self.tokenizer, self.thinking = tokenizer, thinking

    def opened(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt, as token ids, ends inside a thought."""
        start = self.thinking.start
        tail = self._whole(prompt[-len(start) - _WHITE_SPACE :])
        return tail.rstrip().endswith(start)

    def read(self, ids: Sequence[int], opened: bool) -> Thoughts:
        """Take a completion apart.

        Args:
            ids: Its tokens.
            opened: Whether its prompt ends inside a thought.
        """
        start, end = self.thinking.start, self.thinking.end
        whole = self._whole(ids)
        begun, ended = whole.rfind(start), whole.rfind(end)
        if begun < 0 and ended < 0 and not opened:
            return Thoughts(0, True, "", self._plain(ids).strip())
        if ended < 0 or begun > ended:
            return Thoughts(len(ids), False, self._unmarked(self._plain(ids)), "")
        tokens = self._through(ids, whole.count(end))
        # The end marker's last token may hold the first letters of the answer.
        letters = self._whole(ids[:tokens]).rpartition(end)[2]
        thoughts = self._unmarked(self._plain(ids[:tokens]).removesuffix(letters))
        return Thoughts(tokens, True, thoughts, (letters + self._plain(ids[tokens:])).strip())

    def answer_mask(self, completion: Rollout, opened: bool) -> Tensor:
        """Tokens of the answers, `[B, T]`: of no thought, and of no padding.

        Args:
            completion: B completions.
            opened: Whether their prompts end inside a thought.
        """
        lengths = [self.read(ids, opened).tokens for ids in completion.completions()]
        device = completion.mask_BT.device
        positions_T = torch.arange(completion.mask_BT.shape[1], device=device)
        return completion.mask_BT & (positions_T >= torch.tensor(lengths, device=device)[:, None])

    def figures(self, completion: Rollout, opened: bool) -> dict[str, Tensor]:
        """Length of the thoughts in tokens, and whether they have no end, `[B]` each."""
        found = [self.read(ids, opened) for ids in completion.completions()]
        return {
            "thought_length": torch.tensor([float(one.tokens) for one in found]),
            "unfinished": torch.tensor([float(not one.finished) for one in found]),
        }

    def _through(self, ids: Sequence[int], ends: int) -> int:
        """The fewest tokens whose text holds so many end markers."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if self._whole(ids[:middle]).count(self.thinking.end) >= ends:
                high = middle
            else:
                low = middle + 1
        return low

    def _whole(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _plain(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _unmarked(self, text: str) -> str:
        for marker in (self.thinking.start, self.thinking.end):
            text = text.replace(marker, "")
        return text.strip()
