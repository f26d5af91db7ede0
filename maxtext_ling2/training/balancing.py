"""Loss-free load balancing: after each step the bias of experts with too few tokens rises, that of others falls.

    bias += rate * sign(mean(counts) - counts);   bias -= mean(bias)  with routed_bias_zero_mean_update

Counts are those of the global batch. Sources: Wang et al. 2024, arXiv 2408.15664; Megatron's `get_updated_expert_bias`,
which has the recentring as an option.
"""

from typing import Any

import jax
import jax.numpy as jnp


def updated_bias(bias: jax.Array, counts: jax.Array, rate: float, zero_mean: bool) -> jax.Array:
  """The bias after one step, computed in float32.

  Args:
    bias: [..., E], any float dtype.
    counts: [..., E] int32, tokens sent to each expert.
    rate: size of the update.
    zero_mean: whether the bias is recentred to mean 0 over the experts.

  Returns:
    [..., E] in the dtype of `bias`.
  """
  updated = bias.astype(jnp.float32) + rate * _below_mean(counts).astype(jnp.float32)
  if zero_mean:
    updated -= jnp.mean(updated, axis=-1, keepdims=True)
  return updated.astype(bias.dtype)


def _below_mean(counts: jax.Array) -> jax.Array:
  """sign(mean(counts) - counts), [..., E] int32, exact for any counts and up to 2^15 experts.

  It is sign(sum(counts) - E * counts). Both may exceed int32, so they are compared as (high, low) with 16 bits in low.
  """
  experts = counts.shape[-1]
  high, low = counts >> 16, counts & 0xFFFF

  def carried(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    return high + (low >> 16), low & 0xFFFF

  sum_high, sum_low = carried(*(jnp.sum(x, axis=-1, keepdims=True) for x in (high, low)))  # [..., 1]
  own_high, own_low = carried(experts * high, experts * low)  # [..., E]
  sign_high = jnp.sign(sum_high - own_high)
  return jnp.where(sign_high == 0, jnp.sign(sum_low - own_low), sign_high)


def load_metrics(counts: jax.Array) -> dict[str, jax.Array]:
  """How evenly a step used the experts.

  Args:
    counts: [..., E] integer.

  Returns:
    "max_over_mean_load": [...] largest load over the mean load, 1 at best; "dead_expert_fraction": [...] fraction of
    experts without a token.
  """
  loads = counts.astype(jnp.float32)
  mean = jnp.maximum(jnp.mean(loads, axis=-1), 1e-9)
  return {
    "max_over_mean_load": jnp.max(loads, axis=-1) / mean,
    "dead_expert_fraction": jnp.mean((counts == 0).astype(jnp.float32), axis=-1),
  }


def bias_axis(config: Any, stacked: int) -> int:
  """The expert axis of a bias with `stacked` axes of layers.

  MaxText stacks parameters on param_scan_axis, so that 0 remains the expert axis, and other variables on axis 0.
  """
  return 0 if stacked and config.enable_routed_bias_grad and config.param_scan_axis > 0 else -1
