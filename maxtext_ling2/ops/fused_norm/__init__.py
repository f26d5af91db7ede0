"""The norms around linear attention: RMSNorm and RoPE of q and k, grouped RMSNorm and sigmoid gate of the output."""

import warnings
from typing import Any

from maxtext_ling2.ops.fused_norm.api import grouped_rms_norm_gated, qk_norm_rope

__all__ = ["grouped_rms_norm_gated", "qk_norm_rope"]

_FORMER = {"gated_norm": grouped_rms_norm_gated, "rotated_norm": qk_norm_rope}


def __getattr__(name: str) -> Any:
  """Former names, for one release."""
  if name not in _FORMER:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  warnings.warn(f"{__name__}.{name} is now {_FORMER[name].__name__}", DeprecationWarning, stacklevel=2)
  return _FORMER[name]
