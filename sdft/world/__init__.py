"""The embedded world: a tiny pretrained model, its language, and tasks that teach it new skills.

It ships in the package so that the main job shows self-distillation at work in minutes on a CPU:
the model knows prior skills for certain, is unsure of new ones, and does them when shown.
"""

from pathlib import Path

from sdft.world.language import TEACHER_TEMPLATE
from sdft.world.tasks import WorldScorer, WorldSkill, WorldSuite

MODEL_DIR = Path(__file__).resolve().parent / "model"
"""The model and its tokenizer, as a Hugging Face folder."""

__all__ = ["MODEL_DIR", "TEACHER_TEMPLATE", "WorldScorer", "WorldSkill", "WorldSuite"]
