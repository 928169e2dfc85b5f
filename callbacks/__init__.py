"""Callbacks of a run, imported as `sdft.callbacks`."""

if __name__ == "callbacks":
    raise ImportError("this folder is imported as `sdft.callbacks`, not as `callbacks`")

from sdft.callbacks.checkpoint import StageCheckpoint
from sdft.callbacks.config_file import ConfigFile
from sdft.callbacks.cost import CostReport
from sdft.callbacks.ema_teacher import EMATeacher
from sdft.callbacks.export import ModelExport
from sdft.callbacks.filters import Filters
from sdft.callbacks.gate import Gate
from sdft.callbacks.guard import Guard
from sdft.callbacks.predictions import Predictions
from sdft.callbacks.progress import StageProgressBar
from sdft.callbacks.retention import Retention
from sdft.callbacks.review import Review
from sdft.callbacks.samples import Samples
from sdft.callbacks.stage_watch import StageWatch

__all__ = [
    "ConfigFile",
    "CostReport",
    "EMATeacher",
    "Filters",
    "Gate",
    "Guard",
    "ModelExport",
    "Predictions",
    "Retention",
    "Review",
    "Samples",
    "StageCheckpoint",
    "StageProgressBar",
    "StageWatch",
]
