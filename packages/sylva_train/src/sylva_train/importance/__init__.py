"""How much each weight matters: the paper's second-order rule, and its rivals."""

from .scores import LayerScores, Scores
from .scoring import score, score_rules

__all__ = ["LayerScores", "Scores", "score", "score_rules"]
