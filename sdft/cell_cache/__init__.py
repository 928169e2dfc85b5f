"""Cells that were measured before, found by all that they depend on: `retention.cache`."""

from sdft.cell_cache.evaluator import CachedEvaluator
from sdft.cell_cache.model_digest import model_digest

__all__ = ["CachedEvaluator", "model_digest"]
