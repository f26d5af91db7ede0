"""The grouped RMSNorm and the gate on the output of linear attention."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext_ling2.model.sharded_gla import sharded_gated_norm


class GatedGroupRMSNorm(nnx.Module):
  """`ops.fused_norm.grouped_rms_norm_gated` with its scale, one value per feature."""

  def __init__(self, num_features: int, num_groups: int, epsilon: float, weight_dtype: Any, kernel_axes: tuple[str, ...]):
    if num_features % num_groups:
      raise ValueError(f"GatedGroupRMSNorm: num_groups={num_groups} does not divide num_features={num_features}")
    self.num_groups = num_groups
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones((num_features,), weight_dtype), out_sharding=kernel_axes)

  def __call__(self, x: jax.Array, gate: jax.Array, *, mesh: jax.sharding.Mesh, heads: int, backend: str) -> jax.Array:
    """Normalises x [B, T, num_features] and multiplies it by sigmoid(gate), of the same shape; returns gate's dtype."""
    return sharded_gated_norm(
      x, gate, self.scale[...], groups=self.num_groups, epsilon=self.epsilon, mesh=mesh, heads=heads, backend=backend
    )
