"""Methods beside SDFT, on the same module, data and retention machinery."""

from sdft.methods.sft import SFTModule
from sdft.methods.soft_targets import SoftTargetModule
from sdft.methods.teacher_samples import TeacherSampleModule

__all__ = ["SFTModule", "SoftTargetModule", "TeacherSampleModule"]
