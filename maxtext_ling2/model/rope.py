"""Rotary embeddings of both attentions: half-rotation over the first dimensions (GLA), or interleaved pairs (MLA)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.layers.embeddings import RotaryEmbedding, YarnRotaryEmbedding


class HalfRotaryEmbedding(RotaryEmbedding):
  """MaxText's half-rotation, computed in float32 and rounded once, to the dtype of the config."""

  def __call__(self, inputs: jax.Array, position: jax.Array | None = None) -> jax.Array:
    """Rotates `inputs` [B, T, H, D] by `position` [B, T]."""
    return super().__call__(inputs.astype(jnp.float32), position)


class InterleavedRotaryEmbedding(HalfRotaryEmbedding):
  """Half-rotation of vectors that are stored as interleaved pairs.

  Pairs (x0, y0, x1, y1, ..) are first reordered to (x0, x1, .., y0, y1, ..). The result stays in that order: q and k are
  treated alike, so their products do not notice.
  """

  def __call__(self, inputs: jax.Array, position: jax.Array | None = None) -> jax.Array:
    """Rotates `inputs` [B, T, H, D] by `position` [B, T]."""
    return super().__call__(deinterleave(inputs), position)


def deinterleave(x: jax.Array) -> jax.Array:
  """Reorders the last axis: even positions first, then the odd ones."""
  return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def rotary_embedding(config: Any, mesh: Any, dims: int, interleaved: bool, rngs: nnx.Rngs) -> nnx.Module:
  """Builds the rotary embedding that the config's `rope_type` names.

  Args:
    config: MaxText config; `rope_max_timescale` is theta.
    mesh: device mesh.
    dims: number of rotated dimensions, even.
    interleaved: whether pairs stand next to each other in the input.
    rngs: unused, part of MaxText's signature.

  Returns:
    A module called with (inputs [B, T, H, dims], positions [B, T]), which returns [B, T, H, dims].
  """
  if config.rope_type == "yarn":
    return YarnRotaryEmbedding(
      embedding_dims=dims,
      mesh=mesh,
      max_position_embeddings=config.max_position_embeddings,
      original_max_position_embeddings=config.original_max_position_embeddings,
      beta_fast=config.beta_fast,
      beta_slow=config.beta_slow,
      rope_theta=config.rope_max_timescale,
      rope_factor=config.rope_factor,
      fprop_dtype=config.dtype,
      interleave=interleaved,
      truncate=config.rope_truncate,
      attention_scaling=config.rope_attention_scaling,
      rngs=rngs,
    )
  cls = InterleavedRotaryEmbedding if interleaved else HalfRotaryEmbedding
  return cls(
    min_timescale=config.rope_min_timescale,
    max_timescale=config.rope_max_timescale,
    mesh=mesh,
    embedding_dims=dims,
    fprop_dtype=config.dtype,
    rngs=rngs,
  )
