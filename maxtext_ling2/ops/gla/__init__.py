"""Gated linear attention with a constant decay per head: the operation, and the decays of a LING2 layer."""

from maxtext_ling2.ops.gla.api import gla
from maxtext_ling2.ops.gla.decay import log_decay, slopes
from maxtext_ling2.ops.gla.over_ranks import gla_over_ranks
from maxtext_ling2.ops.gla.stages import gated_norm, rotated_norm
from maxtext_ling2.ops.gla.tiles import chunk_size

__all__ = ["chunk_size", "gated_norm", "gla", "gla_over_ranks", "log_decay", "rotated_norm", "slopes"]
