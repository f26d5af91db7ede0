"""Scalar metrics of a training step beyond MaxText's; docs/names.md lists them with Megatron-LM's names.

Always on, since they cost nothing: whether loss or gradient is NaN or infinite; mean and standard deviation of the router
biases. The others need settings of MaxText:

  log_step_diagnostics             number of zeros in the gradient;
  record_internal_nn_metrics >= 1  statistics of the router scores, for which experts are chosen a second time;
  record_internal_nn_metrics >= 2  tokens per expert and layer.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maxtext_ling2.model.layer_layout import layer_names
from maxtext_ling2.training.balancing import load_metrics
from maxtext_ling2.training.statistics import RouterStatistics

Diagnostics = Callable[..., dict[str, jax.Array]]

ZEROS = "learning/num_zeros_in_grad"
_SCORES = ("router_topk_weight_mean", "router_probs_std")
_MEANS = {"z_loss": "learning/moe_z_loss"}
_MEANS |= {kind: f"learning/{kind}" for kind in ("router_bias_mean", "router_bias_std", *_SCORES)}
"""Per-layer metric -> name under which its mean over all routers is logged, too."""


def with_zeros(step_diagnostics: Diagnostics) -> Diagnostics:
  """MaxText's `step_diagnostics` with the number of zeros in the gradient, before it is clipped."""

  @functools.wraps(step_diagnostics)
  def diagnostics(raw_grads: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
    return step_diagnostics(raw_grads, *args, **kwargs) | {ZEROS: zeros_in(raw_grads)}

  return diagnostics


def zeros_in(gradient: Any) -> jax.Array:
  """The number of elements of a gradient that are exactly 0, [] float32.

  Exact up to 2^24, rounded to 24 bits above; in float32 because a stack of expert weights has more elements than int32
  can count. For arrays of at most 2^19 rows with fewer than 2^31 elements each.
  """
  leaves = [leaf for leaf in jax.tree.leaves(gradient) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  return sum((_zeros(leaf) for leaf in leaves), jnp.zeros((), jnp.float32))


def _zeros(x: jax.Array) -> jax.Array:
  per_row = jnp.sum(jnp.atleast_1d(x) == 0, axis=tuple(range(1, x.ndim)), dtype=jnp.int32)  # [rows]
  high, low = (jnp.sum(part).astype(jnp.float32) for part in (per_row >> 12, per_row & 0xFFF))
  return high * 2**12 + low


def not_finite(scalars: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """1.0 if the loss or the gradient's norm is NaN, and 1.0 if one is infinite, else 0.0; [] float32 each.

  With optimizer_memory_host_offload and without log_step_diagnostics MaxText has no norm; then they are about the loss.
  """
  names = [name for name in ("learning/loss", "learning/raw_grad_norm") if name in scalars]
  values = jnp.stack([scalars[name].astype(jnp.float32) for name in names])
  return {
    "learning/is_nan": jnp.any(jnp.isnan(values)).astype(jnp.float32),
    "learning/is_inf": jnp.any(jnp.isinf(values)).astype(jnp.float32),
  }


def of_routers(
  routers: Sequence[RouterStatistics], biases: Sequence[jax.Array | None], config: Any
) -> dict[str, jax.Array]:
  """The metrics of all routers, under `learning/`.

  Args:
    routers: statistics, as means over the batch.
    biases: [..., E] of each router after the step, or None.
    config: MaxText config.
  """
  metrics: dict[str, jax.Array] = {}
  values = [_of_router(router, bias) for router, bias in zip(routers, biases, strict=True)]
  for router, kinds in zip(routers, values, strict=True):
    names = layer_names(router.path, config)
    for kind, value in kinds.items():
      metrics |= {f"learning/moe/{kind}/{name}": v for name, v in zip(names, jnp.ravel(value), strict=True)}
    if config.record_internal_nn_metrics >= 2:
      metrics |= _counts(router.counts, names)
  for kind, name in _MEANS.items():
    if per_layer := [jnp.ravel(kinds[kind]) for kinds in values if kind in kinds]:
      metrics[name] = jnp.mean(jnp.concatenate(per_layer))
  return metrics


def _of_router(router: RouterStatistics, bias: jax.Array | None) -> dict[str, jax.Array]:
  """{metric: [...]} of one router, or of a stack of them."""
  values = load_metrics(router.counts)
  if bias is not None:
    bias = bias.astype(jnp.float32)
    values["bias_norm"] = jnp.linalg.norm(bias, axis=-1)
    values |= {"router_bias_mean": jnp.mean(bias, axis=-1), "router_bias_std": jnp.std(bias, axis=-1)}
  if router.z_loss is not None:
    values["z_loss"] = router.z_loss
  if router.scores is not None:
    values |= {kind: router.scores[..., index] for index, kind in enumerate(_SCORES)}
  return values


def _counts(counts: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
  """One metric per layer and expert from counts [..., E]."""
  per_layer = counts.reshape(-1, counts.shape[-1])  # [layers, E]
  return {
    f"learning/moe/expert_counts/{name}/expert_{index:03d}": count
    for name, layer_counts in zip(names, per_layer, strict=True)
    for index, count in enumerate(layer_counts)
  }
