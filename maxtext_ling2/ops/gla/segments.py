"""Segment metadata per chunk (padding, document boundaries, distances), shared by all backends that work in chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
  """Segment metadata per chunk: N chunks of C tokens, the last one padded.

  Distances are the exponents of the decays: numbers of real tokens, or -1 where the decay is 0 (a document boundary lies
  between).
  """

  real: jax.Array  # [B, N, C] bool: the token is not padding
  position: jax.Array  # [B, N, C] int32: real tokens of the chunk up to and including this one
  document: jax.Array  # [B, N, C] int32: restarts in the chunk up to and including this token; 0: the document of h_in
  q_distance: jax.Array  # [B, N, C] int32: from h_in to this token
  k_distance: jax.Array  # [B, N, C] int32: from this token to h_out
  chunk_distance: jax.Array  # [B, N, 1] int32: from h_in to h_out


def count_segments(segment_ids: jax.Array, chunk_size: int, num_chunks: int | None = None) -> Segments:
  """Counts the real tokens and the restarts of each chunk.

  Args:
    segment_ids: [B, T] integer, 0 for padding; the rules are those of `api.gla`.
    chunk_size: tokens per chunk, C.
    num_chunks: number of chunks N, padding included; None: the fewest that hold T tokens.
  """
  batch, length = segment_ids.shape
  real, restart = _real_and_restart(segment_ids)
  num_chunks = -(-length // chunk_size) if num_chunks is None else num_chunks
  padding = ((0, 0), (0, num_chunks * chunk_size - length))
  real, restart = (jnp.pad(x, padding).reshape(batch, num_chunks, chunk_size) for x in (real, restart))  # [B, N, C]
  position, document = jnp.cumsum(real, axis=2, dtype=jnp.int32), jnp.cumsum(restart, axis=2, dtype=jnp.int32)
  last_position, last_document = position[:, :, -1:], document[:, :, -1:]  # [B, N, 1]
  return Segments(
    real=real,
    position=position,
    document=document,
    q_distance=jnp.where(document == 0, position, -1),
    k_distance=jnp.where(document == last_document, last_position - position, -1),
    chunk_distance=jnp.where(last_document == 0, last_position, -1),
  )


def _real_and_restart(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Tokens that are not padding, and tokens whose id differs from that of the last real token before: bool [B, T]."""
  real = segment_ids != 0
  last = jax.lax.cummax(jnp.where(real, jnp.arange(real.shape[1]), -1), axis=1)  # index of the last real token so far
  before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
  return real, real & (before >= 0) & (segment_ids != id_before)
