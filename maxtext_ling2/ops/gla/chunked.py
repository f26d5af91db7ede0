"""GLA in chunks, plain JAX, for GPUs and CPUs: matmuls within a chunk, a scan that hands the state from chunk to chunk.

Notable: a decay exponent counts the real tokens between two places of one chunk, so without segments all decays are
constants of (head, chunk), built once outside of the scan. A length that is no multiple of the chunk ends in one
shorter chunk: no token is padded. No decay is ever divided by another (exp(-g j) overflows for a strong decay).
Memory is linear in T: the backward pass gets one state a chunk and computes everything else again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla.block_sizes import chunk_size
from maxtext_ling2.ops.gla.segments import Segments, count_segments
from maxtext_ling2.ops.gla.vjp import Implementation


class _Decays(NamedTuple):
  """Decay factors of one chunk of C tokens, float32, zero across documents. B is 1 without segments.

  Those that lead to outputs, `between` and `since_start`, hold the scale of the outputs.
  """

  between: jax.Array  # [B, H, C, C]: from token j to token i; zero for j > i
  since_start: jax.Array  # [B, C, H, 1]: from the state that enters to token i
  until_end: jax.Array  # [B, C, H, 1]: from token j to the state that leaves
  whole: jax.Array  # [B, H, 1, 1]: from the state that enters to the state that leaves


# (state [B, H, D, Dv], arrays of one chunk, its decays) -> (state, (arrays [B, C, ...], the state to keep or None))
_Step = Callable[[jax.Array, Any, _Decays], tuple[jax.Array, tuple[tuple[jax.Array, ...], jax.Array | None]]]


@functools.cache
def in_chunks_of(size: int | None) -> Implementation:
  """The implementation with chunks of so many tokens; None: `tiles.chunk_size`, which all backends share."""
  return Implementation(functools.partial(_forward, size=size), functools.partial(_backward, size=size))


def _forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array,
  segment_ids: jax.Array | None,
  initial_state: jax.Array | None,
  *,
  scale: float,
  final: bool,
  save: bool,
  size: int | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
  """`Implementation.forward`."""
  state = _zero_state(k, v) if initial_state is None else initial_state
  step = functools.partial(_forward_chunk, save=save)
  state, (o,), states = _over_chunks(step, state, (q, k, v), None, g_gamma, segment_ids, scale, size, reverse=False)
  return o, state if final else None, states


def _backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g_gamma: jax.Array,
  segment_ids: jax.Array | None,
  states: jax.Array,
  do: jax.Array,
  dfinal_state: jax.Array | None,
  *,
  scale: float,
  initial: bool,
  size: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """`Implementation.backward`."""
  dstate = _zero_state(k, do) if dfinal_state is None else dfinal_state
  dstate, (dq, dk, dv), _ = _over_chunks(
    _backward_chunk, dstate, (q, k, v, do), states, g_gamma, segment_ids, scale, size, reverse=True
  )
  return dq, dk, dv, dstate if initial else None


def _forward_chunk(
  state: jax.Array, arrays: tuple[tuple[jax.Array, ...], None], decays: _Decays, *, save: bool
) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], jax.Array | None]]:
  (q, k, v), _ = arrays
  dot = functools.partial(_dot, q.dtype)
  entering = state.astype(q.dtype)
  scores = dot("bihd,bjhd->bhij", q, k) * decays.between
  o = dot("bhij,bjhv->bihv", scores, v) + dot("bihd,bhdv->bihv", q * decays.since_start, entering)
  state = decays.whole * state + dot("bjhd,bjhv->bhdv", k * decays.until_end, v)
  return state, ((o.astype(v.dtype),), entering if save else None)


def _backward_chunk(
  dstate: jax.Array, arrays: tuple[tuple[jax.Array, ...], jax.Array], decays: _Decays
) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], None]]:
  (q, k, v, do), entering = arrays
  dot = functools.partial(_dot, q.dtype)
  scores = dot("bihd,bjhd->bhij", q, k) * decays.between
  dscores = dot("bihv,bjhv->bhij", do, v) * decays.between
  do_start = do * decays.since_start
  dq = dot("bhij,bjhd->bihd", dscores, k) + dot("bihv,bhdv->bihd", do_start, entering)
  dk = dot("bhij,bihd->bjhd", dscores, q) + dot("bjhv,bhdv->bjhd", v * decays.until_end, dstate)
  dv = dot("bhij,bihv->bjhv", scores, do) + dot("bjhd,bhdv->bjhv", k * decays.until_end, dstate)
  dstate = decays.whole * dstate + dot("bihd,bihv->bhdv", q, do_start)
  return dstate, (tuple(x.astype(q.dtype) for x in (dq, dk, dv)), None)


def _over_chunks(
  step: _Step,
  state: jax.Array,
  tokens: Sequence[jax.Array],
  states: jax.Array | None,
  g_gamma: jax.Array,
  segment_ids: jax.Array | None,
  scale: float,
  size: int | None,
  *,
  reverse: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array | None]:
  """Carries the state over the chunks, whole ones by a scan, and a shorter one at the end.

  Takes the first state [B, H, D, Dv] float32, arrays of tokens [B, T, ...] and for each chunk a state [B, H, N, ...], or
  None; returns the last state, outputs [B, T, ...], and the states that the chunks kept [B, H, N, ...], if any.
  """
  length = tokens[0].shape[1]
  size = chunk_size(length) if size is None else size
  whole = length // size
  constant = segment_ids is None
  segments = count_segments(jnp.ones((1, size), jnp.int32) if segment_ids is None else segment_ids, size)
  decays = functools.partial(_decays, g_gamma=g_gamma, scale=scale)

  def all_whole(state: jax.Array) -> tuple[jax.Array, Any]:
    shared = decays(_one_chunk(segments, 0)) if constant else None
    chunks = tuple(_split(x[:, : whole * size], size) for x in tokens)
    by_chunk = None if constant else jax.tree.map(lambda x: x[:, :whole].swapaxes(0, 1), segments)
    entering = None if states is None else jnp.moveaxis(states[:, :, :whole], 2, 0)

    def body(state: jax.Array, chunk: Any) -> tuple[jax.Array, Any]:
      tokens, entering, segments = chunk
      tokens = tokens if constant else _without_padding(tokens, segments)
      return step(state, (tokens, entering), decays(segments) if shared is None else shared)

    state, (outputs, kept) = jax.lax.scan(body, state, (chunks, entering, by_chunk), reverse=reverse)
    return state, (tuple(map(_joined, outputs)), None if kept is None else jnp.moveaxis(kept, 0, 2))

  def short_one(state: jax.Array) -> tuple[jax.Array, Any]:
    rest = length - whole * size
    one = count_segments(jnp.ones((1, rest), jnp.int32), rest) if constant else segments
    one = jax.tree.map(lambda x: x[:, :rest], _one_chunk(one, -1))
    last = tuple(x[:, whole * size :] for x in tokens)
    last = last if constant else _without_padding(last, one)
    state, (outputs, kept) = step(state, (last, None if states is None else states[:, :, whole]), decays(one))
    return state, (outputs, None if kept is None else kept[:, :, None])

  parts = [part for part, used in ((all_whole, whole > 0), (short_one, length % size > 0)) if used]
  found = []
  for part in parts[::-1] if reverse else parts:
    state, results = part(state)
    found.append(results)
  return state, *_concatenated(found[::-1] if reverse else found)


def _concatenated(parts: list[Any]) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
  """Outputs [B, T, ...] and states [B, H, N, ...] of consecutive parts, put together."""
  outputs = tuple(jnp.concatenate(x, axis=1) for x in zip(*(part[0] for part in parts), strict=True))
  kept = [part[1] for part in parts]
  return outputs, None if kept[0] is None else jnp.concatenate(kept, axis=2)


def _one_chunk(segments: Segments, index: int) -> Segments:
  """[B, N, C] -> [B, C]."""
  return Segments(*(x[:, index] for x in segments))


def _split(x: jax.Array, size: int) -> jax.Array:
  """[B, N * C, ...] -> [N, B, C, ...]."""
  return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _joined(x: jax.Array) -> jax.Array:
  """[N, B, C, ...] -> [B, N * C, ...]."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _without_padding(tokens: Sequence[jax.Array], segments: Segments) -> tuple[jax.Array, ...]:
  """Zero for padding, whatever was there."""
  return tuple(jnp.where(segments.real[..., None, None], x, 0) for x in tokens)


