"""One chunk on a TPU: decay factors, masks and products that the forward and the backward kernel share.

Notable: a dense chunk (no padding, no document boundary) reads its factors from tables in VMEM, filled once per group of
heads, so it needs neither HBM traffic nor exps. A masked chunk computes its factors from distances in real tokens, which
are the same for all heads. Exponents are never positive: exp(-g j) overflows.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla.segments import Segments
from maxtext_ling2.ops.pallas_utils import LANES, NN, NT, TN, Ref, dot

_MASKED_DISTANCE = 1e38
"""Distance of masked token pairs (other documents, or non-causal).

Decays are powers of two with exponents -(at least _WEAKEST) * distance: this distance gives a decay of 0 for every head,
and the weakest head still has a decay of exactly 1 within a chunk.
"""
_WEAKEST = 1e-25
_LOG2_E = 1.4426950408889634

META_ROWS = 8
"""Rows of `segment_meta`: those of `MetaRow` and two of zeros, because 8 is the smallest block a TPU addresses."""


class MetaRow(enum.IntEnum):
  """Rows of `segment_meta`, the fields of `Segments`."""

  POSITION = 0
  DOCUMENT = 1
  REAL = 2
  Q_DISTANCE = 3
  K_DISTANCE = 4
  CHUNK_DISTANCE = 5  # repeated at each token of the chunk


class Tables(NamedTuple):
  """Decay factors of dense chunks, one entry per head, with the scale as in `Decays`."""

  intra_chunk_decay: Ref  # [heads, C, C] float32
  q_decay: Ref  # [heads, C, W] float32
  k_decay: Ref  # [heads, C, W] float32


class Decays(NamedTuple):
  """Decay factors of one chunk of C tokens for one head, float32; vectors are repeated over W columns.

  `intra_chunk_decay` and `q_decay`, which lead to outputs, include the scale of the outputs.
  """

  intra_chunk_decay: jax.Array  # [C, C]: from token j to token i; zero for j > i
  q_decay: jax.Array  # [C, W]: from h_in to token i
  k_decay: jax.Array  # [C, W]: from token j to h_out
  chunk_decay: jax.Array  # [1, W]: from h_in to h_out


class Distances(NamedTuple):
  """Distances in real tokens within one masked chunk, float32, or `_MASKED_DISTANCE`. Shapes as in `Decays`."""

  intra_chunk: jax.Array
  q: jax.Array
  k: jax.Array
  chunk: jax.Array


def log2_decays(g_gamma: Ref, first: jax.Array, heads: int) -> list[jax.Array]:
  """Log2 of the decay per token of `heads` heads from `first` on: scalars, strictly negative."""
  return [jnp.minimum(g_gamma[first + head] * _LOG2_E, -_WEAKEST) for head in range(heads)]


def causal_scores(x: jax.Array, y: jax.Array, decay: jax.Array) -> list[jax.Array]:
  """The lower triangle of (x y^T) * decay, rounded to the dtype of x.

  It comes in blocks of 128 rows, each up to the end of the block on the diagonal: [128, 128], [128, 256], ... The blocks
  above the diagonal are zero, and an MXU of 128 x 128 need not compute them.
  """
  blocks = []
  for start in range(0, x.shape[0], LANES):
    stop = start + LANES
    product = dot(x[start:stop], y[:stop], NT) * decay[start:stop, :stop]
    blocks.append(product.astype(x.dtype))
  return blocks


def causal_dot(scores: Sequence[jax.Array], x: jax.Array) -> jax.Array:
  """Scores [C, C] in the blocks of `causal_scores`, by x [C, D]."""
  return jnp.concatenate([dot(block, x[: block.shape[1]], NN) for block in scores])


def transposed_causal_dot(scores: Sequence[jax.Array], x: jax.Array) -> jax.Array:
  """Scores [C, C] in the blocks of `causal_scores`, transposed, by x [C, D]."""
  products = []
  for index in range(len(scores)):
    columns = slice(index * LANES, (index + 1) * LANES)
    below = jnp.concatenate([block[:, columns] for block in scores[index:]])
    products.append(dot(below, x[columns.start :], TN))
  return jnp.concatenate(products)


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
  """x [C, D] times decay factors [C, W >= D] in float32, rounded to the dtype of x."""
  return (x.astype(jnp.float32) * factor[:, : x.shape[1]]).astype(x.dtype)


def fill_tables(tables: Tables, log2_g: Sequence[jax.Array], scale: float) -> None:
  """Writes the factors of dense chunks."""
  chunk_size, width = tables.q_decay.shape[1:]
  index = jax.lax.broadcasted_iota(jnp.int32, (chunk_size, width), 0).astype(jnp.float32)
  distance = jnp.where(_causal(chunk_size), _iota(chunk_size, 0) - _iota(chunk_size, 1), _MASKED_DISTANCE)
  for head, g in enumerate(log2_g):
    tables.intra_chunk_decay[head] = scale * jnp.exp2(g * distance)
    tables.q_decay[head] = scale * jnp.exp2(g * (index + 1))
    tables.k_decay[head] = jnp.exp2(g * (chunk_size - 1 - index))


def dense_decays(tables: Tables, head: int, log2_g: jax.Array) -> Decays:
  """The factors of a chunk without padding and document boundaries."""
  chunk_size, width = tables.q_decay.shape[1:]
  chunk_decay = jnp.exp2(jnp.full((1, width), log2_g * chunk_size))
  return Decays(tables.intra_chunk_decay[head], tables.q_decay[head], tables.k_decay[head], chunk_decay)


def masked_decays(distances: Distances, log2_g: jax.Array, scale: float) -> Decays:
  """The factors of a chunk with padding or document boundaries."""
  intra_chunk_decay, q_decay, k_decay, chunk_decay = (jnp.exp2(log2_g * x) for x in distances)
  return Decays(scale * intra_chunk_decay, scale * q_decay, k_decay, chunk_decay)


def segment_meta(segments: Segments) -> jax.Array:
  """Segments as the kernels read them: [B, META_ROWS, N * C] float32, rows by `MetaRow`."""
  chunk_distance = jnp.broadcast_to(segments.chunk_distance, segments.position.shape)
  q, k, chunk = (
    jnp.where(x < 0, _MASKED_DISTANCE, x) for x in (segments.q_distance, segments.k_distance, chunk_distance)
  )
  rows = {
    MetaRow.POSITION: segments.position,
    MetaRow.DOCUMENT: segments.document,
    MetaRow.REAL: segments.real,
    MetaRow.Q_DISTANCE: q,
    MetaRow.K_DISTANCE: k,
    MetaRow.CHUNK_DISTANCE: chunk,
  }
  zeros = [jnp.zeros_like(segments.position)] * (META_ROWS - len(rows))
  batch = segments.position.shape[0]
  return jnp.stack([x.astype(jnp.float32).reshape(batch, -1) for x in (*(rows[row] for row in MetaRow), *zeros)], axis=1)


def distances(meta: jax.Array, width: int) -> Distances:
  """The distances of a chunk from its segment metadata [META_ROWS, C]."""
  chunk_size = meta.shape[1]
  columns = _columns(meta)
  connected = _causal(chunk_size) & (_column(columns, MetaRow.DOCUMENT, chunk_size) == _row(meta, MetaRow.DOCUMENT))
  distance = _column(columns, MetaRow.POSITION, chunk_size) - _row(meta, MetaRow.POSITION)
  return Distances(
    intra_chunk=jnp.where(connected, distance, _MASKED_DISTANCE),
    q=_column(columns, MetaRow.Q_DISTANCE, width),
    k=_column(columns, MetaRow.K_DISTANCE, width),
    chunk=jnp.broadcast_to(meta[MetaRow.CHUNK_DISTANCE : MetaRow.CHUNK_DISTANCE + 1, :1], (1, width)),
  )


def zero_padding(meta: jax.Array, tokens: jax.Array) -> jax.Array:
  """Tokens [C, heads * D] with zeros in place of padding, which may hold NaN."""
  real = _column(_columns(meta), MetaRow.REAL, tokens.shape[1]) > 0
  return jnp.where(real, tokens.astype(jnp.float32), 0.0).astype(tokens.dtype)


def _row(meta: jax.Array, row: MetaRow) -> jax.Array:
  """[1, C]."""
  return meta[row : row + 1]


def _columns(meta: jax.Array) -> jax.Array:
  """[META_ROWS, C] -> [C, 128], whose first columns are the rows. Mosaic transposes whole blocks of 128 x 128."""
  return jnp.transpose(jnp.concatenate([meta] * (LANES // META_ROWS)))


def _column(columns: jax.Array, row: MetaRow, width: int) -> jax.Array:
  """One row of the metadata as a column, repeated: [C, width]."""
  return jnp.broadcast_to(columns[:, row : row + 1], (columns.shape[0], width))


def _causal(chunk_size: int) -> jax.Array:
  return _iota(chunk_size, 0) >= _iota(chunk_size, 1)


def _iota(chunk_size: int, dimension: int) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, (chunk_size, chunk_size), dimension).astype(jnp.float32)
