"""The norms around linear attention: RMSNorm and RoPE of q and k, grouped RMSNorm and sigmoid gate of the output."""

from maxtext_ling2.ops.fused_norm.api import grouped_rms_norm_gated, qk_norm_rope

__all__ = ["grouped_rms_norm_gated", "qk_norm_rope"]
