"""One chunk on a TPU: decay factors, masks and products that the forward and the backward kernel share.

Notable: a plain chunk (no padding, no border of documents) takes its factors from tables in the chip's memory, filled
once per group of heads, so that neither the HBM nor the exp unit is asked for them. A masked chunk computes its factors
from distances in real tokens, which are the same for all heads. Exponents are never positive: exp(-g j) overflows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla.segments import Segments
from maxtext_ling2.ops.pallas_utils import LANES, NN, NT, TN, Ref, dot

# Between tokens that nothing connects. Decays are powers of two with exponents -(at least _WEAKEST) * distance, so this
# distance gives 0 for every head, and the weakest head still has a decay of exactly 1 within a chunk.
_FAR = 1e38
_WEAKEST = 1e-25
_LOG2_E = 1.4426950408889634
INFO_ROWS = 8  # of a block of `segment_info`; the smallest block a TPU addresses


class Tables(NamedTuple):
  """Decay factors of plain chunks, one entry a head, scaled like those of `Decays`."""

  between: Ref  # [heads, C, C] float32
  since_start: Ref  # [heads, C, W] float32
  until_end: Ref  # [heads, C, W] float32


class Decays(NamedTuple):
  """Decay factors of one chunk of C tokens for one head, float32; vectors are repeated over W columns.

  Those that lead to outputs, `between` and `since_start`, hold the scale of the outputs.
  """

  between: jax.Array  # [C, C]: from token j to token i; zero for j > i
  since_start: jax.Array  # [C, W]: from the state that enters to token i
  until_end: jax.Array  # [C, W]: from token j to the state that leaves
  whole: jax.Array  # [1, W]: from the state that enters to the state that leaves


class Distances(NamedTuple):
  """Distances in real tokens within one masked chunk, float32; `_FAR` where nothing flows. Shapes as in `Decays`."""

  between: jax.Array
  since_start: jax.Array
  until_end: jax.Array
  whole: jax.Array


def log2_decays(g: Ref, first: jax.Array, heads: int) -> list[jax.Array]:
  """Log2 of the decay per token of `heads` heads from `first` on: scalars, strictly negative."""
  return [jnp.minimum(g[first + head] * _LOG2_E, -_WEAKEST) for head in range(heads)]


def causal_scores(x: jax.Array, y: jax.Array, between: jax.Array) -> list[jax.Array]:
  """The lower triangle of (x y^T) * between, rounded to the dtype of x.

  It comes in blocks of 128 rows, each up to the end of the block on the diagonal: [128, 128], [128, 256], ... What is
  above is zero, and a matrix unit of 128 x 128 need not compute it.
  """
  blocks = []
  for start in range(0, x.shape[0], LANES):
    stop = start + LANES
    product = dot(x[start:stop], y[:stop], NT) * between[start:stop, :stop]
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
  """Writes the factors of plain chunks."""
  chunk, width = tables.since_start.shape[1:]
  place = jax.lax.broadcasted_iota(jnp.int32, (chunk, width), 0).astype(jnp.float32)
  between = jnp.where(_causal(chunk), _iota(chunk, 0) - _iota(chunk, 1), _FAR)
  for head, g in enumerate(log2_g):
    tables.between[head] = scale * jnp.exp2(g * between)
    tables.since_start[head] = scale * jnp.exp2(g * (place + 1))
    tables.until_end[head] = jnp.exp2(g * (chunk - 1 - place))


def plain_decays(tables: Tables, head: int, log2_g: jax.Array) -> Decays:
  """The factors of a chunk without padding and borders."""
  chunk, width = tables.since_start.shape[1:]
  whole = jnp.exp2(jnp.full((1, width), log2_g * chunk))
  return Decays(tables.between[head], tables.since_start[head], tables.until_end[head], whole)


def masked_decays(distances: Distances, log2_g: jax.Array, scale: float) -> Decays:
  """The factors of a chunk with padding or borders."""
  between, since_start, until_end, whole = (jnp.exp2(log2_g * x) for x in distances)
  return Decays(scale * between, scale * since_start, until_end, whole)


def segment_info(segments: Segments) -> jax.Array:
  """Segments as the kernels read them: [B, INFO_ROWS, N * C] float32.

  Rows: position, document, real, since_start, until_end, whole (at each token of the chunk), and two of zeros.
  """
  whole = jnp.broadcast_to(segments.whole, segments.position.shape)
  flows = [jnp.where(x < 0, _FAR, x) for x in (segments.since_start, segments.until_end, whole)]
  rows = [segments.position, segments.document, segments.real, *flows]
  rows += [jnp.zeros_like(segments.position)] * (INFO_ROWS - len(rows))
  batch = segments.position.shape[0]
  return jnp.stack([x.astype(jnp.float32).reshape(batch, -1) for x in rows], axis=1)


def distances(info: jax.Array, width: int) -> Distances:
  """The distances of a chunk from its information [INFO_ROWS, C]."""
  chunk = info.shape[1]
  columns = _columns(info)
  same = _causal(chunk) & (_repeat(columns, 1, chunk) == info[1:2])
  return Distances(
    between=jnp.where(same, _repeat(columns, 0, chunk) - info[0:1], _FAR),
    since_start=_repeat(columns, 3, width),
    until_end=_repeat(columns, 4, width),
    whole=jnp.broadcast_to(info[5:6, 0:1], (1, width)),
  )


def clear_padding(info: jax.Array, tokens: jax.Array) -> jax.Array:
  """Tokens [C, heads * D] with zeros for padding, whatever was there."""
  real = _repeat(_columns(info), 2, tokens.shape[1]) > 0
  return jnp.where(real, tokens.astype(jnp.float32), 0.0).astype(tokens.dtype)


def _columns(info: jax.Array) -> jax.Array:
  """[INFO_ROWS, C] -> [C, 128], whose first columns are the rows. Mosaic transposes whole blocks of 128 x 128."""
  return jnp.transpose(jnp.concatenate([info] * (LANES // INFO_ROWS)))


def _repeat(columns: jax.Array, column: int, width: int) -> jax.Array:
  """One column, repeated: [C, width]."""
  return jnp.broadcast_to(columns[:, column : column + 1], (columns.shape[0], width))


def _causal(chunk: int) -> jax.Array:
  return _iota(chunk, 0) >= _iota(chunk, 1)


def _iota(chunk: int, dimension: int) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), dimension).astype(jnp.float32)
