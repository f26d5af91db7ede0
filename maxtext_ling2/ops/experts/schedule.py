"""Which core computes which rows, in which order: the blocks of the kernels' grid.

A block is rows of one expert: `stride` rows each, and the last one up to `most`. An expert's blocks follow each other on
one core, so that its weights are read once and its gradients summed there. Experts are dealt to the cores by their number
of rows, the largest first, to and fro; the number of blocks per core, the grid's second dimension, is known only when the
program runs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.experts.dispatch import ALIGNMENT, Dispatch


class Blocks(NamedTuple):
  """One entry per core and block, [cores, bound] int32. A core with fewer blocks than others ends with empty ones."""

  expert: jax.Array
  start: jax.Array  # first row, in tiles of ALIGNMENT rows
  tiles: jax.Array  # rows, in tiles; 0: nothing to compute
  first: jax.Array  # 1: the first block of its expert
  last: jax.Array  # 1: the last one


def bound(choices: int, experts: int, cores: int, stride: int) -> int:
  """Blocks of a core that suffice for any distribution of the choices."""
  return choices // stride + -(-experts // cores)


def schedule(where: Dispatch, cores: int, stride: int, most: int, empty_experts: bool) -> tuple[Blocks, jax.Array]:
  """The blocks of each core, and the number of blocks of the core that has most of them.

  Args:
    where: with ALIGNMENT.
    cores: at most the number of experts.
    stride: rows of each block of an expert but its last one; a multiple of ALIGNMENT.
    most: rows of an expert's last block; at least `stride`, so that a few rows more are no block of their own.
    empty_experts: whether an expert without rows has a block, of no tiles, in which to write its gradients.
  """
  experts = where.sizes.size
  of_core = _deal(where.sizes, cores)  # [cores, ceil(E / cores)], E where there is none
  number = jnp.maximum(-(-(where.sizes - (most - stride)) // stride), 1)
  number = jnp.append(jnp.where((where.sizes > 0) | empty_experts, number, 0), 0)[of_core]
  ends = jnp.cumsum(number, axis=1)
  total = ends[:, -1:]  # [cores, 1]
  index = jnp.arange(bound(where.row.size, experts, cores, stride), dtype=jnp.int32)
  at = jnp.clip(index, 0, jnp.maximum(total - 1, 0))  # [cores, bound]: the last block again, where there are no more
  slot = jnp.sum(ends[:, None, :] <= at[:, :, None], axis=2)  # [cores, bound]
  slot = jnp.minimum(slot, of_core.shape[1] - 1)
  expert = jnp.minimum(jnp.take_along_axis(of_core, slot, axis=1), experts - 1)
  own = at - jnp.take_along_axis(ends - number, slot, axis=1)  # index among the blocks of its expert
  before = own * (stride // ALIGNMENT)
  left = -(-where.sizes[expert] // ALIGNMENT) - before
  real = index < total
  last = own == jnp.take_along_axis(number, slot, axis=1) - 1
  blocks = Blocks(
    expert,
    where.starts[expert] // ALIGNMENT + before,
    jnp.where(real, jnp.where(last, left, stride // ALIGNMENT), 0),
    real & (own == 0),
    real & last,
  )
  return Blocks(*(x.astype(jnp.int32) for x in blocks)), jnp.maximum(jnp.max(total), 1)


def _deal(sizes: jax.Array, cores: int) -> jax.Array:
  """Experts of each core [cores, ceil(E / cores)]; E where a core has one less."""
  experts = sizes.size
  order = jnp.arange(experts, dtype=jnp.int32)
  if cores > 1:
    _, order = jax.lax.sort((-sizes, order), num_keys=1, is_stable=True)
  order = jnp.pad(order, (0, -experts % cores), constant_values=experts).reshape(-1, cores)
  turned = jnp.arange(order.shape[0])[:, None] % 2 == 1
  return jnp.where(turned, order[:, ::-1], order).T
