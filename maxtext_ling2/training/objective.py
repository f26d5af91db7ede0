"""The objective of a LING2 step: MaxText's loss plus the router z-loss, averaged over microbatches as configured.

MaxText's own accumulation sums the microbatches' objectives L_m and divides the sum of their gradients by D, the tokens
of the whole global batch; it reports sum(xent_m) / D + mean(auxiliary_m). Both follow from the terms chosen here, for

  calculate_per_token_loss = True   the objective of one undivided batch: token losses over all tokens, MTP's over all of
                                    MTP's tokens, the z-loss over all tokens that are no padding;
  calculate_per_token_loss = False  Megatron's: the mean of the microbatches' own means.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from maxtext.utils.globals import EPS

from maxtext_ling2.model.layer import ACTIVATIONS
from maxtext_ling2.model.layout import layer_names
from maxtext_ling2.model.moe import Z_LOSS_NAME, weighs_microbatches
from maxtext_ling2.model.mtp import scored_tokens
from maxtext_ling2.training.statistics import collect

LossFn = Callable[..., tuple[jax.Array, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Totals:
  """Numbers of scored tokens in the whole global batch, known before the microbatches are gone through.

  Attributes:
    tokens: scored tokens, [] int32.
    mtp_tokens: the same for each MTP depth, [K] int32.
    real: tokens that are no padding, scored or not, [] int32.
  """

  tokens: jax.Array
  mtp_tokens: jax.Array
  real: jax.Array


def totals(data: dict[str, jax.Array], config: Any) -> Totals:
  """Counts what the microbatches of a global batch will score. `data` holds arrays [B, T], as for MaxText's step."""
  names = ("inputs", "inputs_segmentation", "targets_segmentation")
  ids, segments, scored = (_used_rows(data[name], config) for name in names)
  depths = scored_tokens((scored != 0).astype(jnp.int32), ids, segments, config)
  mtp_tokens = jnp.asarray([jnp.sum(depth) for depth in depths], jnp.int32)
  return Totals(jnp.sum(scored != 0), mtp_tokens, jnp.sum(segments != 0))


def _used_rows(x: jax.Array, config: Any) -> jax.Array:
  """The rows [B', T] that the loss looks at; with less than one row a device, MaxText loads more than it uses."""
  steps = config.gradient_accumulation_steps
  microbatches = jnp.swapaxes(x.reshape(x.shape[0] // steps, steps, *x.shape[1:]), 0, 1)
  return microbatches[:, : config.micro_batch_size_to_train_on].reshape(-1, *x.shape[1:])


def with_router_losses(loss_fn: LossFn, config: Any, total: Totals | None, seen: dict[str, jax.Array]) -> LossFn:
  """MaxText's loss function with LING2's terms.

  Args:
    loss_fn: MaxText's `loss_fn`.
    config: MaxText config.
    total: token numbers of the global batch where gradients are accumulated, else None.
    seen: gets, of an evaluation, "moe_z_loss", the raw z-loss (mean over layers), and "raw_mtp_loss", MTP's before its
      weight, which MaxText leaves out there.
  """
  signature = inspect.signature(loss_fn)

  @functools.wraps(loss_fn)
  def ling2_loss_fn(*args: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
    loss, aux = loss_fn(*args, **kwargs)
    if config.record_internal_nn_metrics:
      aux["intermediate_outputs"]["activations"] = _activations(aux["intermediate_outputs"], config)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    z_losses = [jnp.ravel(z) for z in collect(aux["intermediate_outputs"], Z_LOSS_NAME)]
    z_loss = jnp.sum(jnp.concatenate(z_losses)) * config.moe_z_loss_weight if z_losses else 0.0
    if not bound.arguments["is_train"]:
      if z_losses:
        seen["moe_z_loss"] = jnp.mean(jnp.concatenate(z_losses))
      if mtp := aux["intermediate_outputs"].get("mtp_losses"):
        losses, weights = (mtp["mtp_block"][name] for name in ("losses", "weights"))
        seen["raw_mtp_loss"] = jnp.sum(losses) / jnp.sum(weights)
      return loss, aux
    if total is None:
      return loss + z_loss, aux
    if weighs_microbatches(config):
      segments = bound.arguments["data"]["inputs_segmentation"][: config.micro_batch_size_to_train_on]
      z_loss *= jnp.sum(segments != 0) / jnp.maximum(total.real, 1) * config.gradient_accumulation_steps
    return _accumulated(aux, z_loss, total, config)

  return ling2_loss_fn


def _activations(outputs: Any, config: Any) -> dict[str, jax.Array]:
  """The statistics that layers sowed, under the names that MaxText looks for, [layers of the decoder] each.

  MaxText takes whatever it finds in the order of the paths, and adds it up over microbatches.
  """
  found: dict[str, dict[str, jax.Array]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
    keys = [key.key for key in path if hasattr(key, "key")]
    if str(keys[-1]).startswith(ACTIVATIONS):
      values = dict(zip(layer_names(tuple(keys), config), jnp.ravel(leaf), strict=True))
      found.setdefault(keys[-1].removeprefix(ACTIVATIONS), {}).update(values)
  layers = [f"layer_{index:03d}" for index in range(config.num_decoder_layers)]
  return {
    name: jnp.stack([values[layer] for layer in layers]) / config.gradient_accumulation_steps
    for name, values in found.items()
  }


def _accumulated(aux: dict[str, Any], z_loss: Any, total: Totals, config: Any) -> tuple[jax.Array, dict[str, Any]]:
  """A microbatch's objective and its auxiliary outputs, in the form that MaxText's accumulation expects."""
  steps = config.gradient_accumulation_steps
  divisor = jnp.maximum(total.tokens, 1).astype(jnp.float32)
  tokens = aux["total_weights"].astype(jnp.float32)
  aux = dict(aux)
  if config.calculate_per_token_loss:
    aux["mtp_loss"] = _mtp_over_all_tokens(aux, total, config) * steps
  else:
    aux["xent_sum"] = aux["xent_sum"] / (tokens + EPS) * divisor / steps
  # The load-balance loss is a mean over rows, so that of the undivided batch is the mean of those of the microbatches.
  aux["moe_lb_loss"] += z_loss  # so that MaxText's reported loss has both; `_separate_z_loss` corrects the metric
  loss = aux["xent_sum"] + (aux["mtp_loss"] + aux["moe_lb_loss"]) * divisor / steps
  return loss, aux


def _mtp_over_all_tokens(aux: dict[str, Any], total: Totals, config: Any) -> Any:
  """This microbatch's share of the MTP loss: its token losses over the tokens of all microbatches, mean over depths."""
  if not config.mtp_num_layers:
    return 0.0
  sums = aux["intermediate_outputs"]["mtp_losses"]["mtp_block"]["token_sums"]
  return config.mtp_loss_scaling_factor * jnp.mean(sums / jnp.maximum(total.mtp_tokens, 1))
