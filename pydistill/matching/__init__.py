"""Losses that match what a network makes of real and of synthetic images."""

from pydistill.matching.class_gradients import class_gradients
from pydistill.matching.gradient import gradient_match

__all__ = ["class_gradients", "gradient_match"]
