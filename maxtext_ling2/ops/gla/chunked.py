"""GLA in chunks, in plain JAX, for GPUs and CPUs: matmuls within a chunk, a scan over chunks that carries the state.

The equations are in README.md. Notable: the exponent of a decay is the number of real tokens between two tokens of a
chunk, so without segments all decays are constants of (head, chunk), computed once outside the scan. If the chunk size
does not divide T, the last chunk is shorter: no token is padded. No decay is divided by another (exp(-g j) overflows for
a strong decay). Memory is linear in T: the backward pass reads one state per chunk and recomputes the rest.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla import block_sizes
from maxtext_ling2.ops.gla.base import GlaInputs, Gradients, Outputs
from maxtext_ling2.ops.gla.segments import Segments, count_segments
from maxtext_ling2.ops.gla.vjp import Implementation


class _Decays(NamedTuple):
  """Decay factors of one chunk of C tokens, float32, zero across documents. B is 1 without segments.

  `intra_chunk_decay` and `q_decay`, which lead to outputs, include the scale of the outputs.
  """

  intra_chunk_decay: jax.Array  # [B, H, C, C]: from token j to token i; zero for j > i
  q_decay: jax.Array  # [B, C, H, 1]: from h_in to token i
  k_decay: jax.Array  # [B, C, H, 1]: from token j to h_out
  chunk_decay: jax.Array  # [B, H, 1, 1]: from h_in to h_out


# (state [B, H, D, Dv], (arrays of one chunk, h_in or None), decays) -> (state, (arrays [B, C, ...], h_in or None))
_Step = Callable[[jax.Array, Any, _Decays], tuple[jax.Array, tuple[tuple[jax.Array, ...], jax.Array | None]]]


@functools.cache
def chunked(chunk_size: int | None = None) -> Implementation:
  """The implementation with chunks of `chunk_size` tokens; None: `block_sizes.chunk_size`, as all backends."""
  return Implementation(
    functools.partial(_forward, chunk_size=chunk_size), functools.partial(_backward, chunk_size=chunk_size)
  )


def _forward(
  inputs: GlaInputs, *, scale: float, output_final_state: bool, save_residuals: bool, chunk_size: int | None
) -> Outputs:
  q, k, v = inputs[:3]
  state = _zero_state(k, v) if inputs.initial_state is None else inputs.initial_state
  step = functools.partial(_forward_chunk, save_residuals=save_residuals)
  state, (o,), chunk_states = _over_chunks(step, state, (q, k, v), None, inputs, scale, chunk_size, reverse=False)
  return Outputs(o, state if output_final_state else None, chunk_states)


def _backward(
  inputs: GlaInputs,
  chunk_states: jax.Array,
  do: jax.Array,
  dfinal_state: jax.Array | None,
  *,
  scale: float,
  has_initial_state: bool,
  chunk_size: int | None,
) -> Gradients:
  q, k, v = inputs[:3]
  dstate = _zero_state(k, do) if dfinal_state is None else dfinal_state
  dstate, (dq, dk, dv), _ = _over_chunks(
    _backward_chunk, dstate, (q, k, v, do), chunk_states, inputs, scale, chunk_size, reverse=True
  )
  return Gradients(dq, dk, dv, dstate if has_initial_state else None)


def _forward_chunk(
  state: jax.Array, arrays: tuple[tuple[jax.Array, ...], None], decays: _Decays, *, save_residuals: bool
) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], jax.Array | None]]:
  (q, k, v), _ = arrays
  dot = functools.partial(_dot, q.dtype)
  h_in = state.astype(q.dtype)  # [B, H, D, Dv]
  scores = dot("bihd,bjhd->bhij", q, k) * decays.intra_chunk_decay  # [B, H, C, C]
  o = dot("bhij,bjhv->bihv", scores, v) + dot("bihd,bhdv->bihv", q * decays.q_decay, h_in)  # [B, C, H, Dv]
  h_out = decays.chunk_decay * state + dot("bjhd,bjhv->bhdv", k * decays.k_decay, v)
  return h_out, ((o.astype(v.dtype),), h_in if save_residuals else None)


def _backward_chunk(
  dh_out: jax.Array, arrays: tuple[tuple[jax.Array, ...], jax.Array], decays: _Decays
) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], None]]:
  (q, k, v, do), h_in = arrays
  dot = functools.partial(_dot, q.dtype)
  scores = dot("bihd,bjhd->bhij", q, k) * decays.intra_chunk_decay  # [B, H, C, C]
  dscores = dot("bihv,bjhv->bhij", do, v) * decays.intra_chunk_decay
  decayed_do = do * decays.q_decay  # [B, C, H, Dv]
  dq = dot("bhij,bjhd->bihd", dscores, k) + dot("bihv,bhdv->bihd", decayed_do, h_in)
  dk = dot("bhij,bihd->bjhd", dscores, q) + dot("bjhv,bhdv->bjhd", v * decays.k_decay, dh_out)
  dv = dot("bhij,bihv->bjhv", scores, do) + dot("bjhd,bhdv->bjhv", k * decays.k_decay, dh_out)
  dh_in = decays.chunk_decay * dh_out + dot("bihd,bihv->bhdv", q, decayed_do)
  return dh_in, (tuple(x.astype(q.dtype) for x in (dq, dk, dv)), None)


def _over_chunks(
  step: _Step,
  state: jax.Array,
  tokens: Sequence[jax.Array],
  chunk_states: jax.Array | None,
  inputs: GlaInputs,
  scale: float,
  chunk_size: int | None,
  *,
  reverse: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array | None]:
  """Carries the state over the chunks: a scan over the full chunks, and one call for a shorter last chunk.

  Args:
    step: computes one chunk.
    state: [B, H, D, Dv] float32, the state before the first chunk (with `reverse` the gradient after the last one).
    tokens: arrays [B, T, ...].
    chunk_states: [B, H, N, D, Dv], or None.
    inputs: for g_gamma and segment_ids.
    scale: factor of the outputs.
    chunk_size: tokens per chunk, C; None: `block_sizes.chunk_size`.
    reverse: from the last chunk to the first.

  Returns:
    The state after all chunks, outputs [B, T, ...], and the states that the steps save [B, H, N, D, Dv], or None.
  """
  length = tokens[0].shape[1]
  size = block_sizes.chunk_size(length) if chunk_size is None else chunk_size
  num_full = length // size
  segment_ids = inputs.segment_ids
  constant = segment_ids is None
  segments = count_segments(jnp.ones((1, size), jnp.int32) if segment_ids is None else segment_ids, size)
  decays = functools.partial(_decays, g_gamma=inputs.g_gamma, scale=scale)

  def full_chunks(state: jax.Array) -> tuple[jax.Array, Any]:
    constant_decays = decays(_one_chunk(segments, 0)) if constant else None
    chunks = tuple(_split(x[:, : num_full * size], size) for x in tokens)
    by_chunk = None if constant else jax.tree.map(lambda x: x[:, :num_full].swapaxes(0, 1), segments)
    h_in = None if chunk_states is None else jnp.moveaxis(chunk_states[:, :, :num_full], 2, 0)

    def body(state: jax.Array, chunk: Any) -> tuple[jax.Array, Any]:
      tokens, h_in, segments = chunk
      tokens = tokens if constant else _zero_padding(tokens, segments)
      return step(state, (tokens, h_in), decays(segments) if constant_decays is None else constant_decays)

    state, (outputs, saved) = jax.lax.scan(body, state, (chunks, h_in, by_chunk), reverse=reverse)
    return state, (tuple(map(_joined, outputs)), None if saved is None else jnp.moveaxis(saved, 0, 2))

  def last_chunk(state: jax.Array) -> tuple[jax.Array, Any]:
    rest = length - num_full * size
    last_segments = count_segments(jnp.ones((1, rest), jnp.int32), rest) if constant else segments
    last_segments = jax.tree.map(lambda x: x[:, :rest], _one_chunk(last_segments, -1))
    last = tuple(x[:, num_full * size :] for x in tokens)
    last = last if constant else _zero_padding(last, last_segments)
    h_in = None if chunk_states is None else chunk_states[:, :, num_full]
    state, (outputs, saved) = step(state, (last, h_in), decays(last_segments))
    return state, (outputs, None if saved is None else saved[:, :, None])

  parts = [part for part, used in ((full_chunks, num_full > 0), (last_chunk, length % size > 0)) if used]
  results = []
  for part in parts[::-1] if reverse else parts:
    state, result = part(state)
    results.append(result)
  return state, *_concatenated(results[::-1] if reverse else results)


def _concatenated(parts: list[Any]) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
  """Outputs [B, T, ...] and states [B, H, N, ...] of consecutive parts, concatenated."""
  outputs = tuple(jnp.concatenate(x, axis=1) for x in zip(*(part[0] for part in parts), strict=True))
  saved = [part[1] for part in parts]
  return outputs, None if saved[0] is None else jnp.concatenate(saved, axis=2)


def _one_chunk(segments: Segments, index: int) -> Segments:
  """[B, N, C] -> [B, C]."""
  return Segments(*(x[:, index] for x in segments))


def _split(x: jax.Array, size: int) -> jax.Array:
  """[B, N * C, ...] -> [N, B, C, ...]."""
  return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _joined(x: jax.Array) -> jax.Array:
  """[N, B, C, ...] -> [B, N * C, ...]."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _zero_padding(tokens: Sequence[jax.Array], segments: Segments) -> tuple[jax.Array, ...]:
  """Zeros in place of padding, which may hold NaN."""
  return tuple(jnp.where(segments.real[..., None, None], x, 0) for x in tokens)


