"""The experts' kernels as programs for `tpu_static`: one block per grid step, a static number of steps."""

import functools

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.experts import pallas_kernels
from maxtext_ling2.ops.experts.block_sizes import Block
from maxtext_ling2.ops.experts.schedule import Blocks


def _arguments(cores, steps, rows, width, hidden, dtype):
  def array(*shape, of=dtype):
    return jax.ShapeDtypeStruct(shape, of)

  experts = cores * steps
  x = array(experts * rows // 16, 16, width)
  matrices = pallas_kernels.Weights(
    array(experts, width, hidden), array(experts, width, hidden), array(experts, hidden, width)
  )
  blocks = Blocks(*[array(cores, steps, of=jnp.int32)] * len(Blocks._fields))
  return x, array(cores, steps, 1, rows, of=jnp.float32), matrices, blocks


def forward(rows, cores=1, steps=8, width=2048, hidden=512, in_float32=False, dtype="bfloat16"):
  block = Block(rows, rows, (rows,), 120 * 2**20)
  x, of_row, matrices, blocks = _arguments(cores, steps, rows, width, hidden, jnp.dtype(dtype))
  run = functools.partial(pallas_kernels.forward, steps=steps, block=block, activation_in_float32=in_float32)
  return lambda x, of_row, matrices, blocks: run(x, of_row, matrices, blocks), (x, of_row, matrices, blocks)


def backward(rows, cores=1, steps=8, width=2048, hidden=512, in_float32=False, dtype="bfloat16", experts="one block"):
  block = Block(rows, rows, (rows,), 120 * 2**20, experts=experts)
  x, of_row, matrices, blocks = _arguments(cores, steps, rows, width, hidden, jnp.dtype(dtype))
  run = functools.partial(pallas_kernels.backward, steps=steps, block=block, activation_in_float32=in_float32)
  return lambda x, dy, of_row, matrices, blocks: run(x, dy, of_row, matrices, blocks), (x, x, of_row, matrices, blocks)
