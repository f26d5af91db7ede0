"""The two TPU kernels: `forward` (outputs, optionally states) and `backward` (all gradients in one reverse pass).

The equations are in README.md. Arrays of tokens are [B, T, H * D] in HBM; in a kernel they are blocks in VMEM.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxtext_ling2.ops.gla import pallas_chunk as chunks
from maxtext_ling2.ops.gla.pallas_chunk import Decays, Tables
from maxtext_ling2.ops.gla.pallas_grid import Grid, call, run_step
from maxtext_ling2.ops.pallas_utils import NN, NT, TN, Ref, dot


class ForwardInputs(NamedTuple):
  """Arrays in HBM, or their blocks in VMEM."""

  q: Any  # [B, T, H * D]
  k: Any  # [B, T, H * D]
  v: Any  # [B, T, H * Dv]
  segment_meta: Any  # [B, META_ROWS, steps * tokens] float32, or None
  initial_state: Any  # [B, H, D, Dv] float32, or None


class ForwardOutputs(NamedTuple):
  """As `ForwardInputs`; an output that is not asked for is None."""

  o: Any  # [B, T, H * Dv]
  final_state: Any  # [B, H, D, Dv] float32
  chunk_states: Any  # [B, H, N, D, Dv] in the dtype of v: h_in of each chunk


class BackwardInputs(NamedTuple):
  """As `ForwardInputs`."""

  q: Any  # [B, T, H * D]
  k: Any  # [B, T, H * D]
  v: Any  # [B, T, H * Dv]
  do: Any  # [B, T, H * Dv]
  segment_meta: Any  # [B, META_ROWS, steps * tokens] float32, or None
  chunk_states: Any  # [B, H, N, D, Dv]: h_in of each chunk
  dfinal_state: Any  # [B, H, D, Dv] float32, or None


class BackwardOutputs(NamedTuple):
  """As `ForwardInputs`."""

  dq: Any  # [B, T, H * D]
  dk: Any  # [B, T, H * D]
  dv: Any  # [B, T, H * Dv]
  dinitial_state: Any  # [B, H, D, Dv] float32, or None if it is not asked for


def forward(
  inputs: ForwardInputs,
  g_gamma: jax.Array,
  has_padding: jax.Array | None,
  grid: Grid,
  *,
  scale: float,
  output_final_state: bool,
  save_residuals: bool,
) -> ForwardOutputs:
  """Runs the forward kernel.

  Args:
    inputs: q, k and v in one dtype.
    g_gamma: [H] float32, log decay per token.
    has_padding: [B, steps] int32, 1 for a step that holds padding; None without segments.
    grid: the shapes.
    scale: factor of the outputs.
    output_final_state: whether to return the final state.
    save_residuals: whether to return `chunk_states`.
  """
  v = inputs.v
  state = (grid.batch, grid.heads, grid.key_dim, grid.value_dim)
  chunk_states = (*state[:2], grid.num_chunks, *state[2:])
  shapes = ForwardOutputs(
    jax.ShapeDtypeStruct(v.shape, v.dtype),
    jax.ShapeDtypeStruct(state, jnp.float32) if output_final_state else None,
    jax.ShapeDtypeStruct(chunk_states, v.dtype) if save_residuals else None,
  )
  in_specs = ForwardInputs(grid.keys(), grid.keys(), grid.values(), grid.segment_meta(), grid.state())
  out_specs = ForwardOutputs(grid.values(), grid.state(), grid.chunk_states())
  kernel = functools.partial(_forward_kernel, grid=grid, scale=scale)
  return call(kernel, "gla_forward", grid, g_gamma, has_padding, inputs, in_specs, shapes, out_specs)


def backward(
  inputs: BackwardInputs,
  g_gamma: jax.Array,
  has_padding: jax.Array | None,
  grid: Grid,
  *,
  scale: float,
  has_initial_state: bool,
) -> BackwardOutputs:
  """Runs the backward kernel.

  Args:
    inputs: q, k, v, do and chunk_states in one dtype.
    g_gamma: [H] float32, log decay per token.
    has_padding: [B, steps] int32, 1 for a step that holds padding; None without segments.
    grid: the shapes, reverse.
    scale: factor of the outputs.
    has_initial_state: whether to return the gradient of the initial state.
  """
  state = jax.ShapeDtypeStruct((grid.batch, grid.heads, grid.key_dim, grid.value_dim), jnp.float32)
  dq, dk, dv = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[:3])
  shapes = BackwardOutputs(dq, dk, dv, state if has_initial_state else None)
  keys, values = grid.keys(), grid.values()
  in_specs = BackwardInputs(keys, keys, values, values, grid.segment_meta(), grid.chunk_states(), grid.state())
  out_specs = BackwardOutputs(keys, keys, values, grid.state())
  kernel = functools.partial(_backward_kernel, grid=grid, scale=scale)
  return call(kernel, "gla_backward", grid, g_gamma, has_padding, inputs, in_specs, shapes, out_specs)


def _forward_kernel(
  g_gamma: Ref,
  has_padding: Ref,
  inputs: ForwardInputs,
  outputs: ForwardOutputs,
  state: Ref,
  *tables: Ref,
  grid: Grid,
  scale: float,
) -> None:
  run_chunk = functools.partial(_forward_chunk, inputs, outputs, state, grid)
  states = (state, inputs.initial_state, outputs.final_state)
  run_step(run_chunk, grid, g_gamma, has_padding, inputs.segment_meta, inputs[:3], Tables(*tables), scale, *states)


def _backward_kernel(
  g_gamma: Ref,
  has_padding: Ref,
  inputs: BackwardInputs,
  outputs: BackwardOutputs,
  dstate: Ref,
  *tables: Ref,
  grid: Grid,
  scale: float,
) -> None:
  run_chunk = functools.partial(_backward_chunk, inputs, outputs, dstate, grid)
  states = (dstate, inputs.dfinal_state, outputs.dinitial_state)
  run_step(run_chunk, grid, g_gamma, has_padding, inputs.segment_meta, inputs[:4], Tables(*tables), scale, *states)


def _forward_chunk(
  inputs: ForwardInputs, outputs: ForwardOutputs, state: Ref, grid: Grid, index: int, decays: list[Decays]
) -> None:
  """One chunk of all heads. All scores come first: they are independent and keep the MXU busy."""
  q, k, v = (grid.per_head(x, index) for x in inputs[:3])  # lists of [C, D]
  scores = [chunks.causal_scores(q[h], k[h], d.intra_chunk_decay) for h, d in enumerate(decays)]
  for h, d in enumerate(decays):
    h_in = state[h].astype(v[h].dtype)  # [D, Dv]
    if outputs.chunk_states is not None:
      outputs.chunk_states[0, h, index] = h_in
    *first, last = scores[h]
    # Two products with v in one, so that v is loaded into the MXU once: [128 + D, C] by [C, Dv].
    left = jnp.concatenate([last, jnp.transpose(chunks.scaled(k[h], d.k_decay))])
    last_intra, added = jnp.split(dot(left, v[h], NN), [last.shape[0]])
    intra = [dot(x, v[h][: x.shape[1]], NN) for x in first]
    inter = dot(chunks.scaled(q[h], d.q_decay), h_in, NN)  # [C, Dv]
    grid.write(outputs.o, index, h, jnp.concatenate([*intra, last_intra]) + inter)
    state[h] = d.chunk_decay[:, : grid.value_dim] * state[h] + added


def _backward_chunk(
  inputs: BackwardInputs, outputs: BackwardOutputs, dstate: Ref, grid: Grid, index: int, decays: list[Decays]
) -> None:
  """One chunk of all heads. All scores come first: they are independent and keep the MXU busy."""
  q, k, v, do = (grid.per_head(x, index) for x in inputs[:4])  # lists of [C, D]
  scores = [chunks.causal_scores(q[h], k[h], d.intra_chunk_decay) for h, d in enumerate(decays)]
  dscores = [chunks.causal_scores(do[h], v[h], d.intra_chunk_decay) for h, d in enumerate(decays)]
  for h, d in enumerate(decays):
    h_in, dh_out = inputs.chunk_states[0, h, index], dstate[h].astype(do[h].dtype)  # [D, Dv]
    decayed_k, decayed_v = chunks.scaled(k[h], d.k_decay), chunks.scaled(v[h], d.k_decay)
    decayed_do = chunks.scaled(do[h], d.q_decay)
    dv = chunks.transposed_causal_dot(scores[h], do[h]) + dot(decayed_k, dh_out, NN)
    dq = chunks.causal_dot(dscores[h], k[h]) + dot(decayed_do, h_in, NT)
    dk = chunks.transposed_causal_dot(dscores[h], q[h]) + dot(decayed_v, dh_out, NT)
    for block, x in ((outputs.dq, dq), (outputs.dk, dk), (outputs.dv, dv)):
      grid.write(block, index, h, x)
    dstate[h] = d.chunk_decay[:, : grid.value_dim] * dstate[h] + dot(q[h], decayed_do, TN)
