"""GLA by Mosaic kernels for TPUs: what surrounds the kernels.

The kernels want tokens [B, T, H * D] with D a multiple of 128; any other D is filled up with zeros here. Any T will do:
the last grid step may reach beyond the end, and what it finds there is treated as padding.
"""

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla import pallas_kernels
from maxtext_ling2.ops.gla.block_sizes import Tile, tiles_for
from maxtext_ling2.ops.gla.chunked import in_chunks_of
from maxtext_ling2.ops.gla.pallas_chunk import segment_info
from maxtext_ling2.ops.gla.pallas_grid import Grid
from maxtext_ling2.ops.gla.segments import count_segments
from maxtext_ling2.ops.gla.vjp import Implementation
from maxtext_ling2.ops.pallas_utils import LANES, differentiable


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
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
  """`Implementation.forward`."""
  grid = _grid(q, v, reverse=False)
  padded, info = segments_by_step(segment_ids, grid)
  inputs = pallas_kernels.ForwardInputs(_flat(q), _flat(k), _flat(v), info, _padded_state(initial_state))
  found = pallas_kernels.forward(inputs, g_gamma, padded, grid, scale=scale, final=final, save=save)
  key_dim, value_dim = q.shape[3], v.shape[3]
  final_state, states = (None if x is None else x[..., :key_dim, :value_dim] for x in found[1:])
  return _heads(found.o, v), final_state, states


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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """`Implementation.backward`."""
  grid = _grid(q, v, reverse=True)
  padded, info = segments_by_step(segment_ids, grid)
  inputs = pallas_kernels.BackwardInputs(
    _flat(q), _flat(k), _flat(v), _flat(do), info, _padded_state(states), _padded_state(dfinal_state)
  )
  found = pallas_kernels.backward(inputs, g_gamma, padded, grid, scale=scale, initial=initial)
  dstate = found.dinitial_state
  dstate = None if dstate is None else dstate[..., : q.shape[3], : v.shape[3]]
  return _heads(found.dq, q), _heads(found.dk, k), _heads(found.dv, v), dstate


_twin = in_chunks_of(None)
pallas = Implementation(differentiable(_forward, _twin.forward), differentiable(_backward, _twin.backward))


def _grid(q: jax.Array, v: jax.Array, *, reverse: bool) -> Grid:
  batch, length, heads, key_dim = q.shape
  key_dim, value_dim = _up_to_lanes(key_dim), _up_to_lanes(v.shape[3])
  tiles = tiles_for(length, heads, max(key_dim, value_dim), q.dtype.itemsize)
  tile: Tile = tiles.backward if reverse else tiles.forward
  return Grid(batch, length, heads, key_dim, value_dim, tile, reverse)


def segments_by_step(segment_ids: jax.Array | None, grid: Grid) -> tuple[jax.Array | None, jax.Array | None]:
  """Whether each step holds padding [B, steps] int32, and the information on segments; None if all tokens are one."""
  if segment_ids is None:
    if grid.length % grid.tokens == 0:
      return None, None
    segment_ids = jnp.ones((grid.batch, grid.length), jnp.int32)
  segments = count_segments(segment_ids, grid.tile.chunk, grid.steps * grid.tile.chunks)
  padded = (~segments.real).reshape(grid.batch, grid.steps, -1).any(axis=2)
  return padded.astype(jnp.int32), segment_info(segments)


def _up_to_lanes(dim: int) -> int:
  return -(-dim // LANES) * LANES


def _flat(x: jax.Array) -> jax.Array:
  """[B, T, H, D] -> [B, T, H * D'], D' the next multiple of 128."""
  fill = _up_to_lanes(x.shape[3]) - x.shape[3]
  x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, fill))) if fill else x
  return x.reshape(*x.shape[:2], -1)


def _heads(flat: jax.Array, like: jax.Array) -> jax.Array:
  """[B, T, H * D'] -> [B, T, H, D], the shape of `like`."""
  return flat.reshape(*like.shape[:3], -1)[..., : like.shape[3]]


def _padded_state(state: jax.Array | None) -> jax.Array | None:
  """A state [..., D, Dv], or states, filled up to multiples of 128."""
  if state is None:
    return None
  fill = [(0, 0)] * (state.ndim - 2) + [(0, _up_to_lanes(dim) - dim) for dim in state.shape[-2:]]
  return jnp.pad(state, fill)
