"""Scorers: how well a response answers an example, from 0 to 1.

A scorer is any callable `scorer(response, example) -> score`. Those here inherit `Scorer`, so that
a YAML file may name them without their module (`class_path: JSONMatch`); one of your own only needs
the same `__call__`. See docs/tasks.md.
"""

from sdft.scorers.code import CodeTests
from sdft.scorers.endpoint import ChatEndpoint
from sdft.scorers.exact import ExactMatch
from sdft.scorers.json_values import JSONFieldMatch, JSONMatch
from sdft.scorers.judge import Judge
from sdft.scorers.judge_model import JudgeError, JudgeModel
from sdft.scorers.local_judge import LocalJudge
from sdft.scorers.numeric import NumericMatch
from sdft.scorers.pattern import LetterMatch, RegexMatch
from sdft.scorers.scorer import Scorer, explained
from sdft.scorers.tool_calls import ToolCallMatch

__all__ = [
    "ChatEndpoint",
    "CodeTests",
    "ExactMatch",
    "JSONFieldMatch",
    "JSONMatch",
    "Judge",
    "JudgeError",
    "JudgeModel",
    "LetterMatch",
    "LocalJudge",
    "NumericMatch",
    "RegexMatch",
    "Scorer",
    "ToolCallMatch",
    "explained",
]
