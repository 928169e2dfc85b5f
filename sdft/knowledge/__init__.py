"""From a folder of documents to a data set that teaches a model what they say.

Documents are cut into passages, questions with answers are written (or given), checked against
their passages, freed of duplicates and split; the data set is for a person to review before
anything trains on it. See docs/knowledge.md.

    python -m sdft knowledge build --config configs/knowledge_build.yaml
"""

from sdft.knowledge.build import KnowledgeBuild

__all__ = ["KnowledgeBuild"]
