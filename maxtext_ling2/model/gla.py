"""Gated linear attention with a constant decay per head ("lightning attention"), as a layer.

    q, k, v = split(silu?(x Wqkv));  q, k = RoPE(RMSNorm(q)), RoPE(RMSNorm(k))
    o = gla(q, k, v, g_gamma);       y = (GroupRMSNorm(o) * sigmoid(x Wg)) Wo

The log decay g_gamma depends on the layer's index only; it is neither a parameter nor part of a checkpoint.

Between the matmuls all arrays are [B, T, H * D]: on a TPU a reshape to [B, T, H, D] is a copy, unless a reshape back
follows directly, as around `gla`.
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

from maxtext_ling2.model import adapters
from maxtext_ling2.model.norms import GatedGroupRMSNorm
from maxtext_ling2.model.rope import HalfRotaryEmbedding
from maxtext_ling2.model.sharded_gla import FLAT, sharded_gla, sharded_rotated_norm
from maxtext_ling2.ops.gla import log_decay
from maxtext_ling2.ops.gla.decode import gla_step


class GatedLinearAttention(nnx.Module):
  """One GLA layer: x [B, T, C] -> y [B, T, C].

  Parameters (names as in the checkpoint mapping): query_key_value [C, 3, H, D], query_norm [D], key_norm [D] (with
  `use_qk_norm`), output_gate [C, H, D], output_norm [H * D], out [H, D, C]. For prefill and decoding also the cache
  recurrent_state [B, H, D, D] float32, whose size does not depend on the context length.
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
      weight_dtype=config.weight_dtype,
      kernel_axes=("norm",),
    )
    self.has_adapters = adapters.enabled(config)
    self.rotary_dims = int(dim * config.partial_rotary_factor)
    self.rotary_embedding = HalfRotaryEmbedding(config, mesh, self.rotary_dims, rngs)
    if model_mode != ct.MODEL_MODE_TRAIN:
      self.recurrent_state = self._cache(model_mode)

  def _cache(self, model_mode: str) -> nnx.Cache[jax.Array]:
    """The recurrent state. MaxEngine finds it by its attribute name, and its batch axis by its logical axis."""
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
    layer_idx: int | jax.Array,
    model_mode: str = ct.MODEL_MODE_TRAIN,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: [B, T, C], the input after the layer norm.
      segment_ids: [B, T] int, 0 at padding; None: one document per sequence.
      positions: [B, T] int, positions within each document.
      layer_idx: 0-based index in the decoder; may be traced.
      model_mode: MaxText's; prefill and decoding (T = 1) read and update `recurrent_state`.

    Returns:
      [B, T, C] in the dtype of the config; arbitrary at padding.
    """
    heads = self.config.num_query_heads
    decoding = model_mode == ct.MODEL_MODE_AUTOREGRESSIVE
    backend = "chunked" if decoding else self.config.gla_backend  # one token is not worth a kernel
    q, k, v = (split_heads(part, heads) for part in self._qkv(x, positions, backend))  # [B, T, H, D] each
    g_gamma = log_decay(layer_idx, self.config.num_decoder_layers, heads, self.config.gla_decay_layer_offset)
    o = self._attend(q, k, v, jnp.asarray(g_gamma), segment_ids, model_mode)  # [B, T, H, D]
    o = checkpoint_name(self._shard(merge_heads(o)), "context")  # [B, T, H * D]
    (gate,) = self._project(self.output_gate, x)  # [B, T, H * D]
    gate = checkpoint_name(gate, "output_gate")
    y = self.output_norm(o, gate, mesh=self.mesh, heads=heads, backend=backend)
    return checkpoint_name(self.out(split_heads(self._shard(y), heads)), "out_proj")  # [B, T, C]

  def _attend(
    self, q: jax.Array, k: jax.Array, v: jax.Array, g_gamma: jax.Array, segment_ids: jax.Array | None, model_mode: str
  ) -> jax.Array:
    """q, k, v [B, T, H, D], g_gamma [H] -> o [B, T, H, D]."""
    options: dict[str, Any] = {"mesh": self.mesh, "backend": self.config.gla_backend}
    if model_mode == ct.MODEL_MODE_TRAIN:
      return sharded_gla(q, k, v, g_gamma, segment_ids, **options)[0]
    state = self.recurrent_state[...]  # [B, H, D, D]
    final_state: jax.Array | None
    if model_mode == ct.MODEL_MODE_AUTOREGRESSIVE:
      o, final_state = gla_step(q[:, 0], k[:, 0], v[:, 0], g_gamma, state)
      o = o[:, None]  # [B, H, D] -> [B, 1, H, D]
    else:
      o, final_state = sharded_gla(q, k, v, g_gamma, segment_ids, initial_state=state, output_final_state=True, **options)
    self.recurrent_state[...] = final_state
    return o

  def _qkv(self, x: jax.Array, positions: jax.Array, backend: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, C] -> q, k (normalised and rotated) and v, each [B, T, H * D]."""
    projected = self._project(self.query_key_value, x)
    if self.config.use_linear_silu:
      projected = [jax.nn.silu(part) for part in projected]
    names = ("query_proj", "key_proj", "value_proj")
    q, k, v = (checkpoint_name(self._shard(part), name) for part, name in zip(projected, names, strict=True))
    options = {"rotated": self.rotary_dims, "epsilon": self.config.normalization_layer_epsilon, "backend": backend}
    options |= {"mesh": self.mesh, "heads": self.config.num_query_heads}
    scales = (self.query_norm.scale[...], self.key_norm.scale[...]) if self.config.use_qk_norm else (None, None)
    tables = self.rotary_embedding.tables(jnp.broadcast_to(positions, x.shape[:2]), self.config.head_dim)  # [B, T, D]
    q, k = (sharded_rotated_norm(part, scale, *tables, **options) for part, scale in zip((q, k), scales, strict=True))
    return q, k, v

  def _project(self, dense: DenseGeneral, x: jax.Array) -> list[jax.Array]:
    """x [B, T, C] times a kernel [C, H, D] or [C, n, H, D] -> 1 or n arrays [B, T, H * D].

    One matmul per array, since slices of a single matmul's output are copies. With one token slices of the kernel would
    be the larger copies. An adapter (LoRA, also with a quantised kernel) is a part of the module's own product: Qwix
    finds a kernel by the module whose method is running.
    """
    if dense.quant is not None or dense.kernel_scale is not None or x.shape[1] == 1 or self.has_adapters:
      y = dense(x)  # [B, T, n, H, D] or [B, T, H, D]
      return [merge_heads(y[:, :, i]) for i in range(y.shape[2])] if y.ndim == 5 else [merge_heads(y)]
    kernel = jnp.asarray(dense.kernel[...], dense.dtype)  # [C, n, H, D] or [C, H, D]
    kernels = [kernel[:, i] for i in range(kernel.shape[1])] if kernel.ndim == 4 else [kernel]  # [C, H, D] each
    precision = jax.lax.Precision(dense.matmul_precision)
    x = jnp.asarray(x, dense.dtype)
    return [jnp.dot(x, part.reshape(x.shape[-1], -1), precision=precision) for part in kernels]

  def _shard(self, x: jax.Array) -> jax.Array:
    return maybe_shard_with_logical(x, FLAT, self.mesh, self.config.shard_mode, debug_sharding=self.config.debug_sharding)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
  """[B, T, H * D] -> [B, T, H, D]."""
  return x.reshape(*x.shape[:2], heads, -1)


def merge_heads(x: jax.Array) -> jax.Array:
  """[B, T, H, D] -> [B, T, H * D]."""
  return x.reshape(*x.shape[:2], -1)
