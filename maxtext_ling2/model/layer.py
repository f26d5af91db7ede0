"""One decoder layer: h += attention(norm(h)); h += mlp(norm(h)), with GLA or MLA and a dense MLP or experts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from maxtext.common.common_types import MODEL_MODE_PREFILL, MODEL_MODE_TRAIN
from maxtext.layers import linears
from maxtext.layers.normalizations import RMSNorm
from maxtext.utils import max_utils
from maxtext.utils.sharding import create_sharding, get_logical_axis_rules, maybe_shard_with_logical

from maxtext_ling2.model.gla import GatedLinearAttention
from maxtext_ling2.model.mla import MultiHeadLatentAttention
from maxtext_ling2.model.moe import Ling2MoE

ACTIVATIONS = "ling2_"
"""Prefix of the names under which LING2's layers sow their statistics; `training/objective.py` orders them by layer."""


def activation_statistics(y: jax.Array) -> dict[str, jax.Array]:
  """The statistics of a layer's output [B, T, C] that MaxText logs with record_internal_nn_metrics, [] each."""
  return {
    "activation_mean": jnp.mean(y),
    "activation_stdev": jnp.std(y),
    "activation_fraction_zero": jnp.sum(y == 0) / jnp.size(y),
  }


class Ling2DecoderLayer(nnx.Module):
  """A decoder layer; MaxText's calling convention.

  Args:
    config: MaxText config.
    mesh: device mesh.
    model_mode: MaxText's model mode.
    rngs: random streams.
    quant: MaxText's quantisation, or None.
    mla: True for MLA, False for GLA.
    dense: True for a dense MLP, False for a mixture of experts.
    layer_idx: 0-based index in the decoder; None in a layer scan, where it is an argument of the call.
  """

  def __init__(
    self,
    config: Any,
    mesh: Any,
    model_mode: str,
    rngs: nnx.Rngs,
    quant: Any = None,
    *,
    mla: bool,
    dense: bool,
    layer_idx: int | None = None,
  ) -> None:
    self.layer_idx = layer_idx
    self.config = config
    self.mesh = mesh
    self.model_mode = model_mode
    self.pre_self_attention_layer_norm = self._norm(rngs)
    self.post_self_attention_layer_norm = self._norm(rngs)
    self.is_mla = mla
    self.self_attention: nnx.Module
    if mla:
      batch, length = max_utils.get_batch_seq_len_for_mode(config, model_mode)
      shape = (batch, length, config.emb_dim)
      self.self_attention = MultiHeadLatentAttention(config, mesh, model_mode, quant, shape, rngs)
    else:
      self.self_attention = GatedLinearAttention(config, mesh, model_mode, quant, rngs)
    self.is_dense = dense
    if dense:
      self.mlp = self._dense_mlp(quant, rngs)
    else:
      self.moe = Ling2MoE(config, mesh, quant, rngs)
    self.dropout = linears.Dropout(rate=config.dropout_rate, broadcast_dims=(-2,), rngs=rngs)
    self.out_sharding = create_sharding(mesh, self._axes("activation_embed"), rules=get_logical_axis_rules())
    self.mlp_sharding = create_sharding(mesh, self._axes("activation_mlp"), rules=get_logical_axis_rules())

  def _norm(self, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(
      num_features=self.config.emb_dim,
      dtype=self.config.dtype,
      weight_dtype=self.config.weight_dtype,
      kernel_axes=("norm",),
      epsilon=self.config.normalization_layer_epsilon,
      rngs=rngs,
    )

  def _dense_mlp(self, quant: Any, rngs: nnx.Rngs) -> linears.MlpBlock:
    return linears.MlpBlock(
      in_features=self.config.emb_dim,
      intermediate_dim=self.config.mlp_dim,
      activations=self.config.mlp_activations,
      intermediate_dropout_rate=self.config.dropout_rate,
      dtype=self.config.dtype,
      weight_dtype=self.config.weight_dtype,
      config=self.config,
      quant=quant,
      model_mode=self.model_mode,
      mesh=self.mesh,
      rngs=rngs,
    )

  def _axes(self, last: str) -> tuple[str, str, str]:
    length = "prefill_activation_norm_length" if self.model_mode == MODEL_MODE_PREFILL else "activation_norm_length"
    return ("activation_batch", length, last)

  def _shard(self, x: jax.Array) -> jax.Array:
    return maybe_shard_with_logical(
      x,
      logical_axes=self._axes("activation_embed"),
      mesh=self.mesh,
      shard_mode=self.config.shard_mode,
      debug_sharding=self.config.debug_sharding,
      rules=get_logical_axis_rules(),
    )

  def __call__(
    self,
    inputs: jax.Array,
    decoder_segment_ids: jax.Array | None,
    decoder_positions: jax.Array,
    deterministic: bool,
    model_mode: str,
    previous_chunk: Any = None,
    slot: int | None = None,
    kv_cache: Any = None,
    attention_metadata: Any = None,
    layer_idx: int | jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """Applies the layer; MaxText's calling convention for decoder layers.

    Args:
      inputs: [B, T, C].
      decoder_segment_ids: [B, T] int, 0 at padding, or None.
      decoder_positions: [B, T] int, positions within each document.
      deterministic: whether there is no dropout.
      model_mode: MaxText's model mode.
      previous_chunk: for chunked prefill; passed to MLA.
      slot: for paged attention; passed to MLA.
      kv_cache: returned unchanged: LING2's layers keep their own caches.
      attention_metadata: unused (vLLM).
      layer_idx: 0-based index in the decoder, given in a layer scan; None: that of the constructor.

    Returns:
      (outputs [B, T, C], kv_cache).
    """
    del attention_metadata
    x = checkpoint_name(self._shard(inputs), "decoder_layer_input")  # [B, T, C], as all below
    with jax.named_scope("norm"):
      normed = self._shard(self.pre_self_attention_layer_norm(x))
    if self.is_mla:
      with jax.named_scope("mla"):
        attended, _ = self.self_attention(
          normed,
          normed,
          decoder_positions,
          decoder_segment_ids=decoder_segment_ids,
          deterministic=deterministic,
          model_mode=model_mode,
          out_sharding=self.out_sharding,
          previous_chunk=previous_chunk,
          slot=slot,
        )
    else:
      layer_idx = self.layer_idx if layer_idx is None else layer_idx
      with jax.named_scope("gla"):
        attended = self.self_attention(normed, decoder_segment_ids, decoder_positions, layer_idx, model_mode)
    x = x + self._shard(attended)
    segment_ids = decoder_segment_ids if model_mode == MODEL_MODE_TRAIN else None  # decoding counts no tokens
    with jax.named_scope("norm"):
      normed = self._shard(self.post_self_attention_layer_norm(x))
    y = x + self._shard(self._mlp(normed, segment_ids, deterministic))
    y = self._shard(self.dropout(y, deterministic=deterministic))
    if self.config.record_internal_nn_metrics:
      for name, value in activation_statistics(y).items():
        self.sow(nnx.Intermediate, ACTIVATIONS + name, value)
    return y, kv_cache

  def _mlp(self, x: jax.Array, segment_ids: jax.Array | None, deterministic: bool) -> jax.Array:
    shardings = {"intermediate_sharding": self.mlp_sharding, "out_sharding": self.out_sharding}
    if self.is_dense:
      with jax.named_scope("mlp"):
        return self.mlp(x, deterministic=deterministic, **shardings)
    y, load_balance_loss = self.moe(x, deterministic, **shardings, segment_ids=segment_ids)
    if load_balance_loss is not None and self.config.load_balance_loss_weight > 0.0:
      self.sow(nnx.Intermediate, "moe_lb_loss", load_balance_loss)
    return y


class Ling2MtpLayer(Ling2DecoderLayer):
  """The decoder layer inside a multi-token-prediction layer: always MLA and experts."""

  def __init__(self, config: Any, mesh: Any, model_mode: str, rngs: nnx.Rngs, quant: Any = None) -> None:
    super().__init__(config, mesh, model_mode, rngs, quant, mla=True, dense=False)
