"""Padding and borders of documents, counted once per chunk and shared by the backends that work in chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
  """What the tokens of each chunk of C tokens are; N chunks, the last filled up with padding.

  Distances count real tokens; -1 stands for "nothing flows".
  """

  real: jax.Array  # [B, N, C] bool: whether the token is not padding
  position: jax.Array  # [B, N, C] int32: real tokens of the chunk up to and with this place
  document: jax.Array  # [B, N, C] int32: restarts in the chunk up to and with this place; 0 = that of the entering state
  since_start: jax.Array  # [B, N, C] int32: distance from the state that enters the chunk to this token
  until_end: jax.Array  # [B, N, C] int32: distance from this token to the state that leaves the chunk
  whole: jax.Array  # [B, N, 1] int32: distance from the state that enters to the state that leaves


def count_segments(segment_ids: jax.Array, chunk: int, num_chunks: int | None = None) -> Segments:
  """Counts the real tokens and the restarts of each chunk.

  Args:
    segment_ids: [B, T] integer, 0 for padding; the rules are those of `api.gla`.
    chunk: tokens of a chunk, C.
    num_chunks: chunks to fill up to with padding; None: the fewest that hold T tokens.
  """
  batch, length = segment_ids.shape
  real, restart = _real_and_restart(segment_ids)
  num_chunks = -(-length // chunk) if num_chunks is None else num_chunks
  fill = ((0, 0), (0, num_chunks * chunk - length))
  real, restart = (jnp.pad(x, fill).reshape(batch, num_chunks, chunk) for x in (real, restart))
  count, document = jnp.cumsum(real, axis=2, dtype=jnp.int32), jnp.cumsum(restart, axis=2, dtype=jnp.int32)
  last_count, last_document = count[:, :, -1:], document[:, :, -1:]
  return Segments(
    real=real,
    position=count,
    document=document,
    since_start=jnp.where(document == 0, count, -1),
    until_end=jnp.where(document == last_document, last_count - count, -1),
    whole=jnp.where(last_document == 0, last_count, -1),
  )


def _real_and_restart(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Which tokens are not padding, and which open another document than the last real token before: bool [B, T]."""
  real = segment_ids != 0
  last = jax.lax.cummax(jnp.where(real, jnp.arange(real.shape[1]), -1), axis=1)  # place of the last real token so far
  before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
  return real, real & (before >= 0) & (segment_ids != id_before)
