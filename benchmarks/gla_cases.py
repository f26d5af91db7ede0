"""GLA's TPU kernels by themselves, as programs for `tpu_static`: flat arrays, the block sizes of the chip."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla import pallas_kernels
from maxtext_ling2.ops.gla.block_sizes import Block, BlockSizes, block_sizes_for
from maxtext_ling2.ops.gla.pallas_chunk import META_ROWS
from maxtext_ling2.ops.gla.pallas_grid import Grid

Program = tuple[Callable[..., Any], tuple[Any, ...]]


def forward(length: int, heads: int, *, save: bool, packed: bool = False, block: list[int] | None = None) -> Program:
  """The forward kernel: q, k, v [1, T, H * 128] bfloat16 -> o, and the states of the chunks if they are to be saved."""
  grid = make_grid(length, heads, reverse=False, block=block)
  tokens, has_padding, meta = _arrays(grid, packed)

  def run(q: Any, k: Any, v: Any, g: Any, has_padding: Any, meta: Any) -> Any:
    inputs = pallas_kernels.ForwardInputs(q, k, v, meta, None)
    return pallas_kernels.forward(
      inputs, g, has_padding, grid, scale=128**-0.5, output_final_state=False, save_residuals=save
    )

  return run, (tokens, tokens, tokens, jax.ShapeDtypeStruct((heads,), jnp.float32), has_padding, meta)


def backward(length: int, heads: int, *, packed: bool = False, block: list[int] | None = None) -> Program:
  """The backward kernel: q, k, v, do, states -> dq, dk, dv."""
  grid = make_grid(length, heads, reverse=True, block=block)
  tokens, has_padding, meta = _arrays(grid, packed)
  states = jax.ShapeDtypeStruct((1, heads, grid.num_chunks, 128, 128), jnp.bfloat16)

  def run(q: Any, k: Any, v: Any, do: Any, states: Any, g: Any, has_padding: Any, meta: Any) -> Any:
    inputs = pallas_kernels.BackwardInputs(q, k, v, do, meta, states, None)
    return pallas_kernels.backward(inputs, g, has_padding, grid, scale=128**-0.5, has_initial_state=False)

  return run, (*[tokens] * 4, states, jax.ShapeDtypeStruct((heads,), jnp.float32), has_padding, meta)


def make_grid(
  length: int, heads: int, *, reverse: bool, packed: bool = False, block: list[int] | None = None, kind: str | None = None
) -> Grid:
  """The grid the operation uses for this shape on the device kind traced for, or one with another block."""
  sizes = block_sizes_for(length, heads, 128, 2, kind) if block is None else BlockSizes(Block(*block), Block(*block))
  return Grid(1, length, heads, 128, 128, sizes.backward if reverse else sizes.forward, reverse, padding=False)


def _arrays(grid: Grid, packed: bool) -> tuple[Any, Any, Any]:
  """Tokens, and with packed documents whether steps hold padding, and the segment metadata."""
  tokens = jax.ShapeDtypeStruct((1, grid.length, grid.heads * 128), jnp.bfloat16)
  if not packed:
    return tokens, None, None
  has_padding = jax.ShapeDtypeStruct((1, grid.steps), jnp.int32)
  return tokens, has_padding, jax.ShapeDtypeStruct((1, META_ROWS, grid.steps * grid.tokens), jnp.float32)
