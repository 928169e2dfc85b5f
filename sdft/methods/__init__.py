"""Methods beside SDFT, on the same module, data and retention machinery."""

from sdft.methods.anchor_replay import AnchorReplayModule
from sdft.methods.cpt import CPTModule
from sdft.methods.dft import DFTModule
from sdft.methods.oracle_rag import OracleRAGModule
from sdft.methods.reinvoke import ReinvokeModule
from sdft.methods.sft import SFTModule
from sdft.methods.soft_targets import SoftTargetModule
from sdft.methods.teacher_samples import TeacherSampleModule

__all__ = [
    "AnchorReplayModule",
    "CPTModule",
    "DFTModule",
    "OracleRAGModule",
    "ReinvokeModule",
    "SFTModule",
    "SoftTargetModule",
    "TeacherSampleModule",
]
