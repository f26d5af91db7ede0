"""Rotary embeddings of both attentions: half-rotation over the first dimensions (GLA), or interleaved pairs (MLA)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.layers.embeddings import RotaryEmbedding

from maxtext_ling2.model import yarn


class HalfRotaryEmbedding(RotaryEmbedding):
  """MaxText's half-rotation, in float32 and rounded once, to the dtype of the config; stretched by YaRN if asked.

  Args:
    config: MaxText config; `rope_max_timescale` is theta.
    mesh: device mesh.
    dims: number of rotated dimensions, even.
    rngs: unused, part of MaxText's signature.
  """

  def __init__(self, config: Any, mesh: Any, dims: int, rngs: nnx.Rngs):
    super().__init__(
      min_timescale=config.rope_min_timescale,
      max_timescale=config.rope_max_timescale,
      mesh=mesh,
      embedding_dims=dims,
      fprop_dtype=config.dtype,
      rngs=rngs,
    )
    self.config = config

  @property
  def timescale(self) -> jax.Array:
    """Positions per radian of each pair, [dims / 2] float32."""
    if not yarn.is_yarn(self.config):
      return super().timescale
    return jnp.asarray(1.0 / yarn.inverse_frequencies(self.config, self.embedding_dims), jnp.float32)

  def tables(self, position: jax.Array, dims: int) -> tuple[jax.Array, jax.Array]:
    """Factors that `ops.gla.rotated_norm` takes, for vectors of `dims` dimensions of which the first are rotated.

    Args:
      position: [B, T] int.
      dims: at least the number of rotated dimensions.

    Returns:
      cos and sin [B, T, dims] float32.
    """
    angle = position[..., None] / self.timescale
    factor = yarn.attention_factor(self.config) if yarn.is_yarn(self.config) else 1.0
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    rest = jnp.zeros((*position.shape, dims - self.embedding_dims), cos.dtype)
    return jnp.concatenate([cos, cos, rest + 1], axis=-1), jnp.concatenate([-sin, sin, rest], axis=-1)

  def apply_rotary(self, inputs: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `inputs` [B, T, H, D] by cos and sin [B, T, 1, D], which YaRN scales."""
    if yarn.is_yarn(self.config):
      factor = yarn.attention_factor(self.config)
      cos, sin = cos * factor, sin * factor
    return super().apply_rotary(inputs, cos, sin)

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
  """The rotary embedding of one attention, called with (inputs [B, T, H, dims], positions [B, T]).

  Args:
    config: MaxText config.
    mesh: device mesh.
    dims: number of rotated dimensions, even.
    interleaved: whether pairs stand next to each other in the input.
    rngs: unused, part of MaxText's signature.
  """
  cls = InterleavedRotaryEmbedding if interleaved else HalfRotaryEmbedding
  return cls(config, mesh, dims, rngs)
