"""The experts of a mixture: gather, gate, up, activation, down and weighted sum as one function, and MaxText's tiles."""

from maxtext_ling2.ops.experts.api import experts

__all__ = ["experts"]