def _zero_state(keys: jax.Array, values: jax.Array) -> jax.Array:
  """Zeros [B, H, D, Dv], made from k and v: so they have the sharding (or varying axes) that a scan requires."""
  return jnp.zeros_like(keys[:, 0, :, :, None] * values[:, 0, :, None, :], jnp.float32)


def _decays(segments: Segments, *, g_gamma: jax.Array, scale: float) -> _Decays:
  """Decays of a chunk whose segments are [B, C] (`chunk_distance`: [B, 1])."""
  position, document = segments.position, segments.document
  connected = jnp.tri(position.shape[1], dtype=bool) & (document[:, :, None] == document[:, None, :])  # [B, C, C]
  distance = jnp.where(connected, position[:, :, None] - position[:, None, :], -1)
  g = g_gamma[:, None]  # [H, 1]
  return _Decays(
    intra_chunk_decay=scale * _decay(g[:, :, None], distance[:, None]),
    q_decay=scale * _decay(g, segments.q_distance[..., None, None]),
    k_decay=_decay(g, segments.k_distance[..., None, None]),
    chunk_decay=_decay(g[:, :, None], segments.chunk_distance[:, None, None]),
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
  # DotThunk::Execute: BF16 x BF16 = F32", jaxlib 0.12.0.1); the float32 product of the rounded operands is equal.
  result: jax.Array = jax.lax.platform_dependent(x, y, cpu=float32_product, default=product)
  return result
