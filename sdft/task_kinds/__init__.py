"""The paper's skills as tasks: tool use, science, medical (arXiv 2601.19897).

Each reads the records of its data set as they are published, from files or from the hub, and makes
the paper's prompts of them. See docs/tasks.md.
"""

from sdft.task_kinds.medical import MedicalTask
from sdft.task_kinds.science import ScienceTask
from sdft.task_kinds.tool_use import ToolUseTask

__all__ = ["MedicalTask", "ScienceTask", "ToolUseTask"]
