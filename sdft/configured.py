"""What the configuration says of optimizer and schedule, which wins over what a checkpoint brings.

Loading an optimizer's or a schedule's state loads its settings with it. Here the settings are noted
as both are made, in this run and in the checkpoint's: what differs between the two is set anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sdft.run import task_stream
from sdft.schedule import StageSchedule

_PROGRESS = ("last_epoch", "_step_count", "_last_lr", "base_lrs", "stage_steps")
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Configured:
    """The settings of an optimizer and its schedule, as plain values.

    Attributes:
        optimizer: The name of its class.
        groups: The settings of each parameter group, `lr` as it was before the schedule scaled it.
        schedule: The schedule's, but for where it stands.
        plan: The steps of each stage's parts; empty for a schedule of another kind.
    """

    optimizer: str
    groups: list[dict[str, Any]]
    schedule: dict[str, Any]
    plan: list[list[int]]

    @classmethod
    def of(cls, optimizer: Optimizer, scheduler: Any) -> Configured:
        """Note the settings of what has just been made."""
        groups: list[dict[str, Any]] = [_settings(group) for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = group.pop("initial_lr", group.get("lr"))
        attributes = {k: v for k, v in vars(scheduler).items() if k not in _PROGRESS}
        plan = scheduler.stage_steps if isinstance(scheduler, StageSchedule) else []
        name = type(optimizer).__name__
        return cls(name, groups, _settings(attributes), [list(parts) for parts in plan])

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def check(self, then: Mapping[str, Any]) -> None:
        """Make sure that this optimizer can use the other one's state.

        Args:
            then: `to_dict` of the run that wrote the checkpoint.

        Raises:
            ValueError: The checkpoint's state is another optimizer's.
        """
        if self.optimizer != then["optimizer"]:
            raise ValueError(
                f"the checkpoint belongs to the optimizer {then['optimizer']!r}, this run's is "
                f"{self.optimizer!r}, which cannot use its state: resume with the former"
            )

    def win(self, then: Mapping[str, Any], trainer: Trainer) -> None:
        """Set anew what this configuration says otherwise than the checkpoint's.

        Args:
            then: `to_dict` of the run that wrote the checkpoint.
            trainer: Holds optimizer and schedule with the checkpoint's state and settings.

        Raises:
            ValueError: The checkpoint's state is another optimizer's.
        """
        if self.to_dict() == then:
            return
        self.check(then)
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        scheduler: Any = config.scheduler
        for name, value in _changed(self.schedule, then["schedule"]).items():
            setattr(scheduler, name, value)
        if isinstance(scheduler, StageSchedule) and self.plan != then["plan"]:
            kept = trainer.current_epoch + task_stream(trainer).stage_ended
            scheduler.stage_steps[kept:] = [list(parts) for parts in self.plan[kept:]]
        places = zip(optimizer.param_groups, self.groups, then["groups"], strict=False)
        for number, (group, own, other) in enumerate(places):
            changed = _changed(own, other)
            rate = changed.pop("lr", None)
            for name, value in changed.items():
                group[name] = tuple(value) if isinstance(value, list) else value
            if rate is not None:
                _set_rate(group, scheduler, number, other["lr"], rate)
        if isinstance(scheduler, StageSchedule):
            scheduler.refresh()


def _set_rate(
    group: dict[str, Any], scheduler: Any, number: int, before: float, after: float
) -> None:
    """Change the full rate; the present one keeps its share of it."""
    share = float(group["lr"]) / before if before else 1.0
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(share * after)
    else:
        group["lr"] = share * after
    group["initial_lr"] = after
    if isinstance(scheduler, LRScheduler):
        scheduler.base_lrs[number] = after
        scheduler._last_lr = [own["lr"] for own in scheduler.optimizer.param_groups]


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain ones among some attributes; sequences become lists."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name == "params":
            continue
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, _PLAIN):
            found[name] = value
        elif isinstance(value, list | tuple) and all(isinstance(v, _PLAIN) for v in value):
            found[name] = list(value)
    return found


def _changed(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What both have and say otherwise."""
    return {name: value for name, value in own.items() if other.get(name, value) != value}
