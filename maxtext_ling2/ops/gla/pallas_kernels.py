"""The two TPU kernels: forward (outputs, optionally states), and backward (all gradients in one reverse pass)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla import pallas_chunk as chunks
from maxtext_ling2.ops.gla.pallas_chunk import Decays, Tables
from maxtext_ling2.ops.gla.pallas_grid import Grid, call, run_step
from maxtext_ling2.ops.pallas_utils import NN, NT, TN, Ref, dot


class ForwardInputs(NamedTuple):
  """Arrays in the HBM, or blocks of them in the memory of the chip."""

  q: Any  # [B, T, H * D]
  k: Any  # [B, T, H * D]
  v: Any  # [B, T, H * Dv]
  info: Any  # [B, INFO_ROWS, steps * tokens] float32, or None
  initial_state: Any  # [B, H, D, Dv] float32, or None


class ForwardOutputs(NamedTuple):
  """As `ForwardInputs`; what nobody asked for is None."""

  o: Any  # [B, T, H * Dv]
  final_state: Any  # [B, H, D, Dv] float32
  states: Any  # [B, H, N, D, Dv] in the dtype of v: the states that enter the chunks


def forward(
  inputs: ForwardInputs,
  g_gamma: jax.Array,
  padded: jax.Array | None,
  grid: Grid,
  *,
  scale: float,
  final: bool,
  save: bool,
) -> ForwardOutputs:
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
  shapes = ForwardOutputs(
    jax.ShapeDtypeStruct(v.shape, v.dtype),
    jax.ShapeDtypeStruct(state, jnp.float32) if final else None,
    jax.ShapeDtypeStruct(states, v.dtype) if save else None,
  )
  in_specs = ForwardInputs(grid.keys(), grid.keys(), grid.values(), grid.info(), grid.state())
  out_specs = ForwardOutputs(grid.values(), grid.state(), grid.states())
  kernel = functools.partial(_forward_kernel, grid=grid, scale=scale)
  return call(kernel, "gla_forward", grid, g_gamma, padded, inputs, in_specs, shapes, out_specs)


def _forward_kernel(
  g: Ref, padded: Ref, inputs: ForwardInputs, outputs: ForwardOutputs, state: Ref, *tables: Ref, grid: Grid, scale: float
) -> None:
  one = functools.partial(_forward_chunk, inputs, outputs, state, grid)
  ends = (inputs.initial_state, outputs.final_state)
  run_step(one, grid, g, padded, inputs.info, inputs[:3], Tables(*tables), scale, state, *ends)


def _forward_chunk(
  inputs: ForwardInputs, outputs: ForwardOutputs, state: Ref, grid: Grid, index: int, decays: list[Decays]
) -> None:
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
    last_within, added = jnp.split(dot(left, v[h], NN), [last.shape[0]])
    within = [dot(x, v[h][: x.shape[1]], NN) for x in first]
    before = dot(chunks.scaled(q[h], d.since_start), entering, NN)
    grid.write(outputs.o, index, h, jnp.concatenate([*within, last_within]) + before)
    state[h] = d.whole[:, : grid.value_dim] * state[h] + added


class BackwardInputs(NamedTuple):
  """Arrays in the HBM, or blocks of them in the memory of the chip."""

  q: Any  # [B, T, H * D]
  k: Any  # [B, T, H * D]
  v: Any  # [B, T, H * Dv]
  do: Any  # [B, T, H * Dv]
  info: Any  # [B, INFO_ROWS, steps * tokens] float32, or None
  states: Any  # [B, H, N, D, Dv]: the states that enter the chunks
  dfinal_state: Any  # [B, H, D, Dv] float32, or None


class BackwardOutputs(NamedTuple):
  """As `BackwardInputs`."""

  dq: Any  # [B, T, H * D]
  dk: Any  # [B, T, H * D]
  dv: Any  # [B, T, H * Dv]
  dinitial_state: Any  # [B, H, D, Dv] float32, or None if nobody asked for it


def backward(
  inputs: BackwardInputs, g_gamma: jax.Array, padded: jax.Array | None, grid: Grid, *, scale: float, initial: bool
) -> BackwardOutputs:
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
  shapes = BackwardOutputs(dq, dk, dv, state if initial else None)
  keys, values = grid.keys(), grid.values()
  in_specs = BackwardInputs(keys, keys, values, values, grid.info(), grid.states(), grid.state())
  out_specs = BackwardOutputs(keys, keys, values, grid.state())
  kernel = functools.partial(_backward_kernel, grid=grid, scale=scale)
  return call(kernel, "gla_backward", grid, g_gamma, padded, inputs, in_specs, shapes, out_specs)


def _backward_kernel(
  g: Ref,
  padded: Ref,
  inputs: BackwardInputs,
  outputs: BackwardOutputs,
  dstate: Ref,
  *tables: Ref,
  grid: Grid,
  scale: float,
) -> None:
  one = functools.partial(_backward_chunk, inputs, outputs, dstate, grid)
  ends = (inputs.dfinal_state, outputs.dinitial_state)
  run_step(one, grid, g, padded, inputs.info, inputs[:4], Tables(*tables), scale, dstate, *ends)


def _backward_chunk(
  inputs: BackwardInputs, outputs: BackwardOutputs, dstate: Ref, grid: Grid, index: int, decays: list[Decays]
) -> None:
  """One chunk of all heads. All scores come first: they wait for nothing and keep the matrix units busy."""
  q, k, v, do = (grid.per_head(x, index) for x in inputs[:4])
  scores = [chunks.causal_scores(q[h], k[h], d.between) for h, d in enumerate(decays)]
  dscores = [chunks.causal_scores(do[h], v[h], d.between) for h, d in enumerate(decays)]
  for h, d in enumerate(decays):
    entering, leaving = inputs.states[0, h, index], dstate[h].astype(do[h].dtype)
    k_end, v_end = chunks.scaled(k[h], d.until_end), chunks.scaled(v[h], d.until_end)
    do_start = chunks.scaled(do[h], d.since_start)
    dv = chunks.transposed_causal_dot(scores[h], do[h]) + dot(k_end, leaving, NN)
    dq = chunks.causal_dot(dscores[h], k[h]) + dot(do_start, entering, NT)
    dk = chunks.transposed_causal_dot(dscores[h], q[h]) + dot(v_end, leaving, NT)
    for block, x in ((outputs.dq, dq), (outputs.dk, dk), (outputs.dv, dv)):
      grid.write(block, index, h, x)
    dstate[h] = d.whole[:, : grid.value_dim] * dstate[h] + dot(q[h], do_start, TN)
