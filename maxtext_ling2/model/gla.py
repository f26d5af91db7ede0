"""Gated linear attention with a constant decay per head ("lightning attention"), as a layer.

    q, k, v = split(silu?(x Wqkv));  q, k = RoPE(RMSNorm(q)), RoPE(RMSNorm(k))
    o = gla(q, k, v, decay);         y = (GroupRMSNorm(o) * sigmoid(x Wg)) Wo

The decay depends on the layer's index only; it is neither a parameter nor part of a checkpoint.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from maxtext.common import common_types as ct
from maxtext.layers.initializers import nd_dense_init
from maxtext.layers.linears import DenseGeneral
from maxtext.layers.normalizations import RMSNorm
from maxtext.utils import max_utils
from maxtext.utils.sharding import maybe_shard_with_logical

from maxtext_ling2.model.norms import GatedGroupRMSNorm
from maxtext_ling2.model.rope import rotary_embedding
from maxtext_ling2.model.sharded_gla import HEADS, sharded_gla
from maxtext_ling2.ops.gla import log_decay
from maxtext_ling2.ops.gla.decode import gla_step


class GatedLinearAttention(nnx.Module):
  """One GLA layer: x [B, T, C] -> y [B, T, C].

  Parameters (names as in the checkpoint mapping): query_key_value [C, 3, H, D], query_norm [D], key_norm [D] (with
  `use_qk_norm`), output_gate [C, H, D], output_norm [H * D], out [H, D, C]. For prefill and decoding also the cache
  recurrent_state [B, H, D, D] float32, whose size does not depend on the length of the context.
  """

  def __init__(self, config: Any, mesh: Any, model_mode: str, quant: Any, rngs: nnx.Rngs):
    self.config = config
    self.mesh = mesh
    heads, dim = config.num_query_heads, config.head_dim
    self.query_key_value = self._dense(config.emb_dim, (3, heads, dim), ("embed_attn", "qkv", "heads", "kv"), quant, rngs)
    self.output_gate = self._dense(config.emb_dim, (heads, dim), ("embed_attn", "heads", "kv"), quant, rngs)
    self.out = self._dense((heads, dim), config.emb_dim, ("heads", "kv", "embed_attn"), quant, rngs, axis=(-2, -1))
    if config.use_qk_norm:
      self.query_norm = self._norm(dim, rngs)
      self.key_norm = self._norm(dim, rngs)
    self.output_norm = GatedGroupRMSNorm(
      heads * dim,
      num_groups=config.group_norm_size,
      epsilon=config.normalization_layer_epsilon,
      dtype=config.dtype,
      weight_dtype=config.weight_dtype,
      kernel_axes=("norm",),
    )
    self.rotary_dims = int(dim * config.partial_rotary_factor)
    self.rotary_embedding = rotary_embedding(config, mesh, self.rotary_dims, interleaved=False, rngs=rngs)
    if model_mode != ct.MODEL_MODE_TRAIN:
      self.recurrent_state = self._cache(model_mode)

  def _cache(self, model_mode: str) -> nnx.Cache[jax.Array]:
    """MaxEngine knows this cache by its name, and its batch axis by the name of the logical axis."""
    batch, _ = max_utils.get_batch_seq_len_for_mode(self.config, model_mode)
    heads, dim = self.config.num_query_heads, self.config.head_dim
    batch_axis = ct.CACHE_BATCH_PREFILL if model_mode == ct.MODEL_MODE_PREFILL else ct.CACHE_BATCH
    state = jnp.zeros((batch, heads, dim, dim), jnp.float32)
    return nnx.Cache(state, out_sharding=(batch_axis, ct.CACHE_HEADS, None, None))

  def _dense(
    self, inputs: Any, outputs: Any, kernel_axes: tuple[str, ...], quant: Any, rngs: nnx.Rngs, axis: Any = -1
  ) -> DenseGeneral:
    return DenseGeneral(
      in_features_shape=inputs,
      out_features_shape=outputs,
      axis=axis,
      dtype=self.config.dtype,
      weight_dtype=self.config.weight_dtype,
      kernel_init=nd_dense_init(1.0, "fan_in", "normal"),
      kernel_axes=kernel_axes,
      quant=quant,
      matmul_precision=self.config.matmul_precision,
      rngs=rngs,
    )

  def _norm(self, dim: int, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(
      num_features=dim,
      dtype=self.config.dtype,
      weight_dtype=self.config.weight_dtype,
      epsilon=self.config.normalization_layer_epsilon,
      kernel_axes=("norm",),
      rngs=rngs,
    )

  def __call__(
    self,
    x: jax.Array,
    segment_ids: jax.Array | None,
    positions: jax.Array,
    layer_index: int | jax.Array,
    model_mode: str = ct.MODEL_MODE_TRAIN,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: [B, T, C], the input after the layer norm.
      segment_ids: [B, T] int, 0 for padding; None: one document a row.
      positions: [B, T] int, positions within each document.
      layer_index: 0-based index in the decoder; may be traced.
      model_mode: MaxText's; in prefill and decoding (T = 1) `recurrent_state` is read and moved on.

    Returns:
      [B, T, C] in the dtype of the config. Rows of padding hold no information.
    """
    q, k, v = self._project(x, positions)
    decay = log_decay(layer_index, self.config.num_decoder_layers, q.shape[2], self.config.gla_decay_layer_offset)
    o = self._attend(q, k, v, jnp.asarray(decay), segment_ids, model_mode)
    o = checkpoint_name(self._shard(o), "context")
    gate = checkpoint_name(self.output_gate(x), "output_gate")  # [B, T, H, D]
    flat = (*o.shape[:2], -1)
    y = self.output_norm(o.reshape(flat), gate.reshape(flat)).reshape(o.shape)
    return checkpoint_name(self.out(self._shard(y)), "out_proj")

  def _attend(
    self, q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, segment_ids: jax.Array | None, model_mode: str
  ) -> jax.Array:
    """o [B, T, H, D]."""
    options: dict[str, Any] = {"mesh": self.mesh, "backend": self.config.gla_backend}
    if model_mode == ct.MODEL_MODE_TRAIN:
      return sharded_gla(q, k, v, decay, segment_ids, **options)[0]
    state = self.recurrent_state[...]
    new: jax.Array | None
    if model_mode == ct.MODEL_MODE_AUTOREGRESSIVE:
      o, new = gla_step(q[:, 0], k[:, 0], v[:, 0], decay, state)
      o = o[:, None]
    else:
      o, new = sharded_gla(q, k, v, decay, segment_ids, initial_state=state, output_final_state=True, **options)
    self.recurrent_state[...] = new
    return o

  def _project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k (normalised and rotated) and v, each [B, T, H, D]."""
    qkv = self.query_key_value(x)  # [B, T, 3, H, D]
    if self.config.use_linear_silu:
      qkv = jax.nn.silu(qkv)
    qkv = checkpoint_name(qkv, "qkv_proj")
    q, k, v = (self._shard(qkv[:, :, i]) for i in range(3))
    if self.config.use_qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    q, k = self._rotate(q, positions), self._rotate(k, positions)
    return checkpoint_name(q, "query_proj"), checkpoint_name(k, "key_proj"), checkpoint_name(v, "value_proj")

  def _rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """RoPE on the first `rotary_dims` dimensions; the rest passes unchanged."""
    rotated = self.rotary_embedding(x[..., : self.rotary_dims], positions)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., self.rotary_dims :]], axis=-1)

  def _shard(self, x: jax.Array) -> jax.Array:
    return maybe_shard_with_logical(
      x, HEADS, self.mesh, self.config.shard_mode, debug_sharding=self.config.debug_sharding
    )
