"""The backend "pallas": lays out rows and blocks for the TPU kernels, and gives the kernels derivatives."""

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.experts import dispatch as dispatching
from maxtext_ling2.ops.experts import pallas_kernels, xla
from maxtext_ling2.ops.experts.base import Gradients
from maxtext_ling2.ops.experts.block_sizes import BlockSizes, block_sizes_for
from maxtext_ling2.ops.experts.dispatch import ALIGNMENT, Dispatch
from maxtext_ling2.ops.experts.pallas_kernels import Weights
from maxtext_ling2.ops.experts.schedule import Blocks, schedule
from maxtext_ling2.ops.pallas_utils import differentiable


def _forward(*inputs: jax.Array, activation_in_float32: bool, max_choices: int | None) -> jax.Array:
  x, indices, weights, *matrices = inputs
  where = dispatching.dispatch(indices, matrices[0].shape[0], ALIGNMENT, max_choices)
  sizes = _block_sizes(x, max_choices or indices.size, matrices)
  blocks, steps = schedule(where, _cores(sizes, matrices), sizes.forward.stride, sizes.forward.rows, empty_experts=False)
  of_row = _to_blocks(dispatching.gather_weights(weights, where), blocks, sizes.forward.rows)
  rows = _tiles(dispatching.gather_tokens(x, where))
  y = pallas_kernels.forward(
    rows,
    of_row,
    Weights(*matrices),
    blocks,
    steps,
    sizes.forward,
    activation_in_float32=activation_in_float32,
  )
  return dispatching.combine(_flat(y), where)


def _backward(*inputs: jax.Array, activation_in_float32: bool, max_choices: int | None) -> Gradients:
  x, indices, weights, *matrices, dy = inputs
  where = dispatching.dispatch(indices, matrices[0].shape[0], ALIGNMENT, max_choices)
  sizes = _block_sizes(x, max_choices or indices.size, matrices)
  blocks, steps = schedule(where, _cores(sizes, matrices), sizes.backward.stride, sizes.backward.rows, empty_experts=True)
  of_row = _to_blocks(dispatching.gather_weights(weights, where), blocks, sizes.backward.rows)
  rows, dy_rows = (_tiles(dispatching.gather_tokens(a, where)) for a in (x, dy))
  gradients = pallas_kernels.backward(
    rows,
    dy_rows,
    of_row,
    Weights(*matrices),
    blocks,
    steps,
    sizes.backward,
    activation_in_float32=activation_in_float32,
  )
  dweights = dispatching.choice_values(_from_blocks(gradients.of_row, where, blocks), where)
  return Gradients(dispatching.combine(_flat(gradients.rows), where), dweights, *gradients[2:])


forward = differentiable(_forward, xla.forward)
backward = differentiable(_backward, xla.backward)


def _block_sizes(x: jax.Array, choices: int, matrices: list[jax.Array]) -> BlockSizes:
  _, width, hidden = matrices[0].shape
  return block_sizes_for(width, hidden, x.dtype.itemsize, choices)


def _cores(sizes: BlockSizes, matrices: list[jax.Array]) -> int:
  """Each core has an expert, as each writes at least one expert's gradients."""
  return min(sizes.cores, matrices[0].shape[0])


def _tiles(rows: jax.Array) -> jax.Array:
  """[R, C] -> [R / 16, 16, C]."""
  return rows.reshape(-1, ALIGNMENT, rows.shape[1])


def _flat(tiles: jax.Array) -> jax.Array:
  """[R / 16, 16, C] -> [R, C]."""
  return tiles.reshape(-1, tiles.shape[2])


def _to_blocks(of_row: jax.Array, blocks: Blocks, block_rows: int) -> jax.Array:
  """A value per row [R] as [cores, bound, 1, block_rows]; 0 beyond a block's rows."""
  per_block = block_rows // ALIGNMENT
  tiles = jnp.pad(of_row.reshape(-1, ALIGNMENT), ((0, per_block), (0, 0)))
  index = jnp.arange(per_block)
  own = tiles[blocks.start[..., None] + index]  # [cores, bound, tiles of a block, 16]
  own = jnp.where((index < blocks.tiles[..., None])[..., None], own, 0.0)
  return own.reshape(*blocks.expert.shape, 1, block_rows)


def _from_blocks(values: jax.Array, where: Dispatch, blocks: Blocks) -> jax.Array:
  """Values [cores, bound, 1, block_rows] as one per row, [R]; anything at rows that belong to no block."""
  per_block = values.shape[-1] // ALIGNMENT
  tile = jnp.arange(where.choice.size // ALIGNMENT)[:, None]
  starts, tiles = (x.reshape(-1) for x in (blocks.start, blocks.tiles))  # [cores * bound]
  inside = (tile >= starts) & (tile < starts + tiles)  # [R / 16, cores * bound]
  place = jnp.sum(jnp.where(inside, jnp.arange(starts.size) * per_block + tile - starts, 0), axis=1)
  return values.reshape(-1, ALIGNMENT)[place].reshape(-1)
