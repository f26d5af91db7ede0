"""The backend "pallas": lays out the arrays for the TPU kernels, and gives the kernels derivatives.

The kernels take tokens [B, T, H * D] with D a multiple of 128; other D are padded with zeros here. Any T is allowed: the
last grid step may extend past the end, and the tokens there count as padding.
"""

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla import pallas_kernels
from maxtext_ling2.ops.gla.base import GlaInputs, Gradients, Outputs
from maxtext_ling2.ops.gla.block_sizes import block_sizes_for
from maxtext_ling2.ops.gla.chunked import chunked
from maxtext_ling2.ops.gla.pallas_chunk import segment_meta
from maxtext_ling2.ops.gla.pallas_grid import Grid
from maxtext_ling2.ops.gla.segments import count_segments
from maxtext_ling2.ops.gla.vjp import Implementation
from maxtext_ling2.ops.pallas_utils import LANES, differentiable


def _forward(inputs: GlaInputs, *, scale: float, output_final_state: bool, save_residuals: bool) -> Outputs:
  q, k, v, g_gamma, segment_ids, initial_state = inputs
  grid = _grid(q, v, reverse=False)
  has_padding, meta = segments_by_step(segment_ids, grid)
  arrays = pallas_kernels.ForwardInputs(_flat(q), _flat(k), _flat(v), meta, _pad_state(initial_state))
  o, final_state, chunk_states = pallas_kernels.forward(
    arrays,
    g_gamma,
    has_padding,
    grid,
    scale=scale,
    output_final_state=output_final_state,
    save_residuals=save_residuals,
  )
  final_state, chunk_states = (_unpad_state(x, q, v) for x in (final_state, chunk_states))
  return Outputs(_heads(o, v), final_state, chunk_states)


def _backward(
  inputs: GlaInputs,
  chunk_states: jax.Array,
  do: jax.Array,
  dfinal_state: jax.Array | None,
  *,
  scale: float,
  has_initial_state: bool,
) -> Gradients:
  q, k, v, g_gamma, segment_ids, _ = inputs
  grid = _grid(q, v, reverse=True)
  has_padding, meta = segments_by_step(segment_ids, grid)
  arrays = pallas_kernels.BackwardInputs(
    _flat(q), _flat(k), _flat(v), _flat(do), meta, _pad_state(chunk_states), _pad_state(dfinal_state)
  )
  dq, dk, dv, dinitial_state = pallas_kernels.backward(
    arrays, g_gamma, has_padding, grid, scale=scale, has_initial_state=has_initial_state
  )
  dinitial_state = _unpad_state(dinitial_state, q, v)
  return Gradients(_heads(dq, q), _heads(dk, k), _heads(dv, v), dinitial_state)


_xla_fallback = chunked()
pallas = Implementation(
  differentiable(_forward, _xla_fallback.forward), differentiable(_backward, _xla_fallback.backward)
)


def _grid(q: jax.Array, v: jax.Array, *, reverse: bool) -> Grid:
  batch, length, heads, key_dim = q.shape
  key_dim, value_dim = _up_to_lanes(key_dim), _up_to_lanes(v.shape[3])
  sizes = block_sizes_for(length, heads, max(key_dim, value_dim), q.dtype.itemsize)
  return Grid(batch, length, heads, key_dim, value_dim, sizes.backward if reverse else sizes.forward, reverse)


def segments_by_step(segment_ids: jax.Array | None, grid: Grid) -> tuple[jax.Array | None, jax.Array | None]:
  """Whether each step holds padding [B, steps] int32, and the segment metadata; None, None if all chunks are dense."""
  if segment_ids is None:
    if grid.length % grid.tokens == 0:
      return None, None
    segment_ids = jnp.ones((grid.batch, grid.length), jnp.int32)
  segments = count_segments(segment_ids, grid.block.chunk_size, grid.steps * grid.block.num_chunks)
  has_padding = (~segments.real).reshape(grid.batch, grid.steps, -1).any(axis=2)
  return has_padding.astype(jnp.int32), segment_meta(segments)


def _up_to_lanes(dim: int) -> int:
  return -(-dim // LANES) * LANES


def _flat(x: jax.Array) -> jax.Array:
  """[B, T, H, D] -> [B, T, H * D'], D' the next multiple of 128."""
  padding = _up_to_lanes(x.shape[3]) - x.shape[3]
  x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding))) if padding else x
  return x.reshape(*x.shape[:2], -1)


def _heads(flat: jax.Array, like: jax.Array) -> jax.Array:
  """[B, T, H * D'] -> [B, T, H, D], the shape of `like`."""
  return flat.reshape(*like.shape[:3], -1)[..., : like.shape[3]]


def _pad_state(state: jax.Array | None) -> jax.Array | None:
  """[..., D, Dv] -> [..., D', Dv']."""
  if state is None:
    return None
  padding = [(0, 0)] * (state.ndim - 2) + [(0, _up_to_lanes(dim) - dim) for dim in state.shape[-2:]]
  return jnp.pad(state, padding)


def _unpad_state(state: jax.Array | None, q: jax.Array, v: jax.Array) -> jax.Array | None:
  """[..., D', Dv'] -> [..., D, Dv]."""
  return None if state is None else state[..., : q.shape[3], : v.shape[3]]
