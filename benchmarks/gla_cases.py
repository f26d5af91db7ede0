"""GLA's TPU kernels by themselves, as programs for `tpu_static`: flat arrays, the tiles of the chip."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla import pallas_kernels
from maxtext_ling2.ops.gla.block_sizes import Tile, Tiles, tiles_for
from maxtext_ling2.ops.gla.pallas_chunk import INFO_ROWS
from maxtext_ling2.ops.gla.pallas_grid import Grid

Program = tuple[Callable[..., Any], tuple[Any, ...]]


def forward(length: int, heads: int, *, save: bool, packed: bool = False, tile: list[int] | None = None) -> Program:
  """The forward kernel: q, k, v [1, T, H * 128] bfloat16 -> o, and the states of the chunks if they are to be saved."""
  grid = make_grid(length, heads, reverse=False, tile=tile)
  tokens, padded, info = _arrays(grid, packed)

  def run(q: Any, k: Any, v: Any, g: Any, padded: Any, info: Any) -> Any:
    inputs = pallas_kernels.ForwardInputs(q, k, v, info, None)
    return pallas_kernels.forward(inputs, g, padded, grid, scale=128**-0.5, final=False, save=save)

  return run, (tokens, tokens, tokens, jax.ShapeDtypeStruct((heads,), jnp.float32), padded, info)


def backward(length: int, heads: int, *, packed: bool = False, tile: list[int] | None = None) -> Program:
  """The backward kernel: q, k, v, do, states -> dq, dk, dv."""
  grid = make_grid(length, heads, reverse=True, tile=tile)
  tokens, padded, info = _arrays(grid, packed)
  states = jax.ShapeDtypeStruct((1, heads, grid.chunks, 128, 128), jnp.bfloat16)

  def run(q: Any, k: Any, v: Any, do: Any, states: Any, g: Any, padded: Any, info: Any) -> Any:
    inputs = pallas_kernels.BackwardInputs(q, k, v, do, info, states, None)
    return pallas_kernels.backward(inputs, g, padded, grid, scale=128**-0.5, initial=False)

  return run, (*[tokens] * 4, states, jax.ShapeDtypeStruct((heads,), jnp.float32), padded, info)


def make_grid(
  length: int, heads: int, *, reverse: bool, packed: bool = False, tile: list[int] | None = None, kind: str | None = None
) -> Grid:
  """The grid the operation uses for this shape on the device kind traced for, or one with another tile."""
  tiles = tiles_for(length, heads, 128, 2, kind) if tile is None else Tiles(Tile(*tile), Tile(*tile))
  return Grid(1, length, heads, 128, 128, tiles.backward if reverse else tiles.forward, reverse, padding=False)


def _arrays(grid: Grid, packed: bool) -> tuple[Any, Any, Any]:
  """Tokens, and of packed documents which steps hold padding, and the information on segments."""
  tokens = jax.ShapeDtypeStruct((1, grid.length, grid.heads * 128), jnp.bfloat16)
  if not packed:
    return tokens, None, None
  padded = jax.ShapeDtypeStruct((1, grid.steps), jnp.int32)
  return tokens, padded, jax.ShapeDtypeStruct((1, INFO_ROWS, grid.steps * grid.tokens), jnp.float32)
