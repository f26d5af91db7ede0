"""Multi-token prediction as the released weights expect it.

MaxText's block differs in what LING2's checkpoints see: it feeds the hidden state before the final norm, hands the next
depth an un-normalised state, and averages over the tokens of all depths at once. Parameters are MaxText's, so their names
are too.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.common.common_types import MODEL_MODE_TRAIN
from maxtext.layers import multi_token_prediction as stock
from maxtext.utils import sharding
from maxtext.utils.globals import EPS

from maxtext_ling2.configs.documents import end_of_document

_LOGITS_AXES = ("activation_embed_and_logits_batch", "activation_length", "activation_vocab")


class Ling2MultiTokenPredictionBlock(stock.MultiTokenPredictionBlock):
  """Depth k predicts token t + k + 1 from the previous depth's output and the embedding of token t + k.

  Depth 1 gets the main stack's hidden state after the final norm, depth k the normalised output of depth k - 1. Documents
  packed into a row never see each other: where the next token belongs to another document, token id 0 is embedded and
  the target is masked, as at the end of a row.
  """

  def __init__(self, config: Any, mesh: Any, transformer_layer_module: Any, decoder: Any, rngs: nnx.Rngs):
    super().__init__(config, mesh, transformer_layer_module, decoder, rngs)
    for depth in range(1, config.mtp_num_layers + 1):
      getattr(self, f"mtp_layer_{depth}").projection_layer.matmul_precision = config.matmul_precision

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
    with jax.named_scope("mtp"):
      hidden = self.decoder.decoder_norm(main_hidden_state)
      ids = input_ids
      targets = jnp.ones_like(input_ids) if target_ids is None else target_ids
      scored = jnp.ones_like(input_ids) if target_mask is None else (jnp.asarray(target_mask) != 0).astype(jnp.int32)
      masks = scored_tokens(scored, input_ids, decoder_segment_ids, self.config)
      sums, predictions = [], []
      for depth in range(1, self.config.mtp_num_layers + 1):
        ids, targets = (stock.roll_and_mask_by_segment(x, decoder_segment_ids) for x in (ids, targets))
        embedded = self.decoder._apply_embedding(
          shared_embedding, ids, position_ids, deterministic, model_mode=model_mode
        )
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
        losses = stock._cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
        sums.append(jnp.sum(losses * masks[depth - 1]))
        predictions.append(jnp.argmax(logits, axis=-1))
      if model_mode == MODEL_MODE_TRAIN:
        self._publish_losses(jnp.stack(sums), jnp.stack([jnp.sum(mask) for mask in masks]))
      self._publish_predictions(predictions, masks)
    return {}

  def _logits(self, shared_embedding: Any, hidden: jax.Array, deterministic: bool, model_mode: str) -> jax.Array:
    logits = self.decoder.apply_output_head(shared_embedding, hidden, deterministic, model_mode, normalize_y=False)
    return sharding.maybe_shard_with_logical(
      logits, _LOGITS_AXES, self.mesh, self.config.shard_mode, debug_sharding=self.config.debug_sharding
    )

  def _publish_losses(self, sums: jax.Array, tokens: jax.Array) -> None:
    """Sets what MaxText reads: its MTP loss is sum(losses) / sum(weights) * mtp_loss_scaling_factor.

    `token_sums` [K] is for gradient accumulation, which may have to divide by the tokens of other microbatches too.
    """
    self.losses = stock.mtp_losses(sums / (tokens + EPS))
    self.weights = stock.mtp_losses(jnp.ones_like(sums))
    self.token_sums = stock.mtp_losses(sums)

  def _publish_predictions(self, predictions: list[jax.Array], masks: list[jax.Array]) -> None:
    """Sets the predictions of depth mtp_eval_target_module, of which MaxText's eval step computes the acceptance rate."""
    depth = self.config.mtp_eval_target_module
    if 0 < depth <= len(predictions):
      # Float, because MaxText differentiates the function that returns them.
      self.mtp_preds = stock.mtp_acceptance(predictions[depth - 1].astype(jnp.float32)[None])
      self.mtp_mask = stock.mtp_acceptance(masks[depth - 1][None])


class NoMultiTokenPrediction(nnx.Module):
  """Stands in a model for prefill and decoding, which has no use for MTP: no parameters, no operations."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
    del args, kwargs
    return {}


def mtp_block(config: Any, mesh: Any, transformer_layer_module: Any, decoder: Any, rngs: nnx.Rngs) -> nnx.Module:
  """The MTP block of a model, built like MaxText's; a stand-in where the decoder is not for training."""
  if decoder.model_mode != MODEL_MODE_TRAIN:
    return NoMultiTokenPrediction()
  return Ling2MultiTokenPredictionBlock(config, mesh, transformer_layer_module, decoder, rngs)


def scored_tokens(scored: jax.Array, ids: jax.Array, segment_ids: jax.Array | None, config: Any) -> list[jax.Array]:
  """Which positions are scored at each MTP depth: those whose target, depth tokens further on, is of the same document.

  Args:
    scored: [B, T] 0/1, the positions scored by the main loss.
    ids: [B, T] the input tokens.
    segment_ids: [B, T] documents, or None for one per row.
    config: MaxText config, with K = mtp_num_layers.

  Returns:
    K arrays [B, T] of 0/1.
  """
  if segment_ids is not None:
    # MaxText's mmap pipeline scores an end-of-document token against the next document's first token. Not here: as a
    # target of depth 1 that token would be predicted from a position which does not see its document at all.
    following = stock.roll_and_mask(segment_ids)
    last = jnp.arange(segment_ids.shape[1]) == segment_ids.shape[1] - 1
    eod = end_of_document(config)
    goes_on = last if eod is None else last & (ids != eod)  # of the token behind the row, only this can be known
    scored = jnp.where((segment_ids == following) | goes_on, scored, 0)
  masks = []
  for _ in range(config.mtp_num_layers):
    scored = stock.roll_and_mask_by_segment(scored, segment_ids)
    masks.append(scored)
  return masks