def _zero_state(keys: jax.Array, values: jax.Array) -> jax.Array:
  """Zeros [B, H, D, Dv]. Like a product, not plain zeros: so they have the sharding (or varying axes) a scan wants."""
  return jnp.zeros_like(keys[:, 0, :, :, None] * values[:, 0, :, None, :], jnp.float32)


def _decays(segments: Segments, *, g_gamma: jax.Array, scale: float) -> _Decays:
  """Decays of a chunk whose segments are [B, C] (`whole`: [B, 1])."""
  count, document = segments.position, segments.document
  same = jnp.tri(count.shape[1], dtype=bool) & (document[:, :, None] == document[:, None, :])  # [B, C, C]
  distance = jnp.where(same, count[:, :, None] - count[:, None, :], -1)
  g = g_gamma[:, None]  # [H, 1]
  return _Decays(
    between=scale * _decay(g[:, :, None], distance[:, None]),
    since_start=scale * _decay(g, segments.since_start[..., None, None]),
    until_end=_decay(g, segments.until_end[..., None, None]),
    whole=_decay(g[:, :, None], segments.whole[:, None, None]),
  )


def _decay(g: jax.Array, distance: jax.Array) -> jax.Array:
  """exp(g * distance), 0 where the distance is negative (there the exp could overflow)."""
  return jnp.where(distance < 0, 0.0, jnp.exp(g * jnp.maximum(distance, 0)))


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
