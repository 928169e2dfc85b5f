"""Prior-ability suites that measure a model by themselves: benchmarks of lm-eval.

Any `Task` with a test file is a suite, too (`data.suites`). See docs/suites.md.
"""

from sdft.suite import Suite
from sdft.suites.lm_eval_suite import LMEvalSuite

__all__ = ["LMEvalSuite", "Suite"]
