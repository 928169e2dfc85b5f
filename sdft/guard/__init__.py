"""Watching a run for the ways in which self-distillation fails, and stopping it in time.

`signals` says what is watched, `rules` when that is out of order and what follows, `baseline` what
was normal so far, `judge` puts the three together; `gradients`, `rates` and `teachers` carry out
what follows. `sdft.callbacks.Guard` is the callback that holds them.
"""

from sdft.guard.judge import Alarm, Judge
from sdft.guard.rules import Action, Rule
from sdft.guard.stop import GuardStop

__all__ = ["Action", "Alarm", "GuardStop", "Judge", "Rule"]
