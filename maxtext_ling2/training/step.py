"""MaxText's train and eval step for LING2: z-loss in the objective, loss-free balancing after it, more metrics."""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext_ling2.host.step_globals import patched_globals
from maxtext_ling2.model.cross_entropy import cross_entropy_with_logits
from maxtext_ling2.model.moe import weighs_microbatches
from maxtext_ling2.model.precision import matmul_precision
from maxtext_ling2.training import metrics as step_metrics
from maxtext_ling2.training import objective, qk_clip, statistics
from maxtext_ling2.training.balancing import bias_axis, updated_bias
from maxtext_ling2.training.statistics import RouterStatistics

Step = Callable[..., Any]


def wrap_train_step(train_step: Step, config: Any) -> Step:
  """MaxText's `train_step` for a LING2 run: z-loss in the objective, router biases updated after it, more metrics."""

  @functools.wraps(train_step)
  def ling2_train_step(
    model: Any, cfg: Any, state_shardings: Any, params_shardings: Any, state: Any, data: Any, dropout_rng: Any = None
  ) -> tuple[Any, dict[str, Any]]:
    graph, state = statistics.attach(model, state, config)
    totals = objective.count_totals(data, config) if config.gradient_accumulation_steps > 1 else None
    replaced = _replaced_by_switch(config) | _replaced_in_losses(config, totals, {})
    # The gradients of experts are traced here, outside their layer.
    with patched_globals(train_step, **replaced), matmul_precision(config):
      state, metrics = train_step(graph, cfg, state_shardings, params_shardings, state, data, dropout_rng)
    state, router_sums = statistics.detach(state)
    routers = [_with_means(router, totals, data, config) for router in router_sums]
    scalars = metrics["scalar"]
    skipped = scalars.get("optim/step_skipped")
    if config.use_qk_clip:
      state, scalars["learning/max_logits"] = qk_clip.clip(state, config, skipped)
      if "learning/param_norm" in scalars:
        scalars["learning/param_norm"] = qk_clip.parameter_norm(state)
    unbalanced = state
    state = _balance(state, routers, config, skipped)
    if config.log_step_diagnostics:
      scalars.update(_bias_diagnostics(unbalanced, state, routers))
    scalars.update(_router_metrics(state, routers, config))
    if config.mtp_num_layers and config.mtp_loss_scaling_factor:  # as Megatron logs it, before its weight
      scalars["learning/raw_mtp_loss"] = scalars["learning/mtp_loss"] / config.mtp_loss_scaling_factor
    _separate_z_loss(scalars, routers, config)
    scalars.update(step_metrics.not_finite(scalars))
    return state, metrics

  return ling2_train_step


def wrap_eval_step(eval_step: Step, config: Any) -> Step:
  """MaxText's `eval_step` for a LING2 run, with the z-loss and the MTP loss before their weights in its metrics."""

  @functools.wraps(eval_step)
  def ling2_eval_step(*args: Any, **kwargs: Any) -> dict[str, Any]:
    eval_metrics: dict[str, jax.Array] = {}
    replaced = _replaced_in_losses(config, None, eval_metrics)
    with patched_globals(eval_step, **replaced), matmul_precision(config):
      metrics: dict[str, Any] = eval_step(*args, **kwargs)
    metrics["scalar"].update({f"evaluation/{name}": value for name, value in eval_metrics.items()})
    return metrics

  return ling2_eval_step


def _replaced_in_losses(
  config: Any, totals: objective.Totals | None, eval_metrics: dict[str, jax.Array]
) -> dict[str, Callable[[Any], Any]]:
  """What every LING2 step finds replaced: global name -> wrapper. Arguments: those of `objective.with_router_losses`."""
  return {
    "loss_fn": lambda loss_fn: objective.with_router_losses(loss_fn, config, totals, eval_metrics),
    "max_utils": lambda module: types.SimpleNamespace(
      **vars(module) | {"cross_entropy_with_logits": cross_entropy_with_logits}
    ),
  }


