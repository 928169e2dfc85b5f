"""Shows a few rollouts per stage, token by token, with what student and teacher think of them."""

from __future__ import annotations

import json
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from sdft.batch import Batch
from sdft.callbacks.retention import Retention
from sdft.encoded import collate
from sdft.evaluation import Artifacts
from sdft.flat_sharding import is_flat
from sdft.module import SDFTModule
from sdft.rollout import Rollout, Sampling, evaluation_mode
from sdft.run import is_dry, run_folder, task_stream
from sdft.seeding import derive_seed, run_seed
from sdft.student import StudentModule


class Samples(Callback):
    """Appends sampled rollouts of the stage's task to `samples.jsonl` and TensorBoard's text.

    Each record has stage, task, prompt, the teacher's prompt, the completion, whether that carries
    an artifact of the demonstration (as the run's `Retention` tells them), and per token the
    probability under the student and, where the method has one, under the teacher.

    Args:
        count: Rollouts per stage; 0 for none.

    Raises:
        ValueError: A negative count.
    """

    def __init__(self, count: int = 4) -> None:
        if count < 0:
            raise ValueError(f"samples.count must be 0 or more, found {count}")
        self.count = count
        self._stages: int | None = 0  # done; None for a checkpoint that does not tell

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The samples that a resumed run still owes."""
        if self._stages is not None and trainer.current_epoch > self._stages:
            self._sample(trainer, pl_module, trainer.current_epoch - 1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what cannot be sampled, before anything is trained."""
        if self.count and is_flat(getattr(pl_module, "model", None)):
            raise ValueError("samples.count must be 0 with FSDPStrategy")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The samples of the stage that has just ended."""
        self._sample(trainer, pl_module, trainer.current_epoch)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Expect to be told; older checkpoints do not."""
        self._stages = None

    def state_dict(self) -> dict[str, Any]:
        """How many stages have their samples."""
        return {"stages": self._stages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after them."""
        self._stages = state_dict["stages"]

    def _sample(self, trainer: Trainer, pl_module: LightningModule, stage: int) -> None:
        """Sample, score, write."""
        self._stages = stage + 1
        if self.count == 0:
            return
        assert isinstance(pl_module, StudentModule)
        records = self.records(trainer, pl_module, stage)
        if not trainer.is_global_zero or is_dry(trainer):
            return
        path = run_folder(trainer) / "samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        if isinstance(trainer.logger, TensorBoardLogger):
            text = "\n\n".join(_markdown(record) for record in records)
            trainer.logger.experiment.add_text("samples", text, trainer.global_step)

    @torch.no_grad()
    def records(self, trainer: Trainer, module: StudentModule, stage: int) -> list[dict[str, Any]]:
        """The samples of the stage that has just ended."""
        data = task_stream(trainer)
        task = data.tasks[stage]
        batch = collate(data.encoded(task, "train")[: self.count])
        # A seed of its own, so that looking never changes what is trained.
        module.phases.enter("track")
        with torch.random.fork_rng(), module.forward_precision(), evaluation_mode(module.model):
            torch.manual_seed(derive_seed(run_seed(), "samples", stage))
            completion = _sample(module, batch)
            student_BTV = module.logits(module.model, batch.student_ids, completion)
            student = _chosen(student_BTV, completion.ids_BT)
            teacher = _teacher_probabilities(module, batch, completion)
        module.phases.enter("")
        artifacts = _artifacts(trainer)
        return [
            {
                "stage": stage,
                "task": task.name,
                "prompt": module.tokenizer.decode(batch.student_ids[row]),
                "teacher_prompt": module.tokenizer.decode(batch.teacher_ids[row]),
                "completion": module.decode(ids),
                "artifact": artifacts(module.decode(ids), batch.examples[row]),
                "tokens": _tokens(module, ids, student[row], teacher[row] if teacher else None),
            }
            for row, ids in enumerate(completion.completions())
        ]


def _artifacts(trainer: Trainer) -> Artifacts:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = (c.evaluator.artifacts for c in callbacks if isinstance(c, Retention))
    return next(found, Artifacts())


def _sample(module: StudentModule, batch: Batch) -> Rollout:
    sampling = getattr(module, "sampling", None)
    if not isinstance(sampling, Sampling):
        sampling = Sampling(module.greedy.max_new_tokens)
    return module.sample(module.model, batch.student_ids, sampling)


def _teacher_probabilities(
    module: StudentModule, batch: Batch, completion: Rollout
) -> list[list[float]] | None:
    if isinstance(module, SDFTModule) and module.teacher is not None:
        return _chosen(module.score(batch, completion), completion.ids_BT)
    return None


def _chosen(logits_BTV: Tensor, ids_BT: Tensor) -> list[list[float]]:
    """Probability of each completion token."""
    probabilities = logits_BTV.float().softmax(-1).gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)
    rows: list[list[float]] = probabilities.tolist()
    return rows


def _tokens(
    module: StudentModule, ids: list[int], student: list[float], teacher: list[float] | None
) -> list[dict[str, Any]]:
    records = []
    for place, token in enumerate(ids):
        record: dict[str, Any] = {
            "token": module.tokenizer.decode([token]),
            "student": round(student[place], 4),
        }
        if teacher is not None:
            record["teacher"] = round(teacher[place], 4)
        records.append(record)
    return records


def _markdown(record: dict[str, Any]) -> str:
    columns = ["token", "student", *(["teacher"] if "teacher" in record["tokens"][0] else [])]
    lines = [f"**{record['task']}** `{record['prompt']}`", "", f"| {' | '.join(columns)} |"]
    lines.append("|" + "---|" * len(columns))
    for token in record["tokens"]:
        cells = [str(token[column]).replace("|", "\\|").replace("\n", "⏎") for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
