"""Cells that were measured before, found by all that they depend on: `retention.cache`."""

from sdft.cell_cache.evaluator import CachedEvaluator
from sdft.cell_cache.weights import weights_digest

__all__ = ["CachedEvaluator", "weights_digest"]
