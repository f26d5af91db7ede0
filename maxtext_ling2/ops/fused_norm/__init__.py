"""The norms around linear attention: RMSNorm and rotation of q and k, grouped RMSNorm and gate of the output."""

from maxtext_ling2.ops.fused_norm.api import gated_norm, rotated_norm

__all__ = ["gated_norm", "rotated_norm"]
