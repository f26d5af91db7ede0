"""GLA in chunks, plain JAX: matmuls within a chunk, a scan that hands the state from chunk to chunk.

Notable: a decay exponent counts the real tokens between two places of one chunk, so without segments all decays are
constants of (head, chunk), built once outside of the scan. A length that is no multiple of the chunk ends in one
shorter chunk: no token is padded. No decay is ever divided by another (exp(-g j) overflows for a strong decay).
Memory is linear in T: the backward pass keeps one state a chunk and computes everything else again.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK_SIZE = 128


class _Decays(NamedTuple):
  """Decay factors of one chunk of C tokens, all in [0, 1] and zero across documents. B is 1 without segments."""

  between: jax.Array  # [B, H, C, C]: from token j to token i; zero for j > i
  since_start: jax.Array  # [B, C, H]: from the state that enters to token i
  until_end: jax.Array  # [B, C, H]: from token j to the state that leaves
  whole: jax.Array  # [B, H]: from the state that enters to the state that leaves


# (state [B, H, D, Dv], (q, k [B, C, H, D], v [B, C, H, Dv], with segments also real, restart [B, C])) -> (state, o)
_Step = Callable[[jax.Array, tuple[jax.Array, ...]], tuple[jax.Array, jax.Array]]


def chunked(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array,
  *,
  segment_ids: jax.Array | None,
  initial_state: jax.Array,
  scale: float,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[jax.Array, jax.Array]:
  """GLA in chunks of `chunk_size` tokens. Arguments and results as in `api.Backend`."""
  tokens = (q, k, v) if segment_ids is None else (q, k, v, *_real_and_restart(segment_ids))
  make_step = functools.partial(_step, g_gamma, scale, segment_ids is not None)
  batch, length, heads, value_dim = v.shape
  num_chunks, rest = divmod(length, chunk_size)
  whole = num_chunks * chunk_size
  state, outputs = initial_state, []
  if num_chunks:
    chunks = jax.tree.map(lambda x: _split(x[:, :whole], chunk_size), tokens)
    # Without the checkpoint the scan would keep the [C, C] scores of every chunk for the backward pass. A scan keeps
    # XLA from merging the second computation with the first, so prevent_cse would only cost.
    step = jax.checkpoint(make_step(chunk_size), prevent_cse=False)
    state, o = jax.lax.scan(step, state, chunks)  # [N, B, C, H, Dv]
    outputs.append(o.swapaxes(0, 1).reshape(batch, whole, heads, value_dim))
  if rest:
    state, o = make_step(rest)(state, jax.tree.map(lambda x: x[:, whole:], tokens))
    outputs.append(o)
  return jnp.concatenate(outputs, axis=1), state


def _split(x: jax.Array, chunk_size: int) -> jax.Array:
  """[B, N * C, ...] -> [N, B, C, ...]."""
  return x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]).swapaxes(0, 1)


def _step(g_gamma: jax.Array, scale: float, segmented: bool, size: int) -> _Step:
  """The body of the scan over chunks of `size` tokens."""
  if segmented:
    return functools.partial(_segmented_chunk, g_gamma=g_gamma, scale=scale)
  constant = _decays(g_gamma, count=jnp.arange(1, size + 1)[None], document=jnp.zeros((1, size), jnp.int32))
  return functools.partial(_chunk, decays=constant, scale=scale)


def _segmented_chunk(
  state: jax.Array, tokens: tuple[jax.Array, ...], *, g_gamma: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """One chunk with padding and borders of documents."""
  *values, real, restart = tokens
  q, k, v = (jnp.where(real[..., None, None], x, 0) for x in values)
  decays = _decays(g_gamma, count=jnp.cumsum(real, axis=1), document=jnp.cumsum(restart, axis=1))
  return _chunk(state, (q, k, v), decays=decays, scale=scale)


def _chunk(
  state: jax.Array, tokens: tuple[jax.Array, ...], *, decays: _Decays, scale: float
) -> tuple[jax.Array, jax.Array]:
  """One chunk: the state that leaves it, and its outputs [B, C, H, Dv] in v's dtype."""
  q, k, v = tokens
  dot = functools.partial(_dot, jnp.result_type(q, k, v))
  scores = dot("bihd,bjhd->bhij", q, k) * decays.between
  within = dot("bhij,bjhv->bihv", scores, v)
  before = dot("bihd,bhdv->bihv", q, state) * decays.since_start[..., None]
  added = dot("bjhd,bjhv->bhdv", k * decays.until_end[..., None], v)
  return decays.whole[..., None, None] * state + added, (scale * (within + before)).astype(v.dtype)


def _dot(dtype: jnp.dtype, subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """The float32 product of two operands rounded to dtype, which is float32 or bfloat16."""

  def product(x: jax.Array, y: jax.Array, precision: jax.lax.Precision | None = None) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)

  def float32_product(x: jax.Array, y: jax.Array) -> jax.Array:
    return product(x.astype(jnp.float32), y.astype(jnp.float32), jax.lax.Precision.HIGHEST)

  x, y = x.astype(dtype), y.astype(dtype)
  if dtype == jnp.float32:
    return float32_product(x, y)
  # XLA's CPU runtime lacks some bfloat16 products with a float32 result ("UNIMPLEMENTED: Unsupported element type for
  # DotThunk::Execute: BF16 x BF16 = F32", jaxlib 0.12.0.1); the float32 product of the rounded operands is the same.
  result: jax.Array = jax.lax.platform_dependent(x, y, cpu=float32_product, default=product)
  return result


def _decays(g_gamma: jax.Array, count: jax.Array, document: jax.Array) -> _Decays:
  """Decays of a chunk.

  Args:
    g_gamma: [H] log decay.
    count: [B, C] number of real tokens of the chunk up to and with each place.
    document: [B, C] number of restarts in the chunk up to and with each place; 0 = the document of the entering state.
  """
  causal = jnp.tri(count.shape[1], dtype=bool)
  same = causal & (document[:, :, None] == document[:, None, :])  # [B, C, C]
  # Above the diagonal the difference is negative and its exp could overflow: clip first, mask after.
  distance = jnp.maximum(count[:, :, None] - count[:, None, :], 0)
  last_count, last_document = count[:, -1:], document[:, -1:]
  return _Decays(
    between=jnp.where(same[:, None], jnp.exp(g_gamma[:, None, None] * distance[:, None]), 0.0),
    since_start=_masked_exp(document == 0, g_gamma, count),
    until_end=_masked_exp(document == last_document, g_gamma, last_count - count),
    whole=_masked_exp(last_document == 0, g_gamma, last_count)[:, 0],
  )


def _masked_exp(mask: jax.Array, g_gamma: jax.Array, count: jax.Array) -> jax.Array:
  """exp(g * count) where the mask holds, else 0: [B, C] -> [B, C, H]."""
  return jnp.where(mask[..., None], jnp.exp(g_gamma * count[..., None]), 0.0)


def _real_and_restart(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Which tokens are not padding, and which open another document than the last real token before: bool [B, T]."""
  real = segment_ids != 0
  last = jax.lax.cummax(jnp.where(real, jnp.arange(real.shape[1]), -1), axis=1)  # place of the last real token so far
  before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
  return real, real & (before >= 0) & (segment_ids != id_before)
