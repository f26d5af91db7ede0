"""Multi-token prediction (MTP) as the released weights expect it.

MaxText's block computes something else: it takes the hidden state before the final norm, passes an un-normalised state to
the next depth, and averages over the tokens of all depths at once. The parameters and their names are MaxText's.
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
from maxtext_ling2.model.cross_entropy import cross_entropy_with_logits

_LOGITS_AXES = ("activation_embed_and_logits_batch", "activation_length", "activation_vocab")


class Ling2MultiTokenPredictionBlock(stock.MultiTokenPredictionBlock):
  """Depth k predicts token t + k + 1 from the previous depth's output and the embedding of token t + k.

  Depth 1 takes the decoder's hidden state after the final norm, depth k the normalised output of depth k - 1. Documents
  packed into a sequence do not see each other: where the next token belongs to another document, token id 0 is embedded
  and the target is masked, as at the end of the sequence.
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
    """Runs all depths and sets the losses where MaxText's loss function reads them.

    Args: those of MaxText's block: hidden state [B, T, C] before the final norm, ids [B, T], and target_mask [B, T]:
      0 for tokens without a loss, any other number, such as a segment id, for tokens with one.

    Returns:
      {}; the losses are variables of this module: for each depth the mean over its loss mask, which MaxText averages.
    """
    del main_token_embeddings
    with jax.named_scope("mtp"):
      hidden = self.decoder.decoder_norm(main_hidden_state)  # [B, T, C]
      ids = input_ids
      targets = jnp.ones_like(input_ids) if target_ids is None else target_ids
      loss_mask = jnp.ones_like(input_ids) if target_mask is None else (jnp.asarray(target_mask) != 0).astype(jnp.int32)
      masks = loss_masks(loss_mask, input_ids, decoder_segment_ids, self.config)
      sums, predictions = [], []
      for depth in range(1, self.config.mtp_num_layers + 1):
        ids, targets = (stock.roll_and_mask_by_segment(x, decoder_segment_ids) for x in (ids, targets))
        embedded = self.decoder._apply_embedding(
          shared_embedding, ids, position_ids, deterministic, model_mode=model_mode
        )  # [B, T, C]
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
        logits = self._logits(shared_embedding, hidden, deterministic, model_mode)  # [B, T, V]
        losses = token_losses(logits.astype(jnp.float32), targets)  # [B, T]
        sums.append(jnp.sum(jnp.where(masks[depth - 1] != 0, losses, 0.0)))  # []
        predictions.append(jnp.argmax(logits, axis=-1))  # [B, T]
      if model_mode == MODEL_MODE_TRAIN:
        self._set_losses(jnp.stack(sums), jnp.stack([jnp.sum(mask) for mask in masks]))  # [K], [K]
      self._set_predictions(predictions, masks)
    return {}

  def _logits(self, shared_embedding: Any, hidden: jax.Array, deterministic: bool, model_mode: str) -> jax.Array:
    logits = self.decoder.apply_output_head(shared_embedding, hidden, deterministic, model_mode, normalize_y=False)
    return sharding.maybe_shard_with_logical(
      logits, _LOGITS_AXES, self.mesh, self.config.shard_mode, debug_sharding=self.config.debug_sharding
    )

  def _set_losses(self, sums: jax.Array, tokens: jax.Array) -> None:
    """Sets what MaxText reads, [K] each: its MTP loss is sum(losses) / sum(weights) * mtp_loss_scaling_factor.

    `token_sums` is for gradient accumulation, which may divide by the tokens of all microbatches.
    """
    self.losses = stock.mtp_losses(sums / (tokens + EPS))
    self.weights = stock.mtp_losses(jnp.ones_like(sums))
    self.token_sums = stock.mtp_losses(sums)

  def _set_predictions(self, predictions: list[jax.Array], masks: list[jax.Array]) -> None:
    """Sets the predictions of depth mtp_eval_target_module, from which MaxText's eval step gets the acceptance rate."""
    depth = self.config.mtp_eval_target_module
    if 0 < depth <= len(predictions):
      # In float32, because MaxText differentiates the function that returns them.
      self.mtp_preds = stock.mtp_acceptance(predictions[depth - 1].astype(jnp.float32)[None])
      self.mtp_mask = stock.mtp_acceptance(masks[depth - 1][None])


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross entropy [B, T] of logits [B, T, V] float32 and ids [B, T]; NaN where an id is none of the vocabulary."""
  vocabulary = logits.shape[-1]
  losses, _ = cross_entropy_with_logits(logits, jax.nn.one_hot(targets, vocabulary))
  return jnp.where((targets >= 0) & (targets < vocabulary), losses, jnp.nan)


class NoMultiTokenPrediction(nnx.Module):
  """Replaces MTP in a model for prefill and decoding: no parameters, no operations."""

  def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
    del args, kwargs
    return {}


def mtp_block(config: Any, mesh: Any, transformer_layer_module: Any, decoder: Any, rngs: nnx.Rngs) -> nnx.Module:
  """The MTP block, called like MaxText's class; `NoMultiTokenPrediction` unless the decoder is for training."""
  if decoder.model_mode != MODEL_MODE_TRAIN:
    return NoMultiTokenPrediction()
  return Ling2MultiTokenPredictionBlock(config, mesh, transformer_layer_module, decoder, rngs)


def loss_masks(loss_mask: jax.Array, ids: jax.Array, segment_ids: jax.Array | None, config: Any) -> list[jax.Array]:
  """The loss mask of each MTP depth: 1 where the target, depth tokens further on, belongs to the same document.

  Args:
    loss_mask: [B, T] 0/1, that of the main loss.
    ids: [B, T] the input tokens.
    segment_ids: [B, T] documents, or None for one per sequence.
    config: MaxText config, with K = mtp_num_layers.

  Returns:
    K arrays [B, T] of 0/1.
  """
  if segment_ids is not None:
    # In MaxText's mmap pipeline the target of an end-of-document token is the next document's first token. MTP must not
    # learn it: at depth 1 it would be predicted from a position that does not see its document at all.
    following = stock.roll_and_mask(segment_ids)  # [B, T]
    last = jnp.arange(segment_ids.shape[1]) == segment_ids.shape[1] - 1  # [T]
    eod = end_of_document(config)
    goes_on = last if eod is None else last & (ids != eod)  # all that is known of the token after the sequence
    loss_mask = jnp.where((segment_ids == following) | goes_on, loss_mask, 0)
  masks = []
  for _ in range(config.mtp_num_layers):
    loss_mask = stock.roll_and_mask_by_segment(loss_mask, segment_ids)
    masks.append(loss_mask)
  return masks
