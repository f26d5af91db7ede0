"""The grouped RMSNorm and the gate on the output of linear attention."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class GatedGroupRMSNorm(nnx.Module):
  """RMSNorm in which each of `num_groups` equal groups of the last axis has its own mean square, then a sigmoid gate.

  One scale per feature. Computed in float32 and rounded once, to `dtype`. `num_groups = 1` is a plain RMSNorm. (Source:
  BailingMoeV2_5; its `group_norm_size` is this number of groups.)
  """

  def __init__(
    self, num_features: int, num_groups: int, epsilon: float, dtype: Any, weight_dtype: Any, kernel_axes: tuple[str, ...]
  ):
    if num_features % num_groups:
      raise ValueError(f"GatedGroupRMSNorm: num_groups={num_groups} does not divide num_features={num_features}")
    self.num_groups = num_groups
    self.epsilon = epsilon
    self.dtype = dtype
    self.scale = nnx.Param(jnp.ones((num_features,), weight_dtype), out_sharding=kernel_axes)

  def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
    """Normalises x [..., num_features] and multiplies it by sigmoid(gate), of the same shape; returns `dtype`."""
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], self.num_groups, -1)
    mean_square = jnp.mean(jnp.square(groups), axis=-1, keepdims=True)
    y = (groups * jax.lax.rsqrt(mean_square + self.epsilon)).reshape(x.shape)
    return (y * self.scale[...].astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(self.dtype)
