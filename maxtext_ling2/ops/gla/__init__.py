"""Gated linear attention with a constant decay per head: the operation, and the decays of a LING2 layer.

README.md beside this file has the equations, the grid of the TPU kernels, and what each file does.
"""

import warnings
from typing import Any

from maxtext_ling2.ops.gla.api import gla
from maxtext_ling2.ops.gla.block_sizes import chunk_size
from maxtext_ling2.ops.gla.context_parallel import gla_context_parallel
from maxtext_ling2.ops.gla.decay import log_decay, slopes

__all__ = ["chunk_size", "gla", "gla_context_parallel", "log_decay", "slopes"]


def __getattr__(name: str) -> Any:
  """Former names, for one release."""
  from maxtext_ling2.ops import fused_norm

  former = {
    "gla_over_ranks": ("ops.gla.gla_context_parallel", gla_context_parallel),
    "rotated_norm": ("ops.fused_norm.qk_norm_rope", fused_norm.qk_norm_rope),
    "gated_norm": ("ops.fused_norm.grouped_rms_norm_gated", fused_norm.grouped_rms_norm_gated),
  }
  if name not in former:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  new_name, value = former[name]
  warnings.warn(f"{__name__}.{name} is now maxtext_ling2.{new_name}", DeprecationWarning, stacklevel=2)
  return value
