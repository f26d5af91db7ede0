"""GLA's TPU kernels by themselves, as programs for `tpu_static`: flat arrays, the tiles of the chip."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxtext_ling2.ops.gla import pallas_backward, pallas_forward
from maxtext_ling2.ops.gla.pallas_chunk import INFO_ROWS
from maxtext_ling2.ops.gla.pallas_grid import PLAIN, Grid
from maxtext_ling2.ops.gla.pallas_tpu import segments_by_step
from maxtext_ling2.ops.gla.tiles import Tile, Tiles, tiles_for

Program = tuple[Callable[..., Any], tuple[Any, ...]]
TOKENS_PER_DOCUMENT = 512
"""Of the packed sequences: 8 documents in 4096 tokens."""


def forward(length: int, heads: int, *, save: bool, masked: bool = False, tile: list[int] | None = None) -> Program:
  """The forward kernel: q, k, v [1, T, H * 128] bfloat16 -> o, and the states of the chunks if they are to be saved."""
  grid = make_grid(length, heads, reverse=False, masked=masked, tile=tile)
  tokens, flags, info = _arrays(grid, masked)

  def run(q: Any, k: Any, v: Any, g: Any, flags: Any, info: Any) -> Any:
    inputs = pallas_forward.Inputs(q, k, v, info, None)
    return pallas_forward.forward(inputs, g, flags, grid, scale=128**-0.5, final=False, save=save)

  return run, (tokens, tokens, tokens, jax.ShapeDtypeStruct((heads,), jnp.float32), flags, info)


def backward(length: int, heads: int, *, masked: bool = False, tile: list[int] | None = None) -> Program:
  """The backward kernel: q, k, v, do, states -> dq, dk, dv."""
  grid = make_grid(length, heads, reverse=True, masked=masked, tile=tile)
  tokens, flags, info = _arrays(grid, masked)
  states = jax.ShapeDtypeStruct((1, heads, grid.chunks, 128, 128), jnp.bfloat16)

  def run(q: Any, k: Any, v: Any, do: Any, states: Any, g: Any, flags: Any, info: Any) -> Any:
    inputs = pallas_backward.Inputs(q, k, v, do, info, states, None)
    return pallas_backward.backward(inputs, g, flags, grid, scale=128**-0.5, initial=False)

  return run, (*[tokens] * 4, states, jax.ShapeDtypeStruct((heads,), jnp.float32), flags, info)


def make_grid(
  length: int, heads: int, *, reverse: bool, masked: bool = False, tile: list[int] | None = None, kind: str | None = None
) -> Grid:
  """The grid the operation uses for this shape on the device kind traced for, or one with another tile."""
  tiles = tiles_for(length, heads, 128, 2, kind) if tile is None else Tiles(Tile(*tile), Tile(*tile))
  return Grid(1, length, heads, 128, 128, tiles.backward if reverse else tiles.forward, reverse, all_masked=masked)


def masked_share(length: int, heads: int, *, reverse: bool, kind: str) -> float:
  """The share of grid steps that hold a border, in a sequence of documents of 512 tokens on average."""
  rng = np.random.default_rng(0)
  cuts = np.sort(rng.choice(np.arange(1, length), length // TOKENS_PER_DOCUMENT - 1, replace=False))
  ids = 1 + np.searchsorted(cuts, np.arange(length), side="right").astype(np.int32)
  flags, _ = segments_by_step(jnp.asarray(ids[None]), make_grid(length, heads, reverse=reverse, kind=kind))
  return float((np.asarray(flags) != PLAIN).mean())


def _arrays(grid: Grid, masked: bool) -> tuple[Any, Any, Any]:
  """Tokens, and with borders what each step holds and the information on segments."""
  tokens = jax.ShapeDtypeStruct((1, grid.length, grid.heads * 128), jnp.bfloat16)
  if not masked:
    return tokens, None, None
  flags = jax.ShapeDtypeStruct((1, grid.steps), jnp.int32)
  return tokens, flags, jax.ShapeDtypeStruct((1, INFO_ROWS, grid.steps * grid.tokens), jnp.float32)
