"""The two TPU kernels: `forward`, and `backward` with all gradients in one pass over the experts.

The equations are in README.md. The grid is (cores, blocks), a block being rows of one expert (`schedule.py`). Pallas
fetches the matrices of the next block's expert while a block computes, and not again if it is the same expert. The kernel
copies rows: those of the next block while this one computes, and results while the next one does.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxtext_ling2.ops.experts.activation import activate, activate_bwd
from maxtext_ling2.ops.experts.block_sizes import Block
from maxtext_ling2.ops.experts.dispatch import ALIGNMENT
from maxtext_ling2.ops.experts.pallas_rows import RowCopy
from maxtext_ling2.ops.experts.schedule import Blocks
from maxtext_ling2.ops.pallas_utils import LANES, NN, NT, TN, Ref, dot, like_input, vary_alike


class Weights(NamedTuple):
  """The matrices, whole in HBM, or those of one expert in VMEM."""

  gate: Any  # [E, C, F]
  up: Any  # [E, C, F]
  down: Any  # [E, F, C]


def forward(
  rows: jax.Array,
  of_row: jax.Array,
  weights: Weights,
  blocks: Blocks,
  steps: jax.Array | int,
  block: Block,
  *,
  activation_in_float32: bool,
) -> jax.Array:
  """y of each row, times its routing weight: [tiles, 16, C]. Rows that belong to no block are not written.

  Args:
    rows: x [tiles, 16, C].
    of_row: routing weights [cores, bound, 1, block.rows] float32, 0 beyond a block's rows.
    weights: the matrices.
    blocks: of each core.
    steps: blocks of the core with most of them.
    block: sizes.
    activation_in_float32: as in `api.experts`.
  """
  kernel = functools.partial(_forward_kernel, block=block, in_float32=activation_in_float32)
  (y,) = _call(kernel, "experts_forward", (rows,), of_row, weights, blocks, steps, block, 1, False)
  return y


class RowGradients(NamedTuple):
  """Results of `backward`."""

  rows: jax.Array  # dx of each row, [tiles, 16, C]
  of_row: (
    jax.Array
  )  # gradient of the routing weights [cores, bound, 1, block.rows] float32; anything beyond a block's rows
  gate: jax.Array  # [E, C, F]
  up: jax.Array  # [E, C, F]
  down: jax.Array  # [E, F, C]


def backward(
  rows: jax.Array,
  dy: jax.Array,
  of_row: jax.Array,
  weights: Weights,
  blocks: Blocks,
  steps: jax.Array | int,
  block: Block,
  *,
  activation_in_float32: bool,
) -> RowGradients:
  """All gradients; arguments as of `forward`, and dy of the token of each row, [tiles, 16, C].

  `blocks` has a block for each expert, also for one without rows: its gradients are zero.
  """
  kernel = functools.partial(_backward_kernel, block=block, in_float32=activation_in_float32)
  return RowGradients(*_call(kernel, "experts_backward", (rows, dy), of_row, weights, blocks, steps, block, 1, True))


def _call(
  kernel: Callable[..., None],
  name: str,
  rows: Sequence[jax.Array],
  of_row: jax.Array,
  weights: Weights,
  blocks: Blocks,
  steps: jax.Array | int,
  block: Block,
  row_outputs: int,
  gradients: bool,
) -> Sequence[jax.Array]:
  """Runs a kernel; it gets blocks, rows, weights of rows, matrices, outputs and scratch memory.

  Outputs are `row_outputs` arrays like rows; with `gradients` the matrices' and the routing weights', too.
  """
  blocks, rows, of_row, weights = vary_alike((blocks, tuple(rows), of_row, weights))
  by_block = pl.BlockSpec((1, 1, 1, block.rows), lambda c, b, *_: (c, b, 0, 0))
  of_expert = Weights(*(pl.BlockSpec((1, *w.shape[1:]), lambda c, b, expert, *_: (expert[c, b], 0, 0)) for w in weights))
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)
  out_specs: list[Any] = [in_hbm] * row_outputs
  out_shapes = [jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype)] * row_outputs
  buffers = len(rows) + row_outputs
  scratch: list[Any] = [pltpu.VMEM((2, block.rows // ALIGNMENT, *rows[0].shape[1:]), rows[0].dtype)] * buffers
  scratch += [pltpu.SemaphoreType.DMA((2,))] * buffers
  if gradients:
    out_specs += [by_block, *of_expert]
    out_shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (of_row, *weights)]
    scratch += [pltpu.VMEM(w.shape[1:], jnp.float32) for w in weights]
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(blocks),
      grid=(blocks.expert.shape[0], steps),
      in_specs=[*[in_hbm] * len(rows), by_block, *of_expert],
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=[like_input(rows[0], shape) for shape in out_shapes],
    name=name,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=block.vmem_limit, disable_bounds_checks=True
    ),
  )(*blocks, *rows, of_row, *weights)


class _Step:
  """The copies of rows of one grid step."""

  def __init__(self, blocks: Blocks, block: Block):
    self.core, self.index, self.steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    self.blocks, self.block = blocks, block
    self.slot = self.index % 2
    self.tiles = blocks.tiles[self.core, self.index]

  def _copies(
    self, hbm: Sequence[Ref], vmem: Sequence[Ref], semaphores: Sequence[Ref], index: Any, out: bool
  ) -> list[RowCopy]:
    start, tiles = self.blocks.start[self.core, index], self.blocks.tiles[self.core, index]
    slot = index % 2
    return [
      RowCopy(there, start, here.at[slot], tiles, semaphore.at[slot], out)
      for there, here, semaphore in zip(hbm, vmem, semaphores, strict=True)
    ]

  def read(self, hbm: Sequence[Ref], vmem: Sequence[Ref], semaphores: Sequence[Ref]) -> None:
    """Waits for the rows of this block; those of the next one are on their way."""

    @pl.when(self.index == 0)
    def _() -> None:
      for buffer in vmem:  # rows beyond a block's are multiplied by zero, so they have to be finite
        buffer[...] = jnp.zeros_like(buffer)
      for copy in self._copies(hbm, vmem, semaphores, self.index, False):
        copy.start()

    @pl.when(self.index + 1 < self.steps)
    def _() -> None:
      for copy in self._copies(hbm, vmem, semaphores, self.index + 1, False):
        copy.start()

    for copy in self._copies(hbm, vmem, semaphores, self.index, False):
      copy.wait()

  def reuse(self, hbm: Sequence[Ref], vmem: Sequence[Ref], semaphores: Sequence[Ref]) -> None:
    """Waits until the results of the block before the last one have left their buffer."""

    @pl.when(self.index >= 2)
    def _() -> None:
      for copy in self._copies(hbm, vmem, semaphores, self.index - 2, True):
        copy.wait()

  def write(self, hbm: Sequence[Ref], vmem: Sequence[Ref], semaphores: Sequence[Ref]) -> None:
    """Sends the results of this block, and in the last step waits for all that are on their way."""
    for copy in self._copies(hbm, vmem, semaphores, self.index, True):
      copy.start()

    @pl.when(self.index == self.steps - 1)
    def _() -> None:
      @pl.when(self.index >= 1)
      def _() -> None:
        for copy in self._copies(hbm, vmem, semaphores, self.index - 1, True):
          copy.wait()

      for copy in self._copies(hbm, vmem, semaphores, self.index, True):
        copy.wait()

  def by_rows(self, compute: Callable[[int], None]) -> None:
    """Computes the block by the program of the first tier that holds its tiles; nothing if it is empty."""
    below = 0
    for rows in self.block.tiers:
      pl.when((self.tiles > below) & (self.tiles <= rows // ALIGNMENT))(functools.partial(compute, rows))
      below = rows // ALIGNMENT

  def load(self, buffer: Ref, rows: int) -> jax.Array:
    """The first rows of a buffer, [rows, C]."""
    return buffer[self.slot, pl.ds(0, rows // ALIGNMENT)].reshape(rows, -1)

  def store(self, buffer: Ref, x: jax.Array) -> None:
    """x [rows, C] as the first rows of a buffer."""
    tiles = x.shape[0] // ALIGNMENT
    buffer[self.slot, pl.ds(0, tiles)] = x.astype(buffer.dtype).reshape(tiles, ALIGNMENT, -1)


def _column(of_row: Ref, rows: int, width: int) -> jax.Array:
  """A value per row [1, 1, 1, block.rows] as columns that are all equal, [rows, width]."""
  lanes = jnp.broadcast_to(of_row[0, 0, :, pl.ds(0, rows)], (LANES, rows))
  return jnp.tile(jnp.transpose(lanes), (1, width // LANES))


def _forward_kernel(*refs: Ref, block: Block, in_float32: bool) -> None:
  blocks, (x, of_row), weights = Blocks(*refs[:5]), refs[5:7], Weights(*refs[7:10])
  y, x_buffer, y_buffer, x_semaphore, y_semaphore = refs[10:]
  step = _Step(blocks, block)
  step.read([x], [x_buffer], [x_semaphore])
  step.reuse([y], [y_buffer], [y_semaphore])

  def compute(rows: int) -> None:
    tokens = step.load(x_buffer, rows)  # [rows, C]
    gate, up = (dot(tokens, w[0], NN) for w in (weights.gate, weights.up))  # [rows, F]
    h = activate(gate, up, tokens.dtype, in_float32)
    step.store(y_buffer, _column(of_row, rows, tokens.shape[1]) * dot(h, weights.down[0], NN))  # [rows, C]

  step.by_rows(compute)
  step.write([y], [y_buffer], [y_semaphore])


def _backward_kernel(*refs: Ref, block: Block, in_float32: bool) -> None:
  blocks, (x, dy, of_row), weights = Blocks(*refs[:5]), refs[5:8], Weights(*refs[8:11])
  dx, dof_row, *dweights = refs[11:16]
  x_buffer, dy_buffer, dx_buffer, x_semaphore, dy_semaphore, dx_semaphore, *sums = refs[16:]
  step = _Step(blocks, block)
  step.read([x, dy], [x_buffer, dy_buffer], [x_semaphore, dy_semaphore])
  step.reuse([dx], [dx_buffer], [dx_semaphore])
  first, last = (flag[step.core, step.index] != 0 for flag in (blocks.first, blocks.last))

  @pl.when(first & (step.tiles == 0))
  def _() -> None:
    for gradient in dweights:
      gradient[...] = jnp.zeros_like(gradient)

  def compute(rows: int) -> None:
    tokens, dys = (step.load(buffer, rows) for buffer in (x_buffer, dy_buffer))  # [rows, C]
    gate, up = (dot(tokens, w[0], NN) for w in (weights.gate, weights.up))  # [rows, F]
    dh = dot(dys, weights.down[0], NT)  # [rows, F], before the routing weight
    column = _column(of_row, rows, dh.shape[1])
    h = activate(gate, up, tokens.dtype, in_float32).astype(jnp.float32)
    dof_row[0, 0, :, pl.ds(0, rows)] = _row_sums(h * dh)
    dgate, dup = activate_bwd(gate, up, column * dh, tokens.dtype, in_float32)
    step.store(dx_buffer, dot(dgate, weights.gate[0], NT) + dot(dup, weights.up[0], NT))  # [rows, C]
    products = ((tokens, dgate), (tokens, dup), ((column * h).astype(tokens.dtype), dys))

    def store() -> None:
      for gradient, (left, right) in zip(dweights, products, strict=True):
        gradient[0] = dot(left, right, TN).astype(gradient.dtype)

    def add() -> None:
      for total, gradient, (left, right) in zip(sums, dweights, products, strict=True):
        total[...] = jnp.where(first, 0.0, total[...]) + dot(left, right, TN)
        if block.experts != "several":
          pl.when(last)(functools.partial(_copy, total, gradient))

    if block.experts == "any":
      jax.lax.cond(first & last, store, add)
    else:
      (store if block.experts == "one block" else add)()

  step.by_rows(compute)
  step.write([dx], [dx_buffer], [dx_semaphore])


def _copy(total: Ref, gradient: Ref) -> None:
  gradient[0] = total[...].astype(gradient.dtype)


def _row_sums(x: jax.Array) -> jax.Array:
  """Sums of the rows of x [rows, columns] as one row, [1, rows]."""
  partial = sum(jnp.split(x, x.shape[1] // LANES, axis=1))  # [rows, 128]
  return jnp.sum(jnp.transpose(partial), axis=0, keepdims=True)
