"""DiLoCo's step for LING2: MaxText synchronises parameters, but router biases are not parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.layers.moe import MoEBiasVar

Step = Callable[..., Any]


def with_equal_biases(step: Step, config: Any) -> Step:
  """MaxText's DiLoCo step, which then averages the router biases over the replicas at each synchronisation.

  Between synchronisations each replica balances by the counts of its own tokens.

  Args:
    step: takes (state, batch, key) and returns (state, metrics).
    config: MaxText config.
  """

  def diloco_train_step(state: Any, batch: Any, prng: Any) -> tuple[Any, Any]:
    state, metrics = step(state, batch, prng)
    synchronised = state.step % config.diloco_sync_period == 0
    inner_state = jax.lax.cond(synchronised, _averaged, lambda inner: inner, state.inner_state)
    return state.replace(inner_state=inner_state), metrics

  return diloco_train_step


def _averaged(inner_state: Any) -> Any:
  """The state of all replicas, arrays [replicas, ...], with router biases averaged over the replicas."""

  def mean(variable: Any) -> Any:
    if not isinstance(variable, MoEBiasVar):
      return variable
    bias = variable.get_value()  # [replicas, ..., E]
    average = jnp.mean(bias.astype(jnp.float32), axis=0, keepdims=True).astype(bias.dtype)
    return variable.replace(jnp.broadcast_to(average, bias.shape))

  return jax.tree.map(mean, inner_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
