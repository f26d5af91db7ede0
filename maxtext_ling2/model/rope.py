"""Rotary embeddings: half-rotation over the first dimensions (GLA), or interleaved pairs (MLA)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from maxtext.layers.embeddings import RotaryEmbedding

from maxtext_ling2.model import yarn


class HalfRotaryEmbedding(RotaryEmbedding):
  """Half-rotation in float32, rounded once to the dtype of the config. Angles are MaxText's, with YaRN if configured.

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
    """Factors for the fused norm and rotation of heads of `dims` dimensions, of which the first ones are rotated.

    Args:
      position: [B, T] int.
      dims: head dimension, at least the number of rotated dimensions.

    Returns:
      cos and sin [B, T, dims] float32: 1 and 0 for the dimensions that are not rotated.
    """
    cos, sin = self._cos_sin(position)  # [B, T, rotated dimensions / 2]
    zeros = jnp.zeros((*position.shape, dims - self.embedding_dims), cos.dtype)
    return jnp.concatenate([cos, cos, zeros + 1], axis=-1), jnp.concatenate([-sin, sin, zeros], axis=-1)

  def _cos_sin(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each pair's angle, with YaRN's factor: [B, T, rotated dimensions / 2] float32."""
    angle = position[..., None] / self.timescale  # [B, T, rotated dimensions / 2]
    factor = yarn.attention_factor(self.config) if yarn.is_yarn(self.config) else 1.0
    return factor * jnp.cos(angle), factor * jnp.sin(angle)

  def __call__(self, inputs: jax.Array, position: jax.Array | None = None) -> jax.Array:
    """Rotates `inputs` [B, T, H, D] by `position` [B, T]; None: by the position in the sequence."""
    position = jnp.arange(inputs.shape[1])[None] if position is None else position
    return self._rotate(inputs, *self._cos_sin(position)).astype(self.fprop_dtype)

  def _rotate(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, H, D] by cos and sin [B, T, D / 2]."""
    cos, sin = cos[..., None, :], sin[..., None, :]  # [B, T, 1, D / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, T, H, D / 2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class InterleavedRotaryEmbedding(HalfRotaryEmbedding):
  """Rotation of vectors stored as interleaved pairs (x0, y0, x1, y1, ..), which stay interleaved.

  Hugging Face's code reorders them for a half-rotation. It does so for q and k alike, so that q k^T is the same.
  """

  def _rotate(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    pairs = (cos, cos), (-sin, sin)
    tables = (jnp.stack(pair, axis=-1).reshape(*cos.shape[:2], 1, -1) for pair in pairs)  # [B, T, 1, D] each
    return _rotate_pairs(x, *tables)


@jax.custom_vjp
def _rotate_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """x * cos + (x with neighbours exchanged) * sin, [B, T, H, D] in x's dtype.

  Neighbours are exchanged by a matmul with a permutation matrix, which is exact: on a TPU a stride of 2 over columns is
  slow. The gradient is the rotation back; that of the matmul would round a float32 operand. It is an einsum because
  Qwix's rules quantise every `dot_general` of a layer.
  """
  column = jnp.arange(x.shape[-1])
  exchange = (column[:, None] == column ^ 1).astype(x.dtype)  # [D, D]
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  exchanged = jnp.einsum("...d,de->...e", x, exchange, precision=precision, preferred_element_type=jnp.float32)
  return (x.astype(jnp.float32) * cos + exchanged * sin).astype(x.dtype)


_rotate_pairs.defvjp(
  lambda x, cos, sin: (_rotate_pairs(x, cos, sin), (cos, sin)),
  lambda tables, dy: (_rotate_pairs(dy, tables[0], -tables[1]), None, None),
)


def rotary_embedding(config: Any, mesh: Any, dims: int, interleaved: bool, rngs: nnx.Rngs) -> nnx.Module:
  """The rotary embedding of one attention, called with (inputs [B, T, H, dims], positions [B, T]).

  Args:
    config: MaxText config.
    mesh: device mesh.
    dims: number of rotated dimensions, even.
    interleaved: whether the input holds interleaved pairs.
    rngs: unused, part of MaxText's signature.
  """
  cls = InterleavedRotaryEmbedding if interleaved else HalfRotaryEmbedding
  return cls(config, mesh, dims, rngs)
