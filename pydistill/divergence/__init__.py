"""Divergences between distributions that networks put out."""

from pydistill.divergence.contrastive_ce import contrastive_ce

__all__ = ["contrastive_ce"]