def _replaced_by_switch(config: Any) -> dict[str, Callable[[Any], Any]]:
  """What else MaxText's train step calls and must find replaced: global name -> wrapper."""
  replaced: dict[str, Callable[[Any], Any]] = {}
  if config.use_qk_clip:  # `qk_clip` does afterwards what MaxText's cannot do for LING2
    replaced["qk_clip_utils"] = lambda _: qk_clip.NOT_MAXTEXTS
  if config.log_step_diagnostics:  # count the zeros of the gradient, too
    replaced["step_diagnostics"] = step_metrics.with_zeros
  return replaced


def _with_means(router: RouterStatistics, totals: objective.Totals | None, data: Any, config: Any) -> RouterStatistics:
  """The statistics of a router with means over the batch in place of sums over microbatches and tokens."""
  if router.scores is not None:
    tokens = (totals or objective.count_totals(data, config)).valid_tokens
    router = dataclasses.replace(router, scores=router.scores / jnp.maximum(tokens, 1))
  if router.z_loss is None:
    return router
  if totals is not None and weighs_microbatches(config):
    divisor = jnp.maximum(totals.valid_tokens, 1)
  else:
    divisor = config.gradient_accumulation_steps
  return dataclasses.replace(router, z_loss=router.z_loss / divisor)


def _balance(state: Any, routers: list[RouterStatistics], config: Any, skipped: jax.Array | None) -> Any:
  """Updates every router bias by its counts, unless the optimizer skipped the step."""
  if not config.routed_bias or config.routed_bias_update_rate == 0.0:
    return state
  flat = dict(nnx.to_flat_state(state))
  for router in routers:
    path = (*router.path, "bias")
    bias = flat[path].get_value()
    axis = bias_axis(config, router.counts.ndim - 1)
    updated = updated_bias(
      jnp.moveaxis(bias, axis, -1), router.counts, config.routed_bias_update_rate, config.routed_bias_zero_mean_update
    )  # [..., E]
    updated = jnp.moveaxis(updated, -1, axis)
    flat[path] = flat[path].replace(updated if skipped is None else jnp.where(skipped > 0, bias, updated))
  return nnx.from_flat_state(list(flat.items()))


def _bias_diagnostics(before: Any, after: Any, routers: list[RouterStatistics]) -> dict[str, jax.Array]:
  """The router biases' part of MaxText's `step_diagnostics`, which looks for them at other paths than LING2's."""
  old, new = (dict(nnx.to_flat_state(state)) for state in (before, after))
  paths = [path for router in routers if (path := (*router.path, "bias")) in new]
  values = [[state[path].get_value().astype(jnp.float32) for path in paths] for state in (old, new)]
  zero = jnp.zeros((), jnp.float32)
  return {
    "diag/moe_bias_checksum": sum((jnp.sum(value) for value in values[1]), zero),
    "diag/moe_bias_update_nonzero": sum(
      (jnp.sum(a != b).astype(jnp.float32) for a, b in zip(*values, strict=True)), zero
    ),
  }


def _router_metrics(state: Any, routers: list[RouterStatistics], config: Any) -> dict[str, jax.Array]:
  """The metrics of all routers, with their biases after the step."""
  flat = dict(nnx.to_flat_state(state))
  biases: list[jax.Array | None] = [None] * len(routers)
  if config.routed_bias:
    biases = [_bias(flat, router, config) for router in routers]
  return step_metrics.of_routers(routers, biases, config)


def _bias(flat: Any, router: RouterStatistics, config: Any) -> jax.Array:
  """The bias of a router, or of a stack of them, [..., E]."""
  axis = bias_axis(config, router.counts.ndim - 1)
  return jnp.moveaxis(flat[(*router.path, "bias")].get_value(), axis, -1)


def _separate_z_loss(scalars: dict[str, Any], routers: list[RouterStatistics], config: Any) -> None:
  """Subtracts the z-loss from the load-balance metric, in which `objective` put it to be part of the reported loss."""
  if config.gradient_accumulation_steps == 1 or config.moe_z_loss_weight == 0.0:
    return
  if config.load_balance_loss_weight == 0.0:
    scalars["learning/moe_lb_loss"] = jnp.zeros((), jnp.float32)
    return
  z_loss = sum(jnp.sum(router.z_loss) for router in routers if router.z_loss is not None)
  scalars["learning/moe_lb_loss"] -= config.moe_z_loss_weight * z_loss
