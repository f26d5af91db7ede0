"""Multi-token prediction as the released weights expect it.

MaxText's block differs in what LING2's checkpoints see: it feeds the hidden state before the final norm, hands the next
depth an un-normalised state, and averages over the tokens of all depths at once. Parameters are MaxText's, so their names
are too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from maxtext.layers import multi_token_prediction as stock
from maxtext.utils import sharding
from maxtext.utils.globals import EPS

_LOGITS_AXES = ("activation_embed_and_logits_batch", "activation_length", "activation_vocab")


class Ling2MultiTokenPredictionBlock(stock.MultiTokenPredictionBlock):
  """Depth k predicts token t + k + 1 from the previous depth's output and the embedding of token t + k.

  Depth 1 gets the main stack's hidden state after the final norm, depth k the normalised output of depth k - 1. Documents
  packed into a row never see each other: where the next token belongs to another document, token id 0 is embedded and
  the target is masked, as at the end of a row.
  """

  def __call__(
    self,
    shared_embedding: Any,
    main_hidden_state: jax.Array,
    input_ids: jax.Array,
    target_ids: jax.Array | None,
    target_mask: jax.Array | None,
    *,
    position_ids: jax.Array,
    decoder_segment_ids: jax.Array | None,
    model_mode: str,
    deterministic: bool,
    main_token_embeddings: jax.Array | None = None,
  ) -> dict[str, Any]:
    """Runs all depths and leaves their losses where MaxText's loss looks for them.

    Args: as MaxText's block: hidden state [B, T, C] before the final norm, ids [B, T], mask [B, T] (0: not scored, any
      other number, such as a segment id: scored).

    Returns:
      {}; the losses are variables of this module: per depth the mean over its scored tokens, which MaxText then averages.
    """
    del main_token_embeddings
    hidden = self.decoder.decoder_norm(main_hidden_state)
    ids = input_ids
    targets = jnp.ones_like(input_ids) if target_ids is None else target_ids
    scored = jnp.ones_like(input_ids) if target_mask is None else (jnp.asarray(target_mask) != 0).astype(jnp.int32)
    losses, predictions, masks = [], [], []
    for depth in range(1, self.config.mtp_num_layers + 1):
      ids, targets, scored = (stock.roll_and_mask_by_segment(x, decoder_segment_ids) for x in (ids, targets, scored))
      embedded = self.decoder._apply_embedding(shared_embedding, ids, position_ids, deterministic, model_mode=model_mode)
      layer = getattr(self, f"mtp_layer_{depth}")
      output = layer(
        prev_hidden_state=hidden,
        target_token_embedding=embedded,
        position_ids=position_ids,
        decoder_segment_ids=decoder_segment_ids,
        deterministic=deterministic,
        model_mode=model_mode,
      )
      hidden = layer.final_norm(output)
      logits = self._logits(shared_embedding, hidden, deterministic, model_mode)
      losses.append(_mean_loss(logits, targets, scored))
      if self.config.mtp_eval_target_module == depth:
        predictions.append(jnp.argmax(logits, axis=-1).astype(jnp.float32))  # float, as MaxText's loss differentiates it
        masks.append(scored)
    self._publish(losses, predictions, masks, model_mode)
    return {}

  def _logits(self, shared_embedding: Any, hidden: jax.Array, deterministic: bool, model_mode: str) -> jax.Array:
    logits = self.decoder.apply_output_head(shared_embedding, hidden, deterministic, model_mode, normalize_y=False)
    return sharding.maybe_shard_with_logical(
      logits, _LOGITS_AXES, self.mesh, self.config.shard_mode, debug_sharding=self.config.debug_sharding
    )

  def _publish(self, losses: list[jax.Array], predictions: list[jax.Array], masks: list[jax.Array], mode: str) -> None:
    """Sets the variables that MaxText reads: its MTP loss is sum(losses) / sum(weights) * mtp_loss_scaling_factor."""
    if mode == "train" and losses:
      self.losses = stock.mtp_losses(jnp.stack(losses))
      self.weights = stock.mtp_losses(jnp.ones((len(losses),), jnp.float32))
    if predictions:
      self.mtp_preds = stock.mtp_acceptance(jnp.stack(predictions))
      self.mtp_mask = stock.mtp_acceptance(jnp.stack(masks))


def _mean_loss(logits: jax.Array, targets: jax.Array, scored: jax.Array) -> jax.Array:
  """Mean cross entropy over the scored tokens, 0 where there is none."""
  losses = stock._cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
  return jnp.sum(losses * scored) / (jnp.sum(scored) + EPS)
