"""The backward TPU kernel: dq, dk, dv and the gradient of the initial state in one pass from the end to the start."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla import pallas_chunk as chunks
from maxtext_ling2.ops.gla.pallas_chunk import NN, NT, TN, Decays, Ref, Tables
from maxtext_ling2.ops.gla.pallas_grid import Grid, call, run_step


class Inputs(NamedTuple):
  """Arrays in the HBM, or blocks of them in the memory of the chip."""

  q: Any  # [B, T, H * D]
  k: Any  # [B, T, H * D]
  v: Any  # [B, T, H * Dv]
  do: Any  # [B, T, H * Dv]
  info: Any  # [B, INFO_ROWS, steps * tokens] float32, or None
  states: Any  # [B, H, N, D, Dv]: the states that enter the chunks
  dfinal_state: Any  # [B, H, D, Dv] float32, or None


class Outputs(NamedTuple):
  """As `Inputs`."""

  dq: Any  # [B, T, H * D]
  dk: Any  # [B, T, H * D]
  dv: Any  # [B, T, H * Dv]
  dinitial_state: Any  # [B, H, D, Dv] float32, or None if nobody asked for it


def backward(
  inputs: Inputs, g_gamma: jax.Array, padded: jax.Array | None, grid: Grid, *, scale: float, initial: bool
) -> Outputs:
  """Runs the kernel.

  Args:
    inputs: q, k, v, do and states in one dtype.
    g_gamma: [H] float32.
    padded: [B, steps] int32, 1 for a step that holds padding; None without segments.
    grid: the shapes, reverse.
    scale: factor of the outputs.
    initial: whether to return the gradient of the initial state.
  """
  state = jax.ShapeDtypeStruct((grid.batch, grid.heads, grid.key_dim, grid.value_dim), jnp.float32)
  dq, dk, dv = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[:3])
  shapes = Outputs(dq, dk, dv, state if initial else None)
  keys, values = grid.keys(), grid.values()
  in_specs = Inputs(keys, keys, values, values, grid.info(), grid.states(), grid.state())
  out_specs = Outputs(keys, keys, values, grid.state())
  kernel = functools.partial(_kernel, grid=grid, scale=scale)
  return call(kernel, "gla_backward", grid, g_gamma, padded, inputs, in_specs, shapes, out_specs)


def _kernel(
  g: Ref, padded: Ref, inputs: Inputs, outputs: Outputs, dstate: Ref, *tables: Ref, grid: Grid, scale: float
) -> None:
  one = functools.partial(_chunk, inputs, outputs, dstate, grid)
  ends = (inputs.dfinal_state, outputs.dinitial_state)
  run_step(one, grid, g, padded, inputs.info, inputs[:4], Tables(*tables), scale, dstate, *ends)


def _chunk(inputs: Inputs, outputs: Outputs, dstate: Ref, grid: Grid, index: int, decays: list[Decays]) -> None:
  """One chunk of all heads. All scores come first: they wait for nothing and keep the matrix units busy."""
  q, k, v, do = (grid.per_head(x, index) for x in inputs[:4])
  scores = [chunks.causal_scores(q[h], k[h], d.between) for h, d in enumerate(decays)]
  dscores = [chunks.causal_scores(do[h], v[h], d.between) for h, d in enumerate(decays)]
  for h, d in enumerate(decays):
    entering, leaving = inputs.states[0, h, index], dstate[h].astype(do[h].dtype)
    k_end, v_end = chunks.scaled(k[h], d.until_end), chunks.scaled(v[h], d.until_end)
    do_start = chunks.scaled(do[h], d.since_start)
    dv = chunks.transposed_causal_dot(scores[h], do[h]) + chunks.dot(k_end, leaving, NN)
    dq = chunks.causal_dot(dscores[h], k[h]) + chunks.dot(do_start, entering, NT)
    dk = chunks.transposed_causal_dot(dscores[h], q[h]) + chunks.dot(v_end, leaving, NT)
    for block, x in ((outputs.dq, dq), (outputs.dk, dk), (outputs.dv, dv)):
      grid.write(block, index, h, x)
    dstate[h] = d.whole[:, : grid.value_dim] * dstate[h] + chunks.dot(q[h], do_start, TN)
