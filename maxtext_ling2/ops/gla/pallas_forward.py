"""The forward TPU kernel: outputs, and on demand the state after the last token and the states that enter the chunks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla import pallas_chunk as chunks
from maxtext_ling2.ops.gla.pallas_chunk import NN, Decays, Ref, Tables
from maxtext_ling2.ops.gla.pallas_grid import Grid, call, run_step


class Inputs(NamedTuple):
  """Arrays in the HBM, or blocks of them in the memory of the chip."""

  q: Any  # [B, T, H * D]
  k: Any  # [B, T, H * D]
  v: Any  # [B, T, H * Dv]
  info: Any  # [B, INFO_ROWS, steps * tokens] float32, or None
  initial_state: Any  # [B, H, D, Dv] float32, or None


class Outputs(NamedTuple):
  """As `Inputs`; what nobody asked for is None."""

  o: Any  # [B, T, H * Dv]
  final_state: Any  # [B, H, D, Dv] float32
  states: Any  # [B, H, N, D, Dv] in the dtype of v: the states that enter the chunks


def forward(
  inputs: Inputs, g_gamma: jax.Array, padded: jax.Array | None, grid: Grid, *, scale: float, final: bool, save: bool
) -> Outputs:
  """Runs the kernel.

  Args:
    inputs: q, k and v in one dtype.
    g_gamma: [H] float32.
    padded: [B, steps] int32, 1 for a step that holds padding; None without segments.
    grid: the shapes.
    scale: factor of the outputs.
    final: whether to return the final state.
    save: whether to return the states that enter the chunks.
  """
  v = inputs.v
  state = (grid.batch, grid.heads, grid.key_dim, grid.value_dim)
  states = (*state[:2], grid.chunks, *state[2:])
  shapes = Outputs(
    jax.ShapeDtypeStruct(v.shape, v.dtype),
    jax.ShapeDtypeStruct(state, jnp.float32) if final else None,
    jax.ShapeDtypeStruct(states, v.dtype) if save else None,
  )
  in_specs = Inputs(grid.keys(), grid.keys(), grid.values(), grid.info(), grid.state())
  out_specs = Outputs(grid.values(), grid.state(), grid.states())
  kernel = functools.partial(_kernel, grid=grid, scale=scale)
  return call(kernel, "gla_forward", grid, g_gamma, padded, inputs, in_specs, shapes, out_specs)


def _kernel(
  g: Ref, padded: Ref, inputs: Inputs, outputs: Outputs, state: Ref, *tables: Ref, grid: Grid, scale: float
) -> None:
  one = functools.partial(_chunk, inputs, outputs, state, grid)
  ends = (inputs.initial_state, outputs.final_state)
  run_step(one, grid, g, padded, inputs.info, inputs[:3], Tables(*tables), scale, state, *ends)


def _chunk(inputs: Inputs, outputs: Outputs, state: Ref, grid: Grid, index: int, decays: list[Decays]) -> None:
  """One chunk of all heads. All scores come first: they wait for nothing and keep the matrix units busy."""
  q, k, v = (grid.per_head(x, index) for x in inputs[:3])
  scores = [chunks.causal_scores(q[h], k[h], d.between) for h, d in enumerate(decays)]
  for h, d in enumerate(decays):
    entering = state[h].astype(v[h].dtype)
    if outputs.states is not None:
      outputs.states[0, h, index] = entering
    *first, last = scores[h]
    # Two products with v in one, so that its way into the matrix unit is paid once: [128 + D, C] by [C, Dv].
    left = jnp.concatenate([last, jnp.transpose(chunks.scaled(k[h], d.until_end))])
    last_within, added = jnp.split(chunks.dot(left, v[h], NN), [last.shape[0]])
    within = [chunks.dot(x, v[h][: x.shape[1]], NN) for x in first]
    before = chunks.dot(chunks.scaled(q[h], d.since_start), entering, NN)
    grid.write(outputs.o, index, h, jnp.concatenate([*within, last_within]) + before)
    state[h] = d.whole[:, : grid.value_dim] * state[h] + added
