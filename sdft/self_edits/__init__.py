"""Self-edits: the model writes its own training examples from a passage or a task's description.

What it writes (implications, questions with answers, rewrites, examples of a task) is read, checked
and freed of duplicates, and left as JSONL for review; `JSONLTask` trains on it, by SDFT or by SFT.
After SEAL (arXiv 2506.10943), without its reinforcement learning.

    python -m sdft self_edits --config configs/self_edits.yaml
"""

from sdft.self_edits.command import SelfEdits

__all__ = ["SelfEdits"]
