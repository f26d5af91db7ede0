"""Loss-free load balancing: after each step the router biases move towards the experts that got too few tokens.

    bias += rate * sign(mean(counts) - counts);   bias -= mean(bias)  with routed_bias_zero_mean_update

Counts are those of the whole global batch. (Wang et al. 2024, arXiv 2408.15664; Megatron's `get_updated_expert_bias`; the
recentring is Megatron's option that the RFC names routed_bias_zero_mean_update.)
"""

from typing import Any

import jax
import jax.numpy as jnp


def updated_bias(bias: jax.Array, counts: jax.Array, rate: float, zero_mean: bool) -> jax.Array:
  """The bias after one step, float32 inside.

  Args:
    bias: [..., E], any float dtype.
    counts: [..., E] int32, tokens sent to each expert.
    rate: step of the bias.
    zero_mean: whether the bias is recentred to mean 0 over the experts.

  Returns:
    [..., E] in the dtype of `bias`.
  """
  moved = bias.astype(jnp.float32) + rate * _below_mean(counts).astype(jnp.float32)
  if zero_mean:
    moved -= jnp.mean(moved, axis=-1, keepdims=True)
  return moved.astype(bias.dtype)


def _below_mean(counts: jax.Array) -> jax.Array:
  """sign(mean(counts) - counts), [..., E] int32, exact for any counts and up to 2^15 experts.

  Their sum, and E times a count, may be larger than int32 holds: both are compared as (high, low) with 16 bits in low.
  """
  experts = counts.shape[-1]
  high, low = counts >> 16, counts & 0xFFFF

  def parts(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    return high + (low >> 16), low & 0xFFFF

  total_high, total_low = parts(*(jnp.sum(x, axis=-1, keepdims=True) for x in (high, low)))
  own_high, own_low = parts(experts * high, experts * low)
  of_high = jnp.sign(total_high - own_high)
  return jnp.where(of_high == 0, jnp.sign(total_low - own_low), of_high)


def load_metrics(counts: jax.Array) -> dict[str, jax.Array]:
  """How evenly a step used the experts.

  Args:
    counts: [..., E] integer.

  Returns:
    "max_over_mean_load": [...] load of the fullest expert over the mean load, 1 at best; "dead_expert_fraction": [...]
    share of experts without a token.
  """
  loads = counts.astype(jnp.float32)
  mean = jnp.maximum(jnp.mean(loads, axis=-1), 1e-9)
  return {
    "max_over_mean_load": jnp.max(loads, axis=-1) / mean,
    "dead_expert_fraction": jnp.mean((counts == 0).astype(jnp.float32), axis=-1),
  }


def bias_axis(config: Any, stacked: int) -> int:
  """Where the expert axis of a bias with `stacked` axes of layers stands.

  MaxText stacks parameters on param_scan_axis, so that axis 0 stays the experts', and other variables on axis 0.
  """
  return 0 if stacked and config.enable_routed_bias_grad and config.param_scan_axis > 0 else -1
