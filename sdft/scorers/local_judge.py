"""A judge that runs here: any causal LM that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sdft.examples import Example, Message
from sdft.scorers.judge_model import JudgeError, JudgeModel, Reply, Usage

if TYPE_CHECKING:
    from sdft.self_edits.author import Author


class LocalJudge(JudgeModel):
    """A model on this machine, loaded on first use; it replies greedily.

    Args:
        model_name: A folder, a hub name, a `.gguf` file, or one of ours.
        max_reply: Longest reply, in tokens.
        batch_size: Conversations at once.
        dtype: Precision of the weights: float32, bfloat16 or float16.
        device: `auto` (the GPU when there is one) or a torch device.
        revision: Branch, tag or commit of a hub name.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        model_name: str,
        max_reply: int = 256,
        batch_size: int = 16,
        dtype: str = "bfloat16",
        device: str = "auto",
        revision: str | None = None,
    ) -> None:
        if min(max_reply, batch_size) < 1:
            raise ValueError("LocalJudge: max_reply and batch_size must be at least 1")
        self.model_name = model_name
        self.max_reply = max_reply
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = device
        self.revision = revision

    @property
    def name(self) -> str:
        """The model's."""
        return self.model_name

    @cached_property
    def identity(self) -> str:
        """Name, revision and, for local files, their sizes and dates."""
        path = Path(self.model_name).expanduser()
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
        return f"{self.model_name} {self.revision} {self.max_reply} {self.dtype} {facts}"

    @cached_property
    def _author(self) -> Author:
        # Not above: it leads back to the tasks, which need the scorers.
        from sdft.models import DTYPES, ModelSource
        from sdft.rollout import Sampling
        from sdft.self_edits.author import Author

        if self.dtype not in DTYPES:
            raise ValueError(f"LocalJudge: dtype must be one of {list(DTYPES)}, got {self.dtype!r}")
        source = ModelSource(self.model_name, revision=self.revision)
        return Author(source, Sampling(self.max_reply, temperature=0.0), self.dtype, self.device)

    def replies(self, conversations: Sequence[Sequence[Message]]) -> Iterator[tuple[int, Reply]]:
        """Batches of like lengths."""
        author = self._author
        ids = [author.encoder.student_ids(Example(tuple(talk), "")) for talk in conversations]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        room = author.prompt_room
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            longest = len(ids[rows[-1]])
            if room is not None and longest > room:
                raise JudgeError(
                    f"the judge {self.model_name!r} has room for {room} tokens, a prompt to judge "
                    f"has {longest}: take a judge with a longer context"
                )
            answers = author.respond([ids[row] for row in rows], author.sampling)
            for row, answer in zip(rows, answers, strict=True):
                yield row, Reply(answer.text, Usage(1, 0, len(ids[row]), answer.tokens))
