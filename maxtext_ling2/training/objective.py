"""The objective of a LING2 step: MaxText's loss plus the router z-loss, averaged over microbatches as configured.

MaxText's gradient accumulation sums the microbatches' objectives L_m and divides the sum of their gradients by D, the
loss tokens of the global batch; it reports sum(xent_m) / D + mean(auxiliary_m). The terms L_m here are chosen so that

  calculate_per_token_loss = True   gives the objective of the undivided batch: cross entropy over all loss tokens, MTP's
                                    over all of MTP's loss tokens, the z-loss over all valid tokens;
  calculate_per_token_loss = False  gives Megatron's: the mean of the microbatches' means.

Loss tokens are those of the loss mask; valid tokens are those that are not padding.
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
from maxtext_ling2.model.layer_layout import layer_names
from maxtext_ling2.model.moe import Z_LOSS_NAME, weighs_microbatches
from maxtext_ling2.model.mtp import loss_masks
from maxtext_ling2.training.statistics import collect

LossFn = Callable[..., tuple[jax.Array, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Totals:
  """Numbers of tokens in the global batch, counted before the microbatches are computed.

  Attributes:
    loss_tokens: tokens of the loss mask, [] int32.
    mtp_loss_tokens: those of each MTP depth's loss mask, [K] int32.
    valid_tokens: tokens that are not padding, [] int32.
  """

  loss_tokens: jax.Array
  mtp_loss_tokens: jax.Array
  valid_tokens: jax.Array


def count_totals(data: dict[str, jax.Array], config: Any) -> Totals:
  """Counts the tokens of a global batch; `data` holds arrays [B, T], as for MaxText's step."""
  names = ("inputs", "inputs_segmentation", "targets_segmentation")
  ids, segments, target_segments = (_used_sequences(data[name], config) for name in names)  # [B', T]
  mtp_masks = loss_masks((target_segments != 0).astype(jnp.int32), ids, segments, config)
  mtp_loss_tokens = jnp.asarray([jnp.sum(mask) for mask in mtp_masks], jnp.int32)  # [K]
  return Totals(jnp.sum(target_segments != 0), mtp_loss_tokens, jnp.sum(segments != 0))


def _used_sequences(x: jax.Array, config: Any) -> jax.Array:
  """The sequences [B', T] of x [B, T] in the loss; with per_device_batch_size < 1 MaxText loads more than those."""
  steps = config.gradient_accumulation_steps
  microbatches = jnp.swapaxes(x.reshape(x.shape[0] // steps, steps, *x.shape[1:]), 0, 1)  # [steps, B / steps, T]
  return microbatches[:, : config.micro_batch_size_to_train_on].reshape(-1, *x.shape[1:])  # [B', T]


def with_router_losses(loss_fn: LossFn, config: Any, totals: Totals | None, eval_metrics: dict[str, jax.Array]) -> LossFn:
  """MaxText's loss function with LING2's terms.

  Args:
    loss_fn: MaxText's `loss_fn`.
    config: MaxText config.
    totals: numbers of tokens in the global batch with gradient accumulation, else None.
    eval_metrics: a dict to which an evaluation adds "moe_z_loss", the z-loss before its weight (mean over layers), and
      "raw_mtp_loss", MTP's loss before its weight; MaxText's eval step returns neither.
  """
  signature = inspect.signature(loss_fn)

  @functools.wraps(loss_fn)
  def ling2_loss_fn(*args: Any, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
    loss, aux = loss_fn(*args, **kwargs)
    if config.record_internal_nn_metrics:
      aux["intermediate_outputs"]["activations"] = _activations(aux["intermediate_outputs"], config)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    z_losses = [jnp.ravel(z) for z in collect(aux["intermediate_outputs"], Z_LOSS_NAME)]  # [layers of the leaf] each
    z_loss = jnp.sum(jnp.concatenate(z_losses)) * config.moe_z_loss_weight if z_losses else 0.0
    if not bound.arguments["is_train"]:
      if z_losses:
        eval_metrics["moe_z_loss"] = jnp.mean(jnp.concatenate(z_losses))
      if mtp := aux["intermediate_outputs"].get("mtp_losses"):
        losses, weights = (mtp["mtp_block"][name] for name in ("losses", "weights"))  # [K] each
        eval_metrics["raw_mtp_loss"] = jnp.sum(losses) / jnp.sum(weights)
      return loss, aux
    if totals is None:
      return loss + z_loss, aux
    if weighs_microbatches(config):
      segments = bound.arguments["data"]["inputs_segmentation"][: config.micro_batch_size_to_train_on]
      z_loss *= jnp.sum(segments != 0) / jnp.maximum(totals.valid_tokens, 1) * config.gradient_accumulation_steps
    return _accumulated(aux, z_loss, totals, config)

  return ling2_loss_fn


def _activations(outputs: Any, config: Any) -> dict[str, jax.Array]:
  """The statistics that layers have sown, under MaxText's names, [layers of the decoder] each.

  MaxText takes all arrays under these names in the order of their paths, and sums them over microbatches.
  """
  by_name: dict[str, dict[str, jax.Array]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
    keys = [key.key for key in path if hasattr(key, "key")]
    if str(keys[-1]).startswith(ACTIVATIONS):
      values = dict(zip(layer_names(tuple(keys), config), jnp.ravel(leaf), strict=True))
      by_name.setdefault(keys[-1].removeprefix(ACTIVATIONS), {}).update(values)
  layers = [f"layer_{index:03d}" for index in range(config.num_decoder_layers)]
  return {
    name: jnp.stack([values[layer] for layer in layers]) / config.gradient_accumulation_steps
    for name, values in by_name.items()
  }


def _accumulated(aux: dict[str, Any], z_loss: Any, totals: Totals, config: Any) -> tuple[jax.Array, dict[str, Any]]:
  """A microbatch's objective, [] float32, and its auxiliary outputs, in the form that MaxText's accumulation expects."""
  steps = config.gradient_accumulation_steps
  divisor = jnp.maximum(totals.loss_tokens, 1).astype(jnp.float32)
  tokens = aux["total_weights"].astype(jnp.float32)
  aux = dict(aux)
  if config.calculate_per_token_loss:
    aux["mtp_loss"] = _mtp_over_all_tokens(aux, totals, config) * steps
  else:
    aux["xent_sum"] = aux["xent_sum"] / (tokens + EPS) * divisor / steps
  # The load-balance loss is a mean over sequences: that of the undivided batch is the mean of the microbatches' losses.
  aux["moe_lb_loss"] += z_loss  # so that MaxText's reported loss includes it; `_separate_z_loss` corrects the metric
  loss = aux["xent_sum"] + (aux["mtp_loss"] + aux["moe_lb_loss"]) * divisor / steps
  return loss, aux


def _mtp_over_all_tokens(aux: dict[str, Any], totals: Totals, config: Any) -> Any:
  """This microbatch's part of the MTP loss: its losses over the loss tokens of all microbatches, mean over depths."""
  if not config.mtp_num_layers:
    return 0.0
  sums = aux["intermediate_outputs"]["mtp_losses"]["mtp_block"]["token_sums"]  # [K]
  return config.mtp_loss_scaling_factor * jnp.mean(sums / jnp.maximum(totals.mtp_loss_tokens, 1))
