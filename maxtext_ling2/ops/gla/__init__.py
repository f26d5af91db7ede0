"""Gated linear attention with a constant decay per head: the operation, and the decays of a LING2 layer."""

from typing import Any

from maxtext_ling2.ops.gla.api import gla
from maxtext_ling2.ops.gla.block_sizes import chunk_size
from maxtext_ling2.ops.gla.context_parallel import gla_over_ranks
from maxtext_ling2.ops.gla.decay import log_decay, slopes

__all__ = ["chunk_size", "gla", "gla_over_ranks", "log_decay", "slopes"]


def __getattr__(name: str) -> Any:
  """`gated_norm` and `rotated_norm`, which were here before `ops.fused_norm`, for one more release."""
  if name in ("gated_norm", "rotated_norm"):
    from maxtext_ling2.ops import fused_norm

    return getattr(fused_norm, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
